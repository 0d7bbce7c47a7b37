"""What the demo prints when it is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.demo import read_nodules, report

HEADER = "seriesuid,coordX,coordY,coordZ,probability,diameter_mm\n"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Results of two scans, the first without a nodule, and a file that a killed writer left."""
    (tmp_path / "validation").mkdir()
    (tmp_path / "inference" / "visualizations").mkdir(parents=True)
    summary = {"scans": 2, "dice": {"mean": 0.8}, "dice_of_scans_with_nodules": 0.7, "nodules_found": 1, "nodules": 2}
    (tmp_path / "validation" / "validation_summary.json").write_text(json.dumps(summary))
    (tmp_path / "inference" / "inference_summary.csv").write_text("seriesuid,nodules\n1.10,0\n1.20,1\n")
    (tmp_path / "inference" / "1.10_nodules.csv").write_text(HEADER)
    (tmp_path / "inference" / "1.20_nodules.csv").write_text(HEADER + "1.20,1.23456,-2.5678,3.4567,0.87654,10.98765\n")
    (tmp_path / "inference" / ".partial-1.30_nodules.csv").write_text("seri")
    for name in ("1.20.png", ".partial-1.30.png"):
        (tmp_path / "inference" / "visualizations" / name).touch()
    return tmp_path


def test_nodules_of_the_listed_scans_are_rounded(experiment):
    rows = read_nodules(experiment / "inference").to_numpy().tolist()
    assert rows == [["1.20", 1.2, -2.6, 3.5, 11.0, 0.88]]


def test_report_names_nodules_and_pictures(experiment, capsys):
    report(experiment, 90.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:5] == [
        "The demo took 1.5 minutes.",
        "Whole-scan Dice on the 2 validation scans: 0.800",
        "Scans with nodules alone: 0.700",
        "Nodules found: 1 of 2",
    ]
    assert lines[6].split() == ["1.20", "1.2", "-2.6", "3.5", "11.0", "0.88"]
    assert lines[-1] == f"  {experiment / 'inference' / 'visualizations' / '1.20.png'}"


def test_report_names_pictures_from_the_projects_folder(experiment, monkeypatch, capsys):
    monkeypatch.setattr("data.demo.ROOT", experiment.parent)
    report(Path(experiment.name), 90.0)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"  {experiment.name}/validation/report.html",
        f"  {experiment.name}/inference/report.html",
        f"  {experiment.name}/inference/visualizations/1.20.png",
    ]


def test_report_says_that_no_nodule_was_marked(experiment, capsys):
    (experiment / "inference" / "inference_summary.csv").write_text("seriesuid,nodules\n1.10,0\n")
    report(experiment, 90.0)
    assert "infer.py marked no nodule" in capsys.readouterr().out.splitlines()
