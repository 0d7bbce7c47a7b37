"""The recipes in data/: one file of options a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import infer
import preprocess
import train
import validate
from data.command_line import parse_command_line
from infer import NoduleInferencer
from preprocess import LUNA16Preprocessor
from train import Trainer
from validate import Validator

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("full_resolution", "full_resolution_small")
COMMANDS = {
    "preprocess": (preprocess, LUNA16Preprocessor, ("process_all",)),
    "train": (train, Trainer, ()),
    "validate": (validate, Validator, ("run_validation", validate.score_predictions)),
    "infer": (infer, NoduleInferencer, ("run",)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("step", COMMANDS)
def test_recipe_names_options_that_there_are_and_takes_them(recipe, step):
    path = ROOT / "data" / recipe / f"{step}.yaml"
    _, cls, callables = COMMANDS[step]
    skipped = [] if step == "train" else ["model", "loss"]
    options, given = parse_command_line(cls, *callables, argv=["--config", str(path)], skip=skipped)
    assert given == set(yaml.safe_load(path.read_text()))
    merged = {name: value for values in options for name, value in values.items()}
    assert merged["output_dir"] == yaml.safe_load(path.read_text())["output_dir"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_step_of_a_recipe_goes_on_where_the_one_before_ended(recipe):
    options = {step: yaml.safe_load((ROOT / "data" / recipe / f"{step}.yaml").read_text()) for step in COMMANDS}
    assert options["train"]["data_dir"] == options["preprocess"]["output_dir"] == options["infer"]["data_dir"]
    for step in ("validate", "infer"):
        assert Path(options[step]["checkpoint_path"]).parents[1] == Path(options["train"]["output_dir"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_of_a_recipe_is_one_that_a_trainer_takes(recipe, processed_dir, tmp_path):
    path = ROOT / "data" / recipe / "train.yaml"
    words = ["--config", str(path), "--data_dir", str(processed_dir), "--output_dir", str(tmp_path), "--device", "cpu"]
    [options], _ = parse_command_line(Trainer, argv=words)
    trainer = Trainer(**options | {"channels": (2, 2, 4), "strides": (2, 2)})
    assert trainer.settings["network"] == "unet"


def test_python_example_trains_as_the_recipe_does(monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", (ROOT / "data" / "README.md").read_text(), re.DOTALL)
    [options], given = parse_command_line(Trainer, argv=["--config", str(ROOT / "data/full_resolution/train.yaml")])
    made = []
    monkeypatch.setattr(Trainer, "__init__", lambda self, **options: made.append(options))
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    exec(example, {})
    assert set(made[0]) == given
    assert made[0] == {name: options[name] for name in given}
