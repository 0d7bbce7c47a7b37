"""The bench of settings: a row each, made once, at a min_score that no scan chose for itself."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import metadata_of, nodule_at

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import settings

from data.phantom import write_phantoms
from infer import NoduleInferencer, find_candidates
from model import Cleaning
from preprocess import LUNA16Preprocessor
from utils import ANNOTATION_COLUMNS, InputError, ProcessedScan
from validate import ExaminedScan


@pytest.fixture
def bench(run_dir, tmp_path, monkeypatch):
    """The command with three settings, on three phantoms that the network has not seen and finds all of."""
    write_phantoms(tmp_path, num_scans=3, seed=5, size_xyz=(64, 64, 32), min_diameter_mm=12, num_processes=1)
    paths = (tmp_path / name for name in ("raw", "annotations.csv", "seg-lungs-LUNA16", "processed"))
    LUNA16Preprocessor(*paths, target_size=(32, 48, 48), num_processes=1).process_all()
    data_dir = tmp_path / "processed"
    monkeypatch.setattr(settings, "RESULTS", tmp_path / "settings.csv")
    few = {settings.PRESENT: {}, "turned": {"mirrors": 9}, "cleaned": {"cleaning": Cleaning(smallest_mm=40.0)}}
    monkeypatch.setattr(settings, "SETTINGS", few)
    looks = []

    def look(inferencer: NoduleInferencer, image: np.ndarray) -> np.ndarray:
        looks.append(inferencer.settings.mirrors)
        masks = [np.load(path) for path in sorted((data_dir / "masks").iterdir())]
        return masks[(len(looks) - 1) % len(masks)] * np.float32(0.9)

    monkeypatch.setattr(NoduleInferencer, "predict_probability", look)

    def run(*names: str) -> pd.DataFrame:
        looks.clear()
        paths = (data_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path / "annotations_excluded.csv")
        settings.main("tiny", *paths, list(names), "cpu")
        return pd.read_csv(settings.RESULTS).set_index("setting")

    run.looks = looks
    return run


def test_each_setting_has_one_row_with_its_gain(bench):
    rows = bench(settings.PRESENT, "cleaned")
    assert bench.looks == [0] * 3  # one look serves all settings that look equally often
    assert rows.loc[settings.PRESENT, ["dice", "dice_gain", "cpm_gain"]].tolist() == [1.0, 0.0, 0.0]
    assert rows.loc["cleaned", ["dice", "dice_gain"]].tolist() == [0.0, -1.0]
    before = settings.RESULTS.read_bytes()
    rows = bench(*settings.SETTINGS)
    assert bench.looks == [0] * 3 + [9] * 3  # what the gain is over, and the missing row
    assert rows.index.tolist() == [settings.PRESENT, "cleaned", "turned"]
    assert settings.RESULTS.read_bytes().startswith(before)
    bench(*settings.SETTINGS)
    assert not bench.looks


def test_network_is_not_scored_on_what_it_has_learnt_from(bench, processed_dir, run_dir):
    with pytest.raises(InputError, match="may have seen 4 of these scans"):
        paths = (processed_dir, run_dir / "checkpoints" / "best_model.pth", processed_dir / "none.csv")
        settings.main("tiny", *paths, ["turned"], "cpu")


def test_unknown_setting_is_named(bench):
    with pytest.raises(InputError, match="settings must be among as the checkpoint says, turned, cleaned, not sharper"):
        bench("sharper")


def examined(score, uid="a"):
    """A scan with a nodule of this score, and a spot beside it of half of it."""
    probability = np.zeros((10, 10, 30), np.float32)
    probability[2:7, 2:7, 2:7], probability[2:7, 2:7, 22:27] = score, score / 2
    mask = (probability == np.float32(score)).astype(np.uint8)
    metadata = metadata_of(nodule_at(4, 4, 4, voxels=125), shape_zyx=mask.shape)
    return ExaminedScan.of(
        ProcessedScan(uid, probability, mask, metadata), find_candidates(probability, metadata.grid, 0.1)
    )


def test_min_score_of_each_half_comes_from_the_other():
    none = pd.DataFrame(columns=ANNOTATION_COLUMNS)
    scored = settings.score([examined(0.9), examined(0.4, "b")], none)
    assert scored.table["nodules_found"].tolist() == [1, 0]  # by 0.4; by 0.5
    assert scored.table["false_positive_nodules"].tolist() == [1, 0]
    with pytest.raises(InputError, match="one patient's scans cannot choose a min_score for each other"):
        settings.score([examined(0.9), examined(0.4)], none)
