"""Cleaner masks, on arrays that can be counted by hand."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_validate import Oracle

from data.cleaning import CRF_EDGE, CRF_SIGMA_MM, CRF_STEPS, CRF_WEIGHT, follow_edges, mean_field, reshape_nodules
from infer import NoduleInferencer, find_candidates
from infer import main as infer_main
from model import Cleaning, InferenceSettings, load_checkpoint, save_checkpoint
from utils import Geometry, InputError, read_processed, read_processed_list

UNIT = (1.0, 1.0, 1.0)


def block(*slices, shape=(20, 20, 20)):
    """A bool array that is true in a block."""
    array = np.zeros(shape, bool)
    array[tuple(slice(*ends) for ends in slices)] = True
    return array


def reshaped(parts, image=None, spacing=UNIT, **cleaning):
    """The masks of nodules, given by bool arrays, after a cleaning."""
    image = np.ones(parts[0].shape) if image is None else image
    voxels, _ = reshape_nodules([np.argwhere(part) for part in parts], image, spacing, Cleaning(**cleaning))
    masks = [np.zeros(image.shape, int) for _ in voxels]
    for mask, those in zip(masks, voxels, strict=True):
        np.add.at(mask, tuple(those.T), 1)
        assert mask.max() == 1
    return [mask > 0 for mask in masks]


# -------------------------------------------------------------------------------------------------- morphology


def test_opening_takes_off_what_is_thinner_than_its_ball():
    ball = np.sum((np.indices((20, 20, 20)) - 10) ** 2, axis=0) <= 25
    spike = block((10, 11), (10, 11), (15, 19))
    (opened,) = reshaped([ball | spike], opening_mm=1.2)
    np.testing.assert_array_equal(opened, ball)


def test_opening_makes_two_nodules_of_two_lumps_with_a_bridge():
    ball = np.sum((np.indices((20, 20, 20)) - 7) ** 2, axis=0) <= 25
    bridge, lump = block((7, 8), (7, 8), (12, 15)), block((6, 9), (6, 9), (15, 18))
    first, second = reshaped([ball | bridge | lump], opening_mm=1.2)
    np.testing.assert_array_equal(first, ball)
    assert second[7, 7, 15:18].all() and not (second & ~lump & ~bridge).any()


def test_lump_that_opening_takes_off_and_is_too_small_is_left_out():
    ball = np.sum((np.indices((20, 20, 20)) - 7) ** 2, axis=0) <= 25
    bridge, lump = block((7, 8), (7, 8), (12, 15)), block((6, 9), (6, 9), (15, 18))
    parts, image = [np.argwhere(ball | bridge | lump)], np.ones(ball.shape)
    (kept,), (left,) = reshape_nodules(parts, image, UNIT, Cleaning(opening_mm=1.2, smallest_mm=5.0))
    assert len(kept) == ball.sum() and lump[tuple(left.T)].sum() >= 7
    assert reshape_nodules(parts, image, UNIT, Cleaning(opening_mm=1.2), smallest_mm3=60.0)[1] == []


def test_opening_takes_nothing_off_at_the_edge_of_the_array():
    corner = block((0, 8), (0, 8), (0, 8))
    (opened,) = reshaped([corner], opening_mm=2.0)
    assert opened[:6, 0, 0].all() and opened[0, :6, 0].all() and opened[0, 0, :6].all() and not opened[7, 7, 7]


def test_opening_leaves_a_nodule_whose_middle_lies_beyond_the_array():
    ball = np.linalg.norm(np.indices((48, 48, 48)) - np.array([-1, -2, 24])[:, None, None, None], axis=0) <= 3
    ((left,), _) = reshape_nodules([np.argwhere(ball)], np.ones(ball.shape), UNIT, Cleaning(opening_mm=2.0))
    assert len(left) == ball.sum()


def test_piece_of_an_opening_that_lies_beyond_the_array_is_none():
    labels, _ = ndimage.label(np.random.default_rng(0).random((6, 6, 6)) < 0.5, np.ones((3, 3, 3)))
    part = labels == 1 + np.bincount(labels.ravel())[1:].argmax()  # it touches every side
    opened = reshaped([part], opening_mm=2.0, closing_mm=2.0)
    assert opened and all(mask.any() for mask in opened)


def test_opening_leaves_a_nodule_that_it_would_delete():
    thin = block((5, 6), (5, 9), (5, 9))
    np.testing.assert_array_equal(reshaped([thin], opening_mm=1.0)[0], thin)


def test_radius_is_in_millimetres_along_each_axis():
    plate, rod = block((8, 10), (4, 16), (4, 16)), block((10, 14), (9, 12), (9, 12))
    thick = reshaped([plate | rod], opening_mm=1.2, spacing=(1.5, 1.0, 1.0))[0]
    thin = reshaped([plate | rod], opening_mm=1.2)[0]
    assert (thick & plate).sum() == 2 * (144 - 4) and (thin & plate)[8, 4:8].sum() == 0


def test_closing_fills_a_dent_and_leaves_another_nodule_alone():
    cube, dent = block((4, 14), (4, 14), (4, 14)), block((8, 9), (8, 9), (10, 14))
    other = block((8, 9), (8, 9), (13, 14))
    first, second = reshaped([cube & ~dent, other], closing_mm=2.0)
    np.testing.assert_array_equal(first, cube & ~other)
    np.testing.assert_array_equal(second, other)


def test_cavity_whose_mouth_is_closed_is_filled():
    distance = np.sum((np.indices((20, 20, 20)) - 10) ** 2, axis=0)
    shell, channel = (distance <= 64) & (distance > 16), block((10, 11), (10, 11), (10, 20))
    (closed,) = reshaped([shell & ~channel], closing_mm=1.5)
    assert closed[distance <= 25].all()


def test_opening_that_leaves_less_than_a_nodule_is_not_done():
    ball, plate = np.sum((np.indices((20, 20, 20)) - 10) ** 2, axis=0) <= 5, block((10, 11), (2, 19), (2, 19))
    voxels = [np.argwhere(ball | plate)]
    image, cleaning, half = np.ones((20, 20, 20)), Cleaning(opening_mm=1.0), (0.5, 0.5, 0.5)
    assert len(reshape_nodules(voxels, image, half, cleaning)[0][0]) < 40
    assert len(reshape_nodules(voxels, image, half, cleaning, smallest_mm3=10.0)[0][0]) == len(voxels[0])


def test_closing_stays_inside_the_array():
    corner = block((0, 5), (0, 5), (0, 5))
    np.testing.assert_array_equal(reshaped([corner], closing_mm=3.0)[0], corner)


def test_smallest_diameter_is_that_of_the_sphere_of_equal_volume():
    small, large = block((2, 4), (2, 4), (2, 4)), block((8, 12), (8, 12), (8, 12))
    (kept,) = reshaped([small, large], smallest_mm=4.0)  # 33.5 mm3
    np.testing.assert_array_equal(kept, large)
    assert len(reshaped([small, large], smallest_mm=4.0, spacing=(2.0, 2.0, 2.0))) == 2


def test_nodule_that_is_mostly_air_or_outside_the_lungs_is_left_out():
    image, tissue, outside = np.zeros((20, 20, 20)), block((2, 6), (2, 6), (2, 6)), block((10, 14), (10, 14), (10, 14))
    image += np.random.default_rng(0).uniform(0, 0.03, image.shape)  # noise of air
    image[2:6, 2:6, 2:5] = 0.6  # three quarters of the first
    (kept,) = reshaped([tissue, outside], image, in_lungs=True)
    np.testing.assert_array_equal(kept, tissue)


@pytest.mark.parametrize("name", ["opening_mm", "closing_mm", "smallest_mm"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_length_must_be_one(name, value):
    with pytest.raises(InputError, match=f"cleaning.{name} must be 0 to "):
        Cleaning(**{name: value})


# --------------------------------------------------------------------------------------- conditional random field


def test_mean_field_of_two_voxels():
    spacing = (2.0, 2.0, 2.0)
    probability, image = torch.tensor([[[0.8, 0.4]]]), torch.tensor([[[0.5, 0.55]]])
    faces, edges = 6 * math.exp(-4 / (2 * CRF_SIGMA_MM**2)), 12 * math.exp(-8 / (2 * CRF_SIGMA_MM**2))
    attraction = CRF_WEIGHT * math.exp(-4 / (2 * CRF_SIGMA_MM**2)) / (faces + edges)
    attraction *= math.exp(-(0.05**2) / (2 * CRF_EDGE**2))
    first, second = 0.8, 0.4
    for _ in range(CRF_STEPS):
        logits = [math.log(alone / (1 - alone)) for alone in (0.8, 0.4)]
        logits = [logits[0] + attraction * (2 * second - 1), logits[1] + attraction * (2 * first - 1)]
        first, second = (1 / (1 + math.exp(-logit)) for logit in logits)
    np.testing.assert_allclose(mean_field(probability, image, spacing).ravel(), [first, second], rtol=1e-5)


def test_field_fills_the_tissue_and_leaves_the_air():
    tissue = block((5, 15), (5, 15), (5, 15))
    image = np.where(tissue, 0.8, 0.1)
    sure, doubtful, beyond = (
        block((5, 15), (5, 15), (5, 12)),
        block((5, 15), (5, 15), (12, 15)),
        block((9, 10), (9, 10), (15, 16)),
    )
    probability = np.select([sure, doubtful, beyond], [0.95, 0.45, 0.55], 0.01)
    component = np.argwhere(probability >= 0.1)
    refined = follow_edges(probability, image, UNIT, [component])
    assert (refined[sure] > 0.95).all() and refined[7:13, 7:13, 12].min() > 0.5
    assert refined[9, 9, 15] < 0.5
    rest = ~ndimage.binary_dilation(probability >= 0.1)
    np.testing.assert_array_equal(refined[rest], probability[rest].astype(np.float32))


def test_component_that_is_too_large_for_a_nodule_stays_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr("data.cleaning.MOST_PAIRS", 1000)
    probability = np.where(block((5, 15), (5, 15), (5, 15)), 0.6, 0.0)
    refined = follow_edges(probability, probability, UNIT, [np.argwhere(probability > 0)])
    np.testing.assert_array_equal(refined, probability.astype(np.float32))
    assert "1 spots are too large for the random field" in caplog.text


# ------------------------------------------------------------------------------------------------- in the pipeline


def test_candidates_keep_the_scores_of_the_map_as_it_is():
    image = np.where(block((5, 12), (5, 12), (5, 12)), 0.8, 0.1)
    probability = np.where(block((5, 12), (5, 12), (5, 12)), 0.7, 0.0).astype(np.float32)
    grid = Geometry(image.shape, (0.0, 0.0, 0.0), UNIT)
    plain = find_candidates(probability, grid, 0.5)
    cleaned = find_candidates(probability, grid, 0.5, cleaning=Cleaning(crf=True), image=image)
    assert [n.score for n in plain.candidates] == [n.score for n in cleaned.candidates]


def test_nodule_that_the_field_takes_from_the_mask_stays_a_candidate():
    tissue = block((5, 15), (5, 15), (2, 28), shape=(20, 20, 30))
    probability = np.where(tissue, 0.15, 0.0).astype(np.float32)  # joins the two
    probability[6:14, 6:14, 3:11], probability[8:11, 8:11, 21:24] = 0.95, 0.52
    grid, image = Geometry(tissue.shape, (0.0, 0.0, 0.0), UNIT), np.where(tissue, 0.8, 0.1)
    plain = find_candidates(probability, grid, 0.5)
    cleaned = find_candidates(probability, grid, 0.5, cleaning=Cleaning(crf=True), image=image)
    assert (len(plain.nodules), len(cleaned.nodules)) == (2, 1)
    assert [n.center_xyz for n in cleaned.faint] == [plain.nodules[1].center_xyz]


def test_cleaning_needs_the_image():
    probability = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(ValueError, match="cleaning needs the image"):
        find_candidates(probability, Geometry((4, 4, 4), (0.0, 0.0, 0.0), UNIT), 0.5, cleaning=Cleaning(crf=True))


def test_mask_of_an_array_is_cleaned_and_the_checkpoint_carries_how(processed_dir, run_dir, tmp_path):
    path = run_dir / "checkpoints" / "best_model.pth"
    uid = read_processed_list(processed_dir)[0]
    scan = read_processed(processed_dir, uid)
    masks = {}
    for name, cleaning in (("plain", None), ("cleaned", Cleaning(smallest_mm=40.0))):
        inferencer = NoduleInferencer(path, tmp_path / name, "cpu", min_score=0.0, cleaning=cleaning)
        inferencer.predictor.model = Oracle(scan.mask)
        masks[name] = inferencer.predict(np.asarray(scan.image, np.float32))
    assert masks["plain"].any() and not masks["cleaned"].any()
    assert inferencer.provenance["cleaning"] == "nodules of 40 mm and more"
    inferencer.save_checkpoint(tmp_path / "tuned.pth", inferencer.settings)
    assert load_checkpoint(tmp_path / "tuned.pth").inference.cleaning == Cleaning(smallest_mm=40.0)
    again = NoduleInferencer(tmp_path / "tuned.pth", tmp_path / "again", "cpu")
    assert again.settings.cleaning == Cleaning(smallest_mm=40.0) and not again.by_hand


def test_cleaning_by_hand_is_an_option_and_stands_in_the_results(processed_dir, run_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words = ["--checkpoint_path", str(run_dir / "checkpoints" / "best_model.pth"), "--output_dir", str(tmp_path)]
    words += ["--data_dir", str(processed_dir), "--subset", "all", "--device", "cpu", "--report", "true"]
    more = ["--cleaning.crf", "true", "--cleaning.opening_mm", "1", "--scales", "[0.5,1.5]", "--everywhere", "true"]
    assert infer_main([*words, *more]) == 0
    noted = json.loads((tmp_path / "inference.json").read_text())
    assert noted["cleaning"] == "conditional random field, opening by 1 mm" and noted["scales"] == "0.5, 1.5"
    page = next(path for path in tmp_path.rglob("*.html") if path.name != "report.html").read_text()
    assert "conditional random field, opening by 1 mm" in page
    assert "Set by hand: magnification of further looks: 0.5, 1.5 (the checkpoint: as by default)." in page
    assert infer_main(words) != 0 and "what differs: cleaning, scales" in caplog.text


def test_lungs_that_were_not_masked_cannot_be_told_from_the_rest(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    path = tmp_path / "unmasked.pth"
    save_checkpoint(path, replace(checkpoint, preprocessing=checkpoint.preprocessing | {"mask_lungs": False}))
    with pytest.raises(InputError, match="in_lungs needs scans prepared with mask_lungs"):
        NoduleInferencer(path, tmp_path / "out", "cpu", cleaning=Cleaning(in_lungs=True))


def test_look_that_nothing_comes_of_is_not_noted(run_dir, tmp_path):
    path = run_dir / "checkpoints" / "best_model.pth"  # of whole scans, without mirror images
    assert "everywhere" not in NoduleInferencer(path, tmp_path / "out", "cpu", everywhere=True).provenance


def test_settings_of_older_checkpoints_clean_nothing():
    assert InferenceSettings(**{"threshold": 0.5, "min_score": 0.2}).cleaning == Cleaning()
    settings = InferenceSettings(cleaning=Cleaning(closing_mm=2.0))
    assert InferenceSettings(**settings.to_dict()) == settings
