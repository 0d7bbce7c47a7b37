"""Scores that are learnt from candidates: fitting, applying, choosing, carrying and telling them."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import nodule_at

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import learning
import rescoring

from data.rescoring import Features, LearntScore, fit_score
from infer import FoundNodule, NoduleInferencer, Segmentation, features_of, find_candidates
from model import InferenceSettings, load_checkpoint, save_checkpoint
from utils import ANNOTATION_COLUMNS, Box, Geometry, InputError, read_processed, read_processed_list
from validate import ExaminedScan, Overlap, Validator, choose_settings, cpm_of, learn_score

NODULE = Features(0.5, 0.95, 0.6, 8.0, 0.01, 0.8)
VESSEL = Features(0.6, 0.6, 0.9, 3.0, 0.1, 0.4)  # looks rounder
BY_PEAK = LearntScore((0.0, 1.0, *[0.0] * 5), 0.0, 10)


def found_at(z, features, diameter_mm=5.0):
    centre = (10.0, 10.0, float(z))
    return FoundNodule(centre, centre[::-1], diameter_mm, 65, 65.0, Box((0, 0, 0), (1, 1, 1)), features.score, features)


def examined(number, excluded=()):
    """A scan with a nodule, which is found, and three vessels that are taken for one."""
    rng = np.random.default_rng(number)
    found = [found_at(10, NODULE), *(found_at(z, VESSEL) for z in (20, 30, 40))]
    found = [
        replace(f, features=f.features._replace(roundness=f.features.roundness - rng.uniform(0, 0.1))) for f in found
    ]
    labels = np.zeros((0, 1, 1), int)
    overlap = Overlap(np.array([100, *[100] * 4]), np.array([0, 100, 0, 0, 0]))
    findings = np.reshape(excluded, (-1, 4)).astype(float)
    segmentation = Segmentation(labels, found, [1, 2, 3, 4])
    return ExaminedScan(f"1.{number}", [nodule_at(10, 10, 10)], segmentation, overlap, [overlap], [5.0], findings, 0.0)


def test_features_of_a_ball_are_as_counted_by_hand():
    probability = np.zeros((9, 9, 9), np.float32)
    probability[3:6, 3:6, 3:6] = 0.5  # 27 voxels of 1 mm, of 54 with a neighbour each outside
    probability[4, 4, 4] = 1.0
    voxels = np.argwhere(probability > 0.4)
    features = features_of(voxels, Geometry((9, 9, 9), (0.0,) * 3, (1.0,) * 3), probability, len(voxels))
    assert features.certainty == pytest.approx(14 / 27)  # voxels of 0 do not count
    assert features.peak == pytest.approx(14 / 33)  # of the likeliest 33 mm3; six of them are 0
    assert features.roundness == pytest.approx(1.0)
    assert features.diameter_mm == pytest.approx((6 * 27 / np.pi) ** (1 / 3))
    assert features.score == pytest.approx(14 / 27)


def test_features_tell_what_lies_around():
    shape = (41, 41, 41)
    z, y, x = np.indices(shape) - 20
    distance = np.sqrt(z**2 + y**2 + x**2)
    probability = np.where(distance < 5, 0.9, np.where(z > 0, 0.2, 0.0)).astype(np.float32)
    image = np.where(distance < 5, 0.8, np.where(y > 0, 0.1, 0.6)).astype(np.float32)  # half of it lung
    image[:, :, :20] = 0  # and half of that is masked
    geometry = Geometry(shape, (0.0,) * 3, (1.0,) * 3)
    (found,) = find_candidates(probability, geometry, 0.5, image=image).nodules
    assert found.features.haze == pytest.approx(0.1, abs=0.01)
    assert found.features.air == pytest.approx(0.25, abs=0.02)
    (found,) = find_candidates(probability, geometry, 0.5).nodules
    assert np.isnan(found.features.air)


def test_candidate_that_fills_the_scan_has_nothing_around():
    probability, geometry = np.full((5, 5, 5), 0.9, np.float32), Geometry((5, 5, 5), (0.0,) * 3, (1.0,) * 3)
    (found,) = find_candidates(probability, geometry, 0.5, image=probability).candidates
    assert (found.features.haze, found.features.air) == (0.0, 0.0)


def test_features_are_judged_by_the_grid_of_the_network():
    probability = np.zeros((9, 9, 9), np.float32)
    probability[3:6, 3:6, 3:6] = 0.9
    geometry = Geometry((9, 9, 9), (0.0,) * 3, (1.0,) * 3)
    (found,) = find_candidates(probability, geometry, 0.5, grid_spacing=(2.0, 2.0, 2.0)).candidates
    assert found.features.diameter_mm == pytest.approx(2 * found.diameter_mm)
    assert found.features.peak == pytest.approx(0.9)  # four voxels of 8 mm3


def test_fitted_score_is_the_share_of_nodules_among_alike_candidates():
    rng = np.random.default_rng(0)
    candidates = [
        Features(*values) for values in rng.uniform([0.1, 0.1, 0.3, 2, 0.01, 0], [0.9, 0.9, 1, 20, 0.3, 1], (20_000, 6))
    ]
    truth = LearntScore((0.0, 1.5, -0.5, 0.5, -2.0, 1.0, 0.5), 0.3, 0)
    chances = np.array([truth(features) for features in candidates])
    is_nodule = rng.random(len(candidates)) < chances
    learnt = fit_score(candidates, is_nodule)
    scores = np.array([learnt(features) for features in candidates])
    assert learnt.candidates == len(candidates)
    assert np.abs(scores - chances).mean() < 0.02
    for lower in np.arange(0, 1, 0.2):
        alike = (scores >= lower) & (scores < lower + 0.2)
        assert scores[alike].mean() == pytest.approx(is_nodule[alike].mean(), abs=0.03)


def test_fit_of_candidates_that_are_told_apart_without_doubt_is_finite():
    learnt = fit_score([NODULE] * 20 + [VESSEL] * 20, [True] * 20 + [False] * 20)
    assert 0.8 < learnt(NODULE) < 1 and 0 < learnt(VESSEL) < 0.2


@pytest.mark.parametrize("truth", [[True, True], [False, False], [True]])
def test_candidates_of_one_kind_teach_nothing(truth):
    with pytest.raises(InputError, match="candidates must be of both kinds"):
        fit_score([NODULE, VESSEL], truth)


def test_score_with_another_number_of_weights_is_refused():
    with pytest.raises(InputError, match="a learnt score has 7 weights, not 3"):
        LearntScore((1.0, 2.0, 3.0), 0.0, 5)


def test_certain_candidates_have_finite_scores():
    assert 0 < LearntScore((5.0, 5.0, *[0.0] * 5), 0.0, 1)(Features(1.0, 1.0, 1.0, 0.0, 0.0, 1.0)) <= 1
    assert 0 <= LearntScore((500.0, 500.0, *[0.0] * 5), 0.0, 1)(Features(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)) < 1e-6


def test_rescored_candidates_come_likeliest_first_and_keep_their_labels():
    labels = np.array([[[1, 2, 0]]])
    faint = found_at(30, Features(0.2, 0.99, 1.0, 4.0, 0.0, 1.0))
    found = Segmentation(labels, [found_at(20, VESSEL), found_at(10, NODULE), faint], [1, 2, 0])
    again = found.rescored(BY_PEAK)
    assert [nodule.center_xyz[2] for nodule in again.candidates] == [10.0, 20.0, 30.0]  # faint ones stay last
    assert again.numbers == [2, 1, 0]
    assert again.scores.tolist() == pytest.approx([-1.0, 0.6, 0.95])
    assert again.ranks.tolist() == [[[2, 1, 0]]]
    assert again.marks("a")["coordZ"].tolist() == [30.0, 10.0, 20.0]
    assert again.keep(0.7).nodules[0].center_xyz[2] == 10.0 and len(again.keep(0.7).nodules) == 1


def test_score_that_is_learnt_tells_what_the_plain_one_does_not():
    scans = [examined(number) for number in range(12)]
    assert cpm_of(scans) == pytest.approx(2 / 7)  # three false marks come before each nodule
    learnt, rescored = learn_score(scans)
    assert cpm_of(rescored) == 1
    assert learnt.candidates == 48
    assert learnt(NODULE) > 0.8 > 0.2 > learnt(VESSEL)


def test_each_scan_is_rescored_by_what_others_taught():
    scans = [examined(number) for number in range(12)]
    plain = [candidate.score for candidate in learn_score(scans)[1][0].found.candidates]
    other = replace(scans[0], annotated=[nodule_at(20, 10, 10)])
    changed = [candidate.score for candidate in learn_score([other, *scans[1:]])[1][0].found.candidates]
    assert plain == changed


def test_scans_of_one_patient_stay_in_one_half():
    scans = [replace(examined(number), patient=f"P{number // 2}") for number in range(24)]
    plain = [candidate.score for candidate in learn_score(scans)[1][0].found.candidates]
    other = replace(scans[1], annotated=[nodule_at(20, 10, 10)])  # of the same patient
    changed = [candidate.score for candidate in learn_score([scans[0], other, *scans[2:]])[1][0].found.candidates]
    assert plain == changed


def test_what_is_not_known_is_not_learnt_from():
    with pytest.raises(InputError, match="candidates of a map whose image was given"):
        fit_score([NODULE, VESSEL._replace(air=math.nan)], [True, False])


def test_candidates_on_excluded_findings_teach_nothing():
    scans = [examined(number, excluded=(10, 10, 20, 4)) for number in range(12)]
    assert learn_score(scans)[0].candidates == 36


def test_nothing_is_learnt_of_too_few_nodules():
    assert learn_score([examined(number) for number in range(9)]) is None  # four in one half


def test_tuning_takes_a_learnt_score_that_is_better():
    present = InferenceSettings()
    settings, table = choose_settings([present], [[examined(number)] for number in range(12)], present)
    assert table["score"].tolist() == ["as it is", "learnt"]
    assert table["chosen"].tolist() == [False, True]
    assert table["cpm"].tolist() == pytest.approx([2 / 7, 1.0])
    assert settings.learnt_score is not None and settings.min_score == table["min_score"][1]
    assert table["dice"][1] == 1 > table["dice"][0]


def test_tuning_leaves_a_score_that_cannot_be_learnt(caplog):
    present = InferenceSettings()
    settings, table = choose_settings([present], [[examined(number)] for number in range(4)], present)
    assert (settings.learnt_score, table["score"].tolist()) == (None, ["as it is"])
    assert "no score is learnt: each half of the scans needs 5 candidates that are nodules" in caplog.text


def test_tuning_learns_from_more_candidates_than_are_listed(run_dir, processed_dir, tmp_path):
    validator = Validator(processed_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path, device="cpu")
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    probability = torch.zeros(scan.image.shape)
    probability[::6, ::6, ::6] = 0.2
    [found] = validator._examine_choices([validator.inferencer.settings], None, scan, (probability, 0.0))
    assert len(found.found.candidates) == int((probability > 0).sum()) > 100


def test_checkpoint_carries_the_learnt_score_and_results_tell_it(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    inference = replace(checkpoint.inference, learnt_score=BY_PEAK)
    save_checkpoint(tmp_path / "tuned.pth", replace(checkpoint, inference=inference))
    inferencer = NoduleInferencer(tmp_path / "tuned.pth", output_dir=tmp_path / "out", device="cpu")
    assert inferencer.settings.learnt_score == BY_PEAK
    assert inferencer.provenance["learnt_score"] == "logistic regression, fitted on 10 candidates"
    probability = np.zeros((20, 20, 20), np.float32)
    probability[5:12, 5:12, 5:12] = 0.8
    geometry = Geometry((20, 20, 20), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(InputError, match="a learnt score needs the image that the map is of"):
        inferencer.find_candidates(probability, geometry)
    (nodule,) = inferencer.find_candidates(probability, geometry, np.zeros_like(probability)).nodules
    assert nodule.score == pytest.approx(0.8, abs=1e-5)
    assert torch.load(tmp_path / "tuned.pth", weights_only=True)["inference"]["learnt_score"]["candidates"] == 10


def bench_candidates(number, scan):
    """A nodule, bright in a dark crop, and three vessels, which are dark in a bright one."""
    shape, rng = (2, *[rescoring.SIZE + 2 * rescoring.SHIFT] * 3), np.random.default_rng(number)
    candidates = []
    for z, features in ((10, NODULE), *((z, VESSEL) for z in (20, 30, 40))):
        features = features._replace(roundness=features.roundness - rng.uniform(0, 0.1))
        crop = np.full(shape, 0.0 if features.peak > 0.9 else 1.0, np.float32)
        crop[:, 10:18, 10:18, 10:18] = 1 - crop[0, 0, 0, 0]
        candidates.append(rescoring.Candidate(scan, (10.0, 10.0, float(z)), features.peak > 0.9, features, crop))
    return candidates


def test_bench_of_scores_tells_the_cpm_of_each_on_scans_that_taught_none(run_dir, monkeypatch, capsys):
    asked = []

    def candidates(bench, inferencer, name, grid, subset):
        asked.append((name, subset))
        uids = [f"{name}.{number}" for number in range(6)]
        nodules = pd.DataFrame([(uid, 10, 10, 10, 5) for uid in uids], columns=list(ANNOTATION_COLUMNS))
        return [c for number, uid in enumerate(uids) for c in bench_candidates(number, uid)], nodules, uids

    monkeypatch.setattr(rescoring, "candidates_of_phantoms", candidates)
    monkeypatch.setattr(rescoring, "STEPS", 12)
    monkeypatch.setattr(learning.Bench, "checkpoint", lambda *_: run_dir / "checkpoints" / "best_model.pth")
    rescoring.phantoms(seeds=[0], device="cpu")
    assert asked == [("train", "validation"), ("test11", "new"), ("test12", "new"), ("test13", "new")]
    lines = capsys.readouterr().out.splitlines()
    cpm = {line[:26].strip(): line[26:].split()[:2] for line in lines[1:]}
    assert list(cpm) == list(rescoring.SCORES)
    assert cpm["as it is"] == ["0.2857", "+0.0000"]  # three false marks come before each nodule
    assert cpm["peak"] == cpm["learnt"] == cpm["small network"] == ["1.0000", "+0.7143"]


def test_bench_of_scores_counts_a_cube_once_and_false_marks_by_scan():
    crop = np.zeros((2, 1, 1, 1), np.float32)
    scans = ("cube_1", "cube_1", "cube_2", "whole", "whole", "whole")
    truth = (True, True, True, False, False, False)
    found = [
        rescoring.Candidate(scan, (0.0,) * 3, is_nodule, NODULE, crop)
        for scan, is_nodule in zip(scans, truth, strict=True)
    ]
    shares = rescoring.sensitivities(found, np.array([0.9, 0.2, 0.5, 0.8, 0.6, 0.1]), scans=1, cubes=4)
    assert shares.tolist() == [0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5]  # at 1/8, 1/4, 1/2, 1, 2, 4, 8 a scan
