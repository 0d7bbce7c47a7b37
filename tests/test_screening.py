"""The screening of networks and losses: its rows are made once, and each trial is one that a trainer takes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import real
import screening
from test_real import examined

from data.command_line import parse_command_line
from train import Trainer
from utils import read_processed_list
from validate import Validator

ROOT = Path(__file__).resolve().parents[1]
NAME = "ten minutes, patches of 32"


@pytest.fixture
def folders(monkeypatch, run_dir, processed_dir, tmp_path) -> dict[str, Path]:
    """Folders of a trial that is trained already; its row goes into a table of its own."""
    uid = read_processed_list(processed_dir)[0]
    luna16 = {uid.rpartition(".")[2]: 0}
    scans = [examined("cube_000", [0.8], True), examined("cube_001", [0.55], True)]
    scans.append(examined(uid, [0.95, 0.9, 0.7, 0.6], False))
    trained = run_dir / "checkpoints" / "best_model.pth"
    (tmp_path / "annotations_excluded.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    shutil.copytree(processed_dir, tmp_path / "processed")
    for name in ("patches_of_32", "nnunet"):
        shutil.copytree(run_dir, tmp_path / "work" / "runs" / f"ten_minutes_{name}" / "0" / "0")
    run = Validator.run_validation  # the only scans that there are were seen in training
    monkeypatch.setattr(Validator, "run_validation", lambda self, _, **more: run(self, "all", **more))
    monkeypatch.setattr(real.Bench, "train", lambda *_: trained)
    monkeypatch.setattr(real.Bench, "phantoms", lambda *_: tmp_path / "processed")
    monkeypatch.setattr(real.Bench, "real", lambda *_: processed_dir)
    monkeypatch.setattr(real.Bench, "examine", lambda *_: scans)
    for module in (real, screening):
        monkeypatch.setattr(module, "LUNA16_SCANS", luna16)
    monkeypatch.setattr(screening, "RESULTS", tmp_path / "screening.csv")
    return {"real_dir": tmp_path / "real", "luna16_dir": tmp_path / "luna16", "work_dir": tmp_path / "work"}


def test_trial_is_scored_once_on_phantoms_and_on_the_quarter(folders, monkeypatch, tmp_path):
    screening.main(**folders, trials=[NAME], device="cpu")
    [row] = pd.read_csv(tmp_path / "screening.csv").to_dict("records")
    assert (row["trial"], row["seed"]) == (NAME, 0)
    assert row["steps"] > 0 and row["seconds_a_step"] > 0 and row["seconds_a_scan"] > 0
    assert row["phantoms_nodules"] > 0 and 0 <= row["phantoms_cpm"] <= 1
    assert (row["cubes"], row["all_cubes_found"], row["other_marks_in_luna16"]) == (2, 2, 4)
    assert row["few_marks_cubes_found"] == 1  # the other one's score is below those of two marks or more
    monkeypatch.setattr(real.Bench, "train", None)  # not called again
    screening.main(**folders, trials=[NAME], device="cpu")


def test_network_at_full_resolution_is_scored_on_the_quarter_alone(folders, tmp_path):
    screening.main(**folders, trials=["ten minutes, nnunet", NAME], device="cpu")
    rows = pd.read_csv(tmp_path / "screening.csv").set_index("trial")
    assert rows["phantoms_cpm"].isna().tolist() == [True, False]
    assert rows["cubes"].tolist() == [2, 2]


def test_unknown_trial_is_refused(folders):
    with pytest.raises(ValueError, match=r"trials must be among ten minutes, patches of 48, .*, not nnunet"):
        screening.main(**folders, trials=["nnunet"])


@pytest.mark.parametrize("name", screening.TRIALS)
def test_trial_names_options_that_there_are(name):
    recipe = str(ROOT / real.RECIPE / "train.yaml")
    [options], _ = parse_command_line(Trainer, argv=["--config", recipe, *screening.TRIALS[name].training])
    assert options["patches"].warmup_epochs < options["num_epochs"]
