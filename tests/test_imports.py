"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "utils": set(),
    "model": {"utils"},  # its checks
    "preprocess": {"utils"},
    "dataset": {"utils"},
    "infer": {"utils", "model", "preprocess"},
    "validate": {"utils", "dataset", "infer"},
    "train": {"utils", "model", "dataset", "validate"},
}


def imported_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", ALLOWED)
def test_module_imports_only_what_the_house_allows(module):
    assert imported_names(ROOT / f"{module}.py") & set(ALLOWED) <= ALLOWED[module]


def test_top_level_holds_the_seven_modules_and_no_other():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ALLOWED)


def test_preprocessing_needs_no_torch():
    assert "torch" not in imported_names(ROOT / "preprocess.py")


@pytest.mark.parametrize("module", ALLOWED)
def test_no_module_uses_pyplot(module):
    assert "pyplot" not in (ROOT / f"{module}.py").read_text(encoding="utf-8")
