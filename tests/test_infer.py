"""Probability maps, nodules and what is written of them."""

import hashlib
import json
import math
import random
import runpy
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from conftest import BALL_CENTER, BALL_RADIUS_MM, HALF, TINY, Bright, Nothing, write_chest
from scipy import ndimage
from torch import nn
from torch.nn import functional

import infer
from data.formats import NiftiHeader
from data.masks import read_marks, read_mask
from infer import (
    MAX_CANDIDATES,
    WINDOW_BATCH,
    NoduleInferencer,
    Predictor,
    extract_nodules,
    find_candidates,
    map_scans,
)
from model import Cleaning, InferenceSettings, LungNodule3DUNet, Zoom, load_checkpoint, save_checkpoint
from preprocess import LUNA16Preprocessor, find_scans
from train import Trainer, ValidationSettings
from utils import (
    AnnotatedNodule,
    Box,
    Geometry,
    InputError,
    UserError,
    choose_scans,
    read_metadata,
    read_processed,
    read_processed_list,
    read_split,
    write_image,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0, "dropout": 0.1}


class Block(nn.Module):
    """Finds one nodule, always at array[10:14, 20:25, 20:26], whose brightest voxel has the logit 3."""

    def forward(self, image):
        logits = torch.full_like(image, -10)
        logits[..., 10:14, 20:25, 20:26] = 2
        logits[..., 12, 22, 23] = 3
        return logits


@pytest.fixture
def live(tmp_path):
    """An inferencer of a live model."""

    def make(model, window=None, grid_spacing=None, **arguments):
        settings = InferenceSettings(window=window, grid_spacing=grid_spacing)
        return NoduleInferencer(
            output_dir=tmp_path / "out",
            device="cpu",
            mixed_precision=False,
            model=model,
            settings=settings,
            **arguments,
        )

    return make


# --------------------------------------------------------------------------------------------------------- prediction


def test_mask_is_uint8_of_the_shape_of_the_image(live):
    torch.manual_seed(0)
    network = LungNodule3DUNet(channels=(2, 4, 8), strides=(2, 2), num_res_units=0)
    mask = live(network).predict(np.random.default_rng(0).random((5, 7, 10)))
    assert (mask.dtype, mask.shape) == (np.uint8, (5, 7, 10))


def test_probability_is_float32_in_0_to_1_of_the_shape_of_the_image(live):
    probability = live(Bright()).predict_probability(np.array([[[0.0, 0.75, 1.0]]]))
    assert (probability.dtype, probability.shape) == (np.float32, (1, 1, 3))
    np.testing.assert_allclose(probability[0, 0], 1 / (1 + np.exp([30.0, 0.0, -10.0])), rtol=1e-5)


class Leaning(nn.Module):
    """Logits that rise towards the end of each axis, and depend on the image."""

    def forward(self, image):
        z, y, x = (torch.linspace(-1, 1, size) for size in image.shape[2:])
        return image + z[:, None, None] + 2 * y[:, None] + 4 * x


# Axes (z, y, x) of the image itself and of each mirror image.
MIRRORS = ((), (2,), (1,), (0,), (1, 2), (0, 1), (0, 2), (0, 1, 2))


@pytest.mark.parametrize(("mirrors", "leaning"), [(1, (1, 2, 0)), (3, None), (7, (0, 0, 0))])
def test_probabilities_of_mirror_images_are_averaged(live, mirrors, leaning):
    image = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    turned = [np.flip(image, axes) for axes in MIRRORS[: 1 + mirrors]]
    alone = [
        np.flip(live(Leaning()).predict_probability(array), axes) for array, axes in zip(turned, MIRRORS, strict=False)
    ]
    found = live(Leaning(), mirrors=mirrors).predict_probability(image)
    np.testing.assert_allclose(found, np.mean(alone, axis=0), atol=2e-6)
    if leaning is not None:  # what leans one way and the other stands upright, up to the image
        ends = [found.take(-1, axis).mean() - found.take(0, axis).mean() for axis in range(3)]
        assert [abs(end) > 0.15 for end in ends] == [bool(lean) for lean in leaning]


def test_looks_are_all_turns_and_mirror_images_with_the_turns_next_to_the_mirror_images():
    image = torch.arange(2 * 3 * 4.0).reshape(1, 1, 2, 3, 4)
    looks = [image, *(transform.apply(image) for transform in infer.TRANSFORMS)]
    assert len({str(look.tolist()) for look in looks}) == 16
    for transform, look in zip(infer.TRANSFORMS, looks[1:], strict=True):
        assert torch.equal(transform.undo(look), image)
    turns = [image.rot90(times, (3, 4)) for times in (1, 3)]
    assert {str(look.tolist()) for look in looks[8:10]} == {str(turn.tolist()) for turn in turns}


def test_probabilities_of_all_looks_are_averaged(live):
    image = np.random.default_rng(0).random((4, 5, 6), dtype=np.float32)
    found = live(Leaning(), mirrors=15).predict_probability(image)
    looks = [np.flip(image, axes) for axes in MIRRORS]
    straight = [np.flip(live(Leaning()).predict_probability(a), axes) for a, axes in zip(looks, MIRRORS, strict=True)]
    turned = [
        np.flip(live(Leaning()).predict_probability(a.swapaxes(1, 2)).swapaxes(1, 2), axes)
        for a, axes in zip(looks, MIRRORS, strict=True)
    ]
    np.testing.assert_allclose(found, np.mean(straight + turned, axis=0), atol=2e-6)


class QuarterTurn:
    """A test-time transform of one's own, in the (y, x) plane."""

    def apply(self, image):
        return image.rot90(1, (3, 4))

    def undo(self, logits):
        return logits.rot90(-1, (3, 4))


def test_transform_of_ones_own_is_averaged_too(live, monkeypatch):
    monkeypatch.setattr(infer, "TRANSFORMS", [QuarterTurn()])
    image = np.random.default_rng(0).random((4, 6, 6), dtype=np.float32)
    straight = live(Leaning()).predict_probability(image)
    turned = live(Leaning()).predict_probability(np.rot90(image, 1, (1, 2)))
    found = live(Leaning(), mirrors=1).predict_probability(image)
    np.testing.assert_allclose(found, (straight + np.rot90(turned, -1, (1, 2))) / 2, atol=2e-6)
    with pytest.raises(InputError, match="mirrors must be 0 to 1 or null, not 2"):
        live(Leaning(), mirrors=2)


class Coarse(nn.Module):
    """Logits of the brightness, 0 where there are fewer than seven columns; notes the shapes that it is given."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, image):
        self.shapes.append(tuple(image.shape[2:]))
        return image if image.shape[-1] >= 7 else torch.zeros_like(image)


def test_probabilities_of_magnified_scans_are_averaged_on_the_grid_of_the_scan(live):
    network, image = Coarse(), np.full((4, 6, 8), 0.7, np.float32)
    found = live(network, scales=(0.5, 1.5)).predict_probability(image)
    assert network.shapes == [(4, 6, 8), (2, 3, 4), (6, 9, 12)]
    assert found.shape == image.shape
    bright = 1 / (1 + np.exp(-0.7))
    np.testing.assert_allclose(found, (2 * bright + 0.5) / 3, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.25, 2.0])
def test_magnified_look_keeps_its_place_and_its_factor_on_every_axis(factor):
    image = torch.zeros(1, 1, 20, 24, 30)
    image[..., 4:8, 8:12, 2:6] = 1
    zoom = Zoom(factor, (20, 22, 30), 8)
    look = zoom.apply(image)
    assert [size % 8 for size in look.shape[2:]] == [0, 0, 0] and min(look.shape[2:]) >= 16
    middle = torch.nonzero(look[0, 0] > 0.3).float().mean(dim=0) + 0.5
    assert (middle / factor).tolist() == pytest.approx([6, 10, 4], abs=0.5)
    back = zoom.undo(look)
    assert back.shape[2:] == (20, 22, 30)
    middle = torch.nonzero(back[0, 0] > 0.3).float().mean(dim=0)
    assert middle.tolist() == pytest.approx([5.5, 9.5, 3.5], abs=0.3)


def test_shrunk_look_is_the_mean_of_what_it_covers():
    image = torch.rand(1, 1, 12, 16, 24)
    look = Zoom((1 / 3, 0.5, 1.0), (12, 16, 24), 1).apply(image)
    torch.testing.assert_close(look, functional.avg_pool3d(image, (3, 2, 1)))


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.1, -1.0, float("nan")])
def test_scale_must_be_half_to_double_and_not_1(scale):
    with pytest.raises(InputError, match=f"scales must each be 0.5 to 2 and not 1, not {scale}"):
        InferenceSettings(scales=(1.25, scale))
    with pytest.raises(InputError, match="scales must differ"):
        InferenceSettings(scales=(1.25, 1.25))


class Counting(nn.Module):
    """Logits of the brightness alone, up to a lean; counts the images it is given."""

    def __init__(self, lean=0.0):
        super().__init__()
        self.lean, self.seen = lean, []

    def forward(self, image):
        self.seen += list(image[:, 0])
        return 10 * image - 8 + self.lean * torch.linspace(-1, 1, image.shape[-1])


def spotted(*spots):
    """Image (24, 24, 24) of air with bright voxels."""
    image = np.zeros((24, 24, 24), np.float32)
    for spot in spots:
        image[tuple(spot)] = 1
    return image


def test_window_looks_again_at_spots_in_their_middle_and_in_mirror_images(live):
    network = Counting()
    live(network, window=(8, 8, 8)).predict_probability(spotted((5, 12, 15)))
    first = len(network.seen)
    live(network, window=(8, 8, 8), mirrors=3).predict_probability(spotted((5, 12, 15)))
    again = network.seen[2 * first :]
    assert [np.argwhere(np.asarray(window)).tolist() for window in again] == [
        [[4, 4, 4]],
        [[4, 4, 3]],
        [[4, 3, 4]],
        [[3, 4, 4]],
    ]


def test_all_looks_at_a_spot_count_alike_and_what_is_no_spot_stays(live):
    def probability(image, mirrors):
        return live(Counting(1.0), window=(9, 9, 9), mirrors=mirrors).predict_probability(image)

    once, again = (probability(spotted((12, 12, 14)), mirrors) for mirrors in (0, 2))
    in_the_middle = 1 / (1 + np.exp(-2))  # where the network leans to no side
    assert abs(once[12, 12, 14] - in_the_middle) > 0.01
    assert again[12, 12, 14] == pytest.approx((once[12, 12, 14] + 3 * in_the_middle) / 4, abs=1e-6)
    changed = np.argwhere(once != again)
    assert (changed.min(axis=0) >= (8, 8, 10)).all() and (changed.max(axis=0) <= (16, 16, 18)).all()
    np.testing.assert_array_equal(probability(spotted(), 2), probability(spotted(), 0))


def test_window_looks_again_everywhere_if_told_to(live):
    network = Counting(1.0)
    once = live(network, window=(8, 8, 8)).predict_probability(spotted())
    windows = len(network.seen)
    again = live(network, window=(8, 8, 8), mirrors=1, scales=(0.5,), everywhere=True).predict_probability(spotted())
    assert len(network.seen) == windows + 3 * windows
    assert (once != again).any()
    network.seen.clear()
    live(network, window=(8, 8, 8), scales=(0.5, 1.5)).predict_probability(spotted((12, 12, 12)))
    assert [tuple(window.shape) for window in network.seen[windows:]] == [(8, 8, 8), (4, 4, 4), (12, 12, 12)]


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({"window": (8, 8, 8), "mirrors": 3}, [(4, 8, 8, 8)]),
        ({"window": (8, 8, 8), "mirrors": 5, "scales": (0.5,)}, [(4, 8, 8, 8), (2, 8, 8, 8), (1, 4, 4, 4)]),
        ({"window": (8, 8, 12), "mirrors": 8}, [(4, 8, 8, 12)] * 2 + [(1, 8, 12, 8)]),  # the last is a quarter turn
        ({"window": (8, 8, 8), "mirrors": 1, "everywhere": True}, [(4, 8, 8, 8)] * 14),
        ({"mirrors": 2}, [(1, 24, 24, 24)] * 3),
    ],
    ids=["windows", "many", "turned", "everywhere", "whole scans"],
)
def test_looks_at_windows_go_to_the_network_in_batches_and_those_at_whole_scans_one_by_one(
    monkeypatch, settings, batches
):
    class Watching(Counting):
        def forward(self, image):
            self.seen.append((len(image), *image.shape[2:]))
            return 10 * image - 8 + torch.linspace(-1, 1, image.shape[-1])

    network = Watching()
    image, settings = spotted((12, 12, 14)), InferenceSettings(**settings)
    predictor = Predictor(network, settings, "cpu", mixed_precision=False)
    probability = predictor.predict_probability(image)
    assert network.seen[-len(batches) :] == batches
    monkeypatch.setattr(infer, "WINDOW_BATCH", 1)
    network.seen.clear()
    np.testing.assert_allclose(predictor.predict_probability(image), probability, atol=1e-6)
    assert {count for count, *_ in network.seen} == {1}


def test_no_look_goes_beyond_the_box(live):
    network = Counting()
    inferencer = live(network, window=(8, 8, 8), mirrors=1)
    probability = inferencer.predictor.predict_probability(spotted((2, 3, 4), (2, 5, 4)), Box((0, 0, 0), (12, 4, 20)))
    assert (probability[12:] < 1e-8).all() and (probability[:, 4:] < 1e-8).all()
    assert all(not window[:, 4:].any() for window in network.seen[-2:])


def test_wide_spot_is_looked_at_in_parts_and_no_scan_more_often_than_it_may_have_candidates(live):
    network = Counting()
    image = spotted()
    image[10:12, 10:12, 2:22] = 1
    inferencer = live(network, window=(8, 8, 8), mirrors=1)
    inferencer.predict_probability(image)
    boxes = infer._spots(image, np.array([4, 4, 4]))
    assert boxes == [Box((10, 10, x), (12, 12, x + 4)) for x in (2, 6, 10, 14, 18)]
    network.seen.clear()
    inferencer.predict_probability(spotted(*3 * np.argwhere(np.ones((8, 8, 8)))))
    assert len(network.seen) == 4**3 + 2 * MAX_CANDIDATES


class Changing(nn.Module):
    """Gives bright voxels another probability in each image that it looks at."""

    def __init__(self, *probabilities):
        super().__init__()
        self.left = list(probabilities)

    def forward(self, image):
        logits = torch.logit(torch.tensor([self.left.pop(0) for _ in image]))[:, None, None, None, None]
        return torch.where(image > 0, logits, -10.0)


@pytest.mark.parametrize("again", [(0.2, 0.4, 0.6), (0.6, 0.2, 0.4)])
def test_looks_at_neighbouring_spots_count_alike_in_any_order(live, monkeypatch, again):
    monkeypatch.setattr(infer, "LOOK_SIGMA", 1e3)  # a look counts the same all over its window
    network = Changing(0.9, *np.repeat(again, 2))
    image = spotted((12, 12, 3), (12, 12, 12), (12, 12, 20))
    probability = live(network, window=(24, 24, 24), mirrors=1).predict_probability(image)
    assert not network.left
    assert probability[12, 12, 12] == pytest.approx((0.9 + 2 * sum(again)) / 7, abs=1e-4)


def test_likeliest_spot_is_looked_at_first():
    probability = np.zeros((9, 9, 9))
    probability[1, 1, 1], probability[7, 7, 7], probability[1, 7, 1] = 0.5, 0.9, 0.05
    assert [box.lower for box in infer._spots(probability, np.full(3, 4))] == [(7, 7, 7), (1, 1, 1)]


def test_wide_spot_leaves_looks_for_the_others():
    probability = np.zeros((60, 60, 60))
    probability[0], probability[0, 0, 0] = 0.12, 0.6
    for place in (20, 30, 40):
        probability[place, place, place] = 0.5
    lower = [box.lower for box in infer._spots(probability, np.full(3, 4))]
    assert len(lower) == MAX_CANDIDATES and lower[0][0] == 0
    assert sorted(lower[1:4]) == [(20, 20, 20), (30, 30, 30), (40, 40, 40)]


def test_further_look_at_a_small_array_sees_air_around_it_as_the_first_one(live):
    network = Counting()
    live(network, window=(32, 32, 32), mirrors=1).predict_probability(spotted((2, 3, 4)))
    assert {tuple(window.shape) for window in network.seen} == {(32, 32, 32)}


def test_wholly_empty_map_has_no_spots():
    assert not infer._spots(np.zeros((4, 4, 4)), np.full(3, 2))


def test_spot_wider_than_half_a_window_is_looked_at_in_a_wider_one(live, monkeypatch):
    network, wide = Counting(), spotted((2, 3, 4))
    wide[10:12, 8:14, 4:14] = 1
    live(network, window=(8, 8, 8)).predict_probability(wide)
    assert [tuple(window.shape) for window in network.seen[-2:]] == [(8, 8, 8), (24, 24, 24)]  # the spot is in no other
    network.seen.clear()
    live(network, window=(8, 8, 8), mirrors=1).predict_probability(wide)
    assert sorted(tuple(window.shape) for window in network.seen[-4:]) == [(8, 8, 8)] * 2 + [(24, 24, 24)] * 2
    monkeypatch.setattr(infer, "WIDEST_WINDOW", 16)
    network.seen.clear()
    live(network, window=(8, 8, 8), mirrors=1, everywhere=True).predict_probability(wide)
    assert [tuple(window.shape) for window in network.seen[-5:]] == [(8, 8, 8)] + [(16, 16, 16)] * 4  # in two parts
    monkeypatch.setattr(infer, "MOST_WIDE", 0)
    network.seen.clear()
    live(network, window=(8, 8, 8)).predict_probability(wide)
    assert {tuple(window.shape) for window in network.seen} == {(8, 8, 8)}


@pytest.mark.parametrize(("width", "is_wide"), [(24, False), (30, True), (40, True), (50, True)])
def test_wide_spot_of_a_piece_is_looked_at_in_as_wide_a_window_as_fits(width, is_wide):
    network, image = Counting(), np.zeros((64, 64, 64), np.float32)
    image[30:32, 30:32, 4 : 4 + width] = 1
    Predictor(network, InferenceSettings(window=(48, 48, 48)), "cpu", mixed_precision=False).predict_probability(image)
    assert ((64, 64, 64) in {tuple(window.shape) for window in network.seen}) == is_wide


def test_window_of_a_wide_spot_counts_alike_beside_a_first_look_and_one_everywhere(monkeypatch):
    monkeypatch.setattr(infer, "LOOK_SIGMA", 1e3)  # a look counts the same all over its window
    wide = spotted()
    wide[10:12, 8:14, 4:14] = 1

    class Sized(nn.Module):
        def forward(self, image):
            return torch.where(image > 0, torch.logit(torch.tensor(0.3 if image.shape[-1] > 8 else 0.8)), -10.0)

    for settings in ({}, {"mirrors": 3, "everywhere": True}):
        settings = InferenceSettings(window=(8, 8, 8), **settings)
        probability = Predictor(Sized(), settings, "cpu", mixed_precision=False).predict_probability(wide)
        assert probability[11, 11, 9] == pytest.approx(
            (0.8 + infer.WIDE_WEIGHT * 0.3) / (1 + infer.WIDE_WEIGHT), abs=1e-4
        )


class Cut(nn.Module):
    """Finds what is bright, but for what lies in the outer sixth of its window."""

    def forward(self, image):
        logits = torch.full_like(image, -10.0)
        inside = (..., *(slice(size // 6, size - size // 6) for size in image.shape[2:]))
        logits[inside] = 20 * image[inside] - 10
        return logits


def test_nodule_as_wide_as_a_window_is_whole(live, monkeypatch):
    image = np.zeros((64, 64, 64), np.float32)
    image[20:44, 20:44, 20:44] = 1
    np.testing.assert_array_equal(live(Cut(), window=(24, 24, 24)).predict(image), image)
    monkeypatch.setattr(infer, "MOST_WIDE", 0)
    assert live(Cut(), window=(24, 24, 24)).predict(image).sum() < 0.9 * image.sum()


def test_checkpoint_knows_the_number_of_mirror_images(processed_dir, tmp_path):
    options = {"validation": ValidationSettings(mirrors=2), "device": "cpu", "mixed_precision": False, **TINY}
    Trainer(processed_dir, tmp_path, num_epochs=1, **options).train()
    path = tmp_path / "checkpoints" / "best_model.pth"
    assert NoduleInferencer(path, device="cpu").settings.mirrors == 2
    assert NoduleInferencer(path, device="cpu", mirrors=0).settings.mirrors == 0


@pytest.mark.parametrize("mirrors", [-1, 16])
def test_impossible_number_of_mirror_images_is_refused(live, mirrors):
    with pytest.raises(ValueError, match="mirrors must be 0 to 15 or null"):
        live(Nothing(), mirrors=mirrors)


def test_quarter_turns_of_voxels_that_are_no_squares_are_refused(live):
    grid = (0.7, 0.8, 1.0)
    live(Nothing(), grid_spacing=grid, mirrors=7)
    with pytest.raises(InputError, match=r"exchange x and y, along which voxels are 0\.7 and 0\.8 mm here; take 7"):
        live(Nothing(), grid_spacing=grid, mirrors=8)


def test_everywhere_without_further_looks_is_told(live, caplog):
    live(Nothing(), window=(8, 8, 8), everywhere=True, mirrors=1)
    assert "without effect" not in caplog.text
    live(Nothing(), window=(8, 8, 8), everywhere=True)
    assert "everywhere without effect: it needs mirrors or scales" in caplog.text


def test_size_that_does_not_fit_is_filled_up_with_air(live):
    torch.manual_seed(0)
    network = LungNodule3DUNet(**SMALL).eval()
    image = np.random.default_rng(0).random((3, 4, 5), dtype=np.float32)
    filled = np.zeros((4, 4, 6), np.float32)
    filled[:3, :, :5] = image
    with torch.no_grad():
        expected = torch.sigmoid(network(torch.from_numpy(filled)[None, None]))[0, 0, :3, :, :5].numpy()
    np.testing.assert_allclose(live(network).predict_probability(image), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_any_float_type_comes_in(live, dtype):
    image = np.array([[[0.25, 0.875], [1.0, 0.5]]])
    np.testing.assert_array_equal(live(Bright()).predict(image.astype(dtype)), [[[0, 1], [1, 0]]])


def test_stored_array_that_cannot_be_written_to_comes_in_without_a_warning(live, recwarn):
    image = np.full((1, 1, 2), 0.875, np.float32)
    image.setflags(write=False)
    live(Bright()).predict(image)
    assert not recwarn


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_voxel_that_just_reaches_the_threshold_is_nodule(live, threshold):
    inferencer = live(Bright(), threshold=threshold)
    below, above = np.nextafter(np.float32(threshold), np.float32([0, 1]))
    probability = np.array([below, threshold, above], np.float32).reshape(1, 1, 3)
    mask = inferencer.segment(probability, Geometry((1, 1, 3), (0.0, 0.0, 0.0), UNIT)).mask
    np.testing.assert_array_equal(mask, [[[0, 1, 1]]])


def test_prediction_is_the_probability_at_the_threshold(live):
    image = np.linspace(0, 1, 60, dtype=np.float32).reshape(3, 4, 5)
    inferencer = live(Bright(), threshold=0.9)
    np.testing.assert_array_equal(inferencer.predict(image), inferencer.predict_probability(image) >= 0.9)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(np.zeros((4, 4), np.float32), r"three axes \(z, y, x\), not shape \(4, 4\)", id="2-D"),
        pytest.param(np.zeros((1, 4, 4, 4), np.float32), "three axes", id="4-D"),
        pytest.param(np.zeros((4, 4, 4), np.int16), "float in .*, not int16; give raw scans to infer_scan", id="int"),
        pytest.param(np.full((4, 4, 4), -1000.0), r"not \[-1000, -1000\]; give raw scans to infer_scan", id="HU"),
        pytest.param(np.full((4, 4, 4), 1.5), r"must lie in \[0, 1\], not \[1.5, 1.5\]", id="above 1"),
        pytest.param(np.array([[[0.5, math.nan]]]), r"must lie in \[0, 1\], not \[nan, nan\]", id="NaN"),
    ],
)
def test_image_that_is_no_processed_array_is_refused(live, image, message):
    with pytest.raises(ValueError, match=message):
        live(Bright()).predict(image)


@pytest.mark.parametrize("threshold", [0, 1, -0.1, math.nan])
def test_threshold_outside_of_0_and_1_is_refused(live, threshold):
    with pytest.raises(ValueError, match="threshold must be between 0 and 1"):
        live(Bright(), threshold=threshold)


def test_missing_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist; run python train\.py first"):
        NoduleInferencer(tmp_path / "none.pth", device="cpu")


def random_states():
    """States of Python's, numpy's legacy and torch's generator."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_prediction_leaves_random_states_as_they_were(live):
    inferencer = live(LungNodule3DUNet(**SMALL).train())
    before = random_states()
    inferencer.predict(np.zeros((4, 4, 4)))
    assert random_states() == before


@pytest.mark.parametrize("training", [True, False])
def test_prediction_leaves_the_training_mode_as_it_was(live, training):
    network = LungNodule3DUNet(**SMALL).train(training)
    live(network).predict(np.zeros((4, 4, 4)))
    assert {module.training for module in network.modules()} == {training}


def test_prediction_leaves_a_frozen_layer_frozen(live):
    network = LungNodule3DUNet(**SMALL).train()
    frozen = next(module for module in network.modules() if isinstance(module, nn.BatchNorm3d)).eval()
    live(network).predict(np.zeros((4, 4, 4)))
    assert network.training and not frozen.training


def test_prediction_leaves_weights_and_statistics_as_they_were(live):
    network = LungNodule3DUNet(**SMALL).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    live(network).predict(np.random.default_rng(0).random((4, 4, 4)))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_prediction_of_a_network_in_training_uses_no_dropout(live):
    inferencer = live(LungNodule3DUNet(**(SMALL | {"dropout": 0.5})).train())
    image = np.random.default_rng(0).random((4, 4, 4))
    np.testing.assert_array_equal(inferencer.predict_probability(image), inferencer.predict_probability(image))


# ----------------------------------------------------------------------------------------------------- sliding window


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 9, 14), (2, 2, 2)])
def test_window_gives_what_the_whole_image_gives_where_each_voxel_stands_alone(live, shape):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    whole, slid = (live(Bright(), window=window).predict_probability(image) for window in (None, (4, 4, 4)))
    np.testing.assert_allclose(slid, whole, atol=1e-4)


def test_network_sees_one_window_at_a_time(live):
    shapes = set()

    class Watching(Bright):
        def forward(self, image):
            shapes.add(tuple(image.shape[2:]))
            return super().forward(image)

    live(Watching(), window=(4, 6, 8)).predict(np.zeros((9, 10, 11)))
    assert shapes == {(4, 6, 8)}


FIRST_LOOKS = [  # array, windows of the first look that are at most 16 wide, for patches of 8
    ((26, 16, 20), (16, 16, 12)),  # two windows, one, two
    ((6, 10, 90), (8, 10, 16)),
]


@pytest.mark.parametrize(("shape", "windows"), FIRST_LOOKS)
def test_first_look_takes_as_few_windows_as_the_widest_would_and_further_looks_those_of_the_patches(shape, windows):
    network, image = Counting(), np.zeros(shape, np.float32)
    settings = InferenceSettings(window=(8, 8, 8), mirrors=1, first_window=(16, 16, 16))
    Predictor(network, settings, "cpu", mixed_precision=False).predict_probability(image)
    assert {tuple(window.shape) for window in network.seen} == {windows}
    counts = -(-(np.maximum(shape, 8) - windows) // (0.75 * np.asarray(windows))) + 1
    assert len(network.seen) == counts.prod()
    image[2, 3, 4] = 1
    network.seen.clear()
    Predictor(network, settings, "cpu", mixed_precision=False).predict_probability(image)
    assert [tuple(window.shape) for window in network.seen[-2:]] == [(8, 8, 8)] * 2


def test_windows_of_the_first_look_are_sizes_that_the_network_takes_and_hold_no_air():
    network = LungNodule3DUNet(channels=(2, 4, 8, 16), strides=(2, 2, 2), num_res_units=0)
    settings = InferenceSettings(window=(48, 48, 48), first_window=(96, 96, 96))
    predictor = Predictor(network, settings, "cpu")
    assert network.divisor == 8
    assert predictor._first_window((51, 30, 90)) == [48, 48, 56]
    assert predictor._first_window((240, 196, 267)) == [96, 80, 88]


def test_network_without_a_first_window_looks_in_those_of_its_patches():
    predictor = Predictor(Bright(), InferenceSettings(window=(4, 6, 8)), "cpu")
    for shape in ((3, 5, 7), (4, 6, 8), (20, 30, 41)):
        assert predictor._first_window(shape) == [4, 6, 8]


def test_window_slides_over_the_box_alone(live):
    image = np.ones((6, 8, 10), np.float32)
    probability = live(Bright(), window=(2, 2, 2)).predictor.predict_probability(image, Box((1, 2, 3), (4, 6, 8)))
    expected = np.zeros(image.shape)
    expected[1:4, 2:6, 3:8] = 1
    np.testing.assert_allclose(probability, expected, atol=1e-4)


def test_probability_outside_the_box_is_zero_to_eight_digits(live):
    box = Box((1, 1, 1), (3, 3, 3))
    probability = live(Bright(), window=(2, 2, 2)).predictor.predict_probability(np.ones((4, 4, 4)), box)
    probability[1:3, 1:3, 1:3] = 0
    assert probability.max() < 1e-8


def test_window_without_a_box_slides_over_the_whole_image(live):
    image = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    inferencer = live(Bright(), window=(4, 4, 4))
    whole = inferencer.predictor.predict_probability(image, Box((0, 0, 0), (5, 6, 7)))
    np.testing.assert_array_equal(inferencer.predict_probability(image), whole)


def test_network_never_sees_more_windows_at_a_time_than_fit(live):
    counts = []

    class Watching(Bright):
        def forward(self, image):
            counts.append(len(image))
            return super().forward(image)

    live(Watching(), window=(4, 4, 4)).predict(np.zeros((20, 20, 20)))
    assert sum(counts) > 50
    assert max(counts) == WINDOW_BATCH


def test_checkpoint_of_whole_scans_takes_each_scan_whole(trained):
    assert trained().settings.window is None


# ----------------------------------------------------------------------------------------------------------- nodules

ORIGIN, SPACING = (-100.0, 20.0, 5.5), (0.7, 0.8, 2.5)


@pytest.fixture
def extract(live):
    return live(Nothing()).extract_nodule_candidates


def block_mask():
    mask = np.zeros((8, 10, 12), np.uint8)
    mask[2:5, 3:7, 6:8] = 1  # centre z 3, y 4.5, x 6.5; 24 voxels
    return mask


def test_nodule_has_the_fields_of_the_brief_volume_and_probability(extract):
    (nodule,) = extract(block_mask(), ORIGIN, SPACING)
    brief = {"center_world", "center_voxel", "diameter_mm", "volume_voxels", "bbox"}
    assert set(nodule) == brief | {"volume_mm3", "probability"}


def test_center_voxel_is_x_y_z_as_floats(extract):
    (nodule,) = extract(block_mask(), ORIGIN, SPACING)
    assert nodule["center_voxel"] == pytest.approx([6.5, 4.5, 3.0])
    assert all(type(value) is float for value in nodule["center_voxel"])


def test_center_world_is_origin_plus_index_times_spacing(extract):
    (nodule,) = extract(block_mask(), ORIGIN, SPACING)
    assert nodule["center_world"] == pytest.approx([-100 + 6.5 * 0.7, 20 + 4.5 * 0.8, 5.5 + 3 * 2.5])
    assert all(type(value) is float for value in nodule["center_world"])


def test_bbox_is_half_open_z_y_x(extract):
    mask = block_mask()
    (nodule,) = extract(mask, ORIGIN, SPACING)
    z_min, z_max, y_min, y_max, x_min, x_max = nodule["bbox"]
    assert nodule["bbox"] == (2, 5, 3, 7, 6, 8)
    assert mask[z_min:z_max, y_min:y_max, x_min:x_max].sum() == mask.sum()


def test_volume_counts_voxels_and_mm3(extract):
    (nodule,) = extract(block_mask(), ORIGIN, SPACING)
    assert nodule["volume_voxels"] == 24
    assert nodule["volume_mm3"] == pytest.approx(24 * 0.7 * 0.8 * 2.5)


def test_diameter_is_that_of_the_sphere_of_equal_volume(extract):
    (nodule,) = extract(block_mask(), ORIGIN, SPACING)
    assert math.pi / 6 * nodule["diameter_mm"] ** 3 == pytest.approx(24 * 0.7 * 0.8 * 2.5)


@pytest.mark.parametrize("value", [0.0, 0.6, 1.0])
def test_probability_lies_in_0_to_1(extract, value):
    mask = np.ones((12, 30, 30), np.uint8)  # wider than whatever a score is averaged over
    (nodule,) = extract(mask, ORIGIN, SPACING, np.full(mask.shape, value, np.float32))
    assert 0 <= nodule["probability"] <= 1
    assert (nodule["probability"] > 0) == (value > 0)


@pytest.mark.parametrize("width", [2, 6, 20])
def test_size_of_a_nodule_does_not_change_its_probability(extract, width):
    mask = np.zeros((30, 30, 30), np.uint8)
    mask[4 : 4 + width, 4 : 4 + width, 4 : 4 + width] = 1
    (nodule,) = extract(mask, ORIGIN, UNIT, np.where(mask, 0.6, 0.0))
    assert nodule["probability"] == pytest.approx(0.6)


def test_surer_of_two_equal_nodules_has_the_higher_probability(extract):
    mask = np.zeros((8, 10, 60), np.uint8)
    mask[2:5, 3:7, 6:8] = mask[2:5, 3:7, 46:48] = 1
    probability = np.where(mask, 0.6, 0.0)
    probability[..., 40:] *= 1.5
    first, second = extract(mask, ORIGIN, SPACING, probability)
    assert (first["center_voxel"][0], second["center_voxel"][0]) == pytest.approx((46.5, 6.5))
    assert first["probability"] > second["probability"]


@pytest.mark.parametrize("in_plane_mm", [0.5, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("slices_mm", [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0])
def test_score_of_a_ball_does_not_hang_on_where_it_lies_between_the_slices(slices_mm, in_plane_mm):
    spacing = (min(in_plane_mm, slices_mm),) * 2 + (slices_mm,)
    offsets = [(0, 0, 0), *np.random.default_rng(0).random((20, 3)), (0, 0, 0.5), (0.5, 0.5, 0.5), (0, 0.5, 0)]
    for diameter_mm in (4.0, 5.0, 8.0, 12.0, 20.0):
        shape = tuple(round((diameter_mm + 8) / step) + 2 for step in spacing[::-1])
        middle = np.multiply(shape[::-1], spacing) / 2
        scores = []
        for offset in offsets:
            ball = ball_mask(spacing, [middle + np.multiply(offset, spacing)], diameter_mm, shape)
            probability = np.where(ball, np.float32(0.9), np.float32(0))
            geometry = Geometry(shape, (0.0, 0.0, 0.0), spacing)
            found = find_candidates(probability, geometry, 0.5, smallest_mm3=0)
            scores += [nodule.score for nodule in found.nodules]
        assert len(scores) > 8
        assert max(scores) - min(scores) <= 0.05
        assert max(scores) == pytest.approx(0.9, abs=0.02)


def test_vessel_has_a_lower_probability_than_a_ball(extract):
    probability = np.zeros((24, 24, 60), np.float32)
    probability[ball_mask(UNIT, [(12.0, 12.0, 12.0)], 10.0, probability.shape)] = 1
    probability[12:14, 12:14, 30:50] = 1
    ball, vessel = extract(probability, (0, 0, 0), UNIT, probability)
    assert (ball["volume_voxels"] > 500, vessel["volume_voxels"]) == (True, 80)
    assert ball["probability"] > 3 * vessel["probability"]


def test_spot_that_fades_out_has_a_lower_probability_than_a_sharp_one(extract):
    probability = np.zeros((12, 12, 40), np.float32)
    probability[5:8, 5:8, 5:8] = probability[5:8, 5:8, 30:33] = 0.9
    probability[4:9, 4:9, 29:34] = np.maximum(probability[4:9, 4:9, 29:34], 0.1)
    sharp, fading = extract(probability >= 0.5, (0, 0, 0), UNIT, probability)
    assert (sharp["center_voxel"][0], fading["center_voxel"][0]) == (6, 31)
    assert sharp["probability"] == pytest.approx(0.9)
    assert fading["probability"] == pytest.approx((27 * 0.9 + 54 * 0.1) / 81)


def test_large_spot_of_which_much_lies_around_has_no_lower_probability_than_a_small_one(extract):
    probability = np.full((30, 30, 60), 0.1, np.float32)
    for center, radius in (((15, 15, 45), 10), ((15, 15, 10), 3)):
        offsets = np.ogrid[tuple(slice(-c, n - c) for c, n in zip(center, probability.shape, strict=True))]
        probability[sum(offset**2 for offset in offsets) <= radius**2] = 0.9
    large, small = extract(probability >= 0.5, (0, 0, 0), UNIT, probability)
    assert large["diameter_mm"] > small["diameter_mm"]
    assert large["probability"] > small["probability"]


def test_components_are_those_of_the_whole_array():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.03, 0.1, 0.3, 1.0):
        mask = rng.random((9, 5, 13)) < share
        labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
        parts = infer._components(mask)
        assert len(parts) == count
        for voxels in parts:
            (label,) = np.unique(labels[tuple(voxels.T)])
            assert len(voxels) == np.count_nonzero(labels == label)


def test_voxels_at_opposite_borders_are_no_neighbours():
    mask = np.zeros((4, 4, 4), bool)
    mask[1, 1, 3] = mask[1, 2, 0] = mask[1, 3, 2] = mask[2, 0, 0] = True  # next to each other in memory, or nearly
    assert len(infer._components(mask)) == 4


def test_probability_without_a_map_is_nan(extract):
    assert math.isnan(extract(block_mask(), ORIGIN, SPACING)[0]["probability"])


def test_single_voxel_is_a_nodule(extract):
    mask = np.zeros((3, 3, 3), np.uint8)
    mask[2, 0, 1] = 1
    (nodule,) = extract(mask, (0, 0, 0), (1, 1, 1))
    assert nodule["center_voxel"] == [1, 0, 2]
    assert nodule["bbox"] == (2, 3, 0, 1, 1, 2)


def test_voxels_that_touch_at_a_corner_are_one_nodule(extract):
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = 1
    assert sorted(nodule["volume_voxels"] for nodule in extract(mask, ORIGIN, SPACING)) == [1, 2]


def test_nodules_come_most_probable_first(extract):
    mask, probability = np.zeros((3, 3, 120), np.uint8), np.zeros((3, 3, 120))
    for start, value in ((0, 0.6), (50, 0.9), (100, 0.7)):
        mask[..., start : start + 3], probability[..., start : start + 3] = 1, value
    nodules = extract(mask, ORIGIN, SPACING, probability)
    assert [nodule["center_voxel"][0] for nodule in nodules] == pytest.approx([51, 101, 1])
    scores = [nodule["probability"] for nodule in nodules]
    assert scores == sorted(scores, reverse=True)


def test_equally_probable_nodules_come_largest_first(extract):
    mask = np.array([[[1, 0, 1, 1, 1, 0, 1, 1]]], np.uint8)
    assert [n["volume_voxels"] for n in extract(mask, ORIGIN, SPACING, np.zeros(mask.shape))] == [3, 2, 1]  # all 0


def test_nodules_without_a_map_come_largest_first(extract):
    mask = np.array([[[1, 0, 1, 1, 1, 0, 1, 1]]], np.uint8)
    assert [nodule["volume_voxels"] for nodule in extract(mask, ORIGIN, SPACING)] == [3, 2, 1]


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_mask_of_any_type_is_taken(extract, dtype):
    assert extract(block_mask().astype(dtype), ORIGIN, SPACING)[0]["volume_voxels"] == 24


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_origin_and_spacing_may_be_arrays(extract, dtype):
    (nodule,) = extract(block_mask(), np.array(ORIGIN, dtype), np.array(SPACING, dtype))
    assert nodule["center_world"] == pytest.approx([-95.45, 23.6, 13.0], rel=1e-5)


def test_empty_mask_has_no_nodules(extract):
    assert extract(np.zeros((3, 4, 5), np.uint8), ORIGIN, SPACING) == []


def test_probability_of_another_shape_is_refused(extract):
    with pytest.raises(ValueError, match=r"probability \(2, 2, 2\) and mask \(8, 10, 12\) differ"):
        extract(block_mask(), ORIGIN, SPACING, np.zeros((2, 2, 2)))


def test_mask_with_two_axes_is_refused(extract):
    with pytest.raises(ValueError, match=r"mask must have three axes \(z, y, x\), not shape \(4, 4\)"):
        extract(np.zeros((4, 4), np.uint8), ORIGIN, SPACING)


# --------------------------------------------------------------------------------------- touching nodules, candidates

UNIT = (1.0, 1.0, 1.0)


def ball_mask(spacing, centers_xyz, diameter_mm, shape_zyx, axes=(1, 1, 1)):
    """Bool (z, y, x) of balls, or of ellipsoids stretched by ``axes`` (x, y, z); the world begins at voxel 0."""
    z, y, x = np.indices(shape_zyx) * np.reshape(spacing[::-1], (3, 1, 1, 1))
    world = np.stack([x, y, z], axis=-1)
    return np.any([np.linalg.norm((world - c) / axes, axis=-1) <= diameter_mm / 2 for c in centers_xyz], axis=0)


@pytest.mark.parametrize(
    ("spacing", "shape_zyx", "axis"),
    [(UNIT, (30, 30, 30), axis) for axis in range(3)] + [((0.7, 0.7, 2.5), (12, 43, 43), axis) for axis in (0, 1)],
)
def test_two_touching_balls_are_two_nodules(extract, spacing, shape_zyx, axis):
    centers = np.full((2, 3), 14.6)
    centers[:, axis] += [-4.5, 4.5]  # balls of 10 mm
    mask = ball_mask(spacing, centers, 10.0, shape_zyx)
    nodules = extract(mask, (0, 0, 0), spacing)
    found = sorted((nodule["center_world"] for nodule in nodules), key=lambda center: center[axis])
    assert len(found) == 2
    assert (np.linalg.norm(np.subtract(found, centers), axis=1) < 1.5).all()
    assert sum(nodule["volume_voxels"] for nodule in nodules) == np.count_nonzero(mask)


@pytest.mark.parametrize("spacing", [UNIT, (0.7, 0.7, 2.5)], ids=["1 mm", "0.7 x 0.7 x 2.5 mm"])
@pytest.mark.parametrize(
    "axes", [(1, 1, 1), (1.8, 1, 1), (1, 1.8, 1), (1, 1, 1.8), (2.4, 1.2, 0.8)], ids=["ball", "x", "y", "z", "lens"]
)
def test_ball_or_ellipsoid_is_one_nodule(extract, spacing, axes):
    shape_zyx = tuple(round(30 / step) for step in spacing[::-1])
    mask = ball_mask(spacing, [(14.6, 14.6, 14.6)], 10.0, shape_zyx, axes)
    (nodule,) = extract(mask, (0, 0, 0), spacing)
    assert nodule["volume_voxels"] == np.count_nonzero(mask)


@pytest.mark.parametrize(
    "box",
    [np.s_[5:6, 5:6, 5:8], np.s_[5:6, 2:22, 2:22], np.s_[5:7, 2:22, 2:22], np.s_[4:7, 2:22, 2:22]],
    ids=["speck of 3", "plate of 1", "plate of 2", "plate of 3"],
)
def test_speck_or_flat_plate_is_one_nodule(extract, box):
    mask = np.zeros((12, 24, 24), np.uint8)
    mask[box] = 1
    assert [nodule["volume_voxels"] for nodule in extract(mask, (0, 0, 0), UNIT)] == [mask.sum()]


def test_balls_that_a_thin_bridge_joins_are_two_nodules(extract):
    mask = ball_mask(UNIT, [(9, 12, 12), (27, 12, 12)], 10.0, (24, 24, 36))
    mask[12, 12, 9:27] = 1
    assert [round(n["diameter_mm"]) for n in extract(mask, (0, 0, 0), UNIT)] == [10, 10]


def spots(shape_zyx, **values):
    """Geometry of 1 mm, and a probability of 0 with cubes of 3 voxels: name = (z, y, x, value)."""
    probability = np.zeros(shape_zyx, np.float32)
    for z, y, x, value in values.values():
        probability[z : z + 3, y : y + 3, x : x + 3] = value
    return probability, Geometry(shape_zyx, (0.0, 0.0, 0.0), UNIT)


def marks_of(found):
    """(x of the centre, whether it is in the mask) of each candidate."""
    return [(c.index_zyx[2], number > 0) for c, number in zip(found.candidates, found.numbers, strict=True)]


def test_faint_spot_is_a_candidate_and_no_nodule():
    probability, geometry = spots((9, 9, 40), sure=(3, 3, 3, 0.9), faint=(3, 3, 33, 0.3))
    assert marks_of(find_candidates(probability, geometry, 0.5)) == [(4.0, True), (34.0, False)]
    nodules = extract_nodules(probability >= 0.5, geometry, probability)
    assert [nodule.index_zyx[2] for nodule in nodules] == [4.0]


def test_faint_border_of_a_nodule_is_no_candidate_of_its_own():
    probability, geometry = spots((9, 9, 15), border=(3, 3, 6, 0.3), sure=(3, 3, 3, 0.9))
    assert marks_of(find_candidates(probability, geometry, 0.5)) == [(4.0, True)]


def test_hole_in_a_nodule_belongs_to_it():
    probability, geometry = spots((15, 15, 40), shell=(3, 3, 3, 0.9), other=(3, 3, 30, 0.9))
    probability[4, 4, 4] = 0.05
    found = find_candidates(probability, geometry, 0.5)
    assert [nodule.volume_voxels for nodule in found.nodules] == [27, 27]
    assert found.mask[4, 4, 4]


def test_what_lies_in_a_hole_is_no_nodule_of_its_own():
    inner, core = (ball_mask(UNIT, [(12, 12, 12)], size, (25, 25, 25)) for size in (14.0, 6.0))
    outer = ball_mask(UNIT, [(12, 12, 12)], 20.0, (25, 25, 25))
    probability = np.where(core | (outer & ~inner), 0.9, 0.05).astype(np.float32)
    found = find_candidates(probability, Geometry(outer.shape, (0.0, 0.0, 0.0), UNIT), 0.5)
    np.testing.assert_array_equal(found.mask, outer)
    assert len(found.nodules) == 1


def test_shell_larger_than_any_nodule_stays_hollow():
    shape, middle = (40, 40, 40), (20 * 2.0,) * 3
    spacing = (2.0, 2.0, 2.0)
    outer, inner, nodule = (ball_mask(spacing, [middle], size, shape) for size in (72.0, 64.0, 10.0))
    probability = np.where(nodule, 0.95, np.where(outer & ~inner, 0.6, 0.0)).astype(np.float32)
    found = find_candidates(probability, Geometry(shape, (0.0, 0.0, 0.0), spacing), 0.5)
    assert found.nodules[0].center_xyz == pytest.approx(middle)
    assert found.nodules[0].volume_voxels == np.count_nonzero(nodule)


def test_notch_that_opens_to_one_side_stays_open():
    probability, geometry = spots((15, 15, 15), cube=(3, 3, 3, 0.9))
    probability[3:5, 4, 4] = 0.05
    assert find_candidates(probability, geometry, 0.5).mask.sum() == 25


def test_nothing_faint_is_a_candidate():
    probability, geometry = spots((9, 9, 9), spot=(3, 3, 3, infer.CANDIDATE_THRESHOLD - 0.01))
    found = find_candidates(probability, geometry, 0.5)
    assert found.candidates == []
    assert not found.mask.any()


def test_with_a_threshold_below_that_of_candidates_all_are_nodules():
    probability, geometry = spots((9, 9, 40), first=(3, 3, 3, 0.06), second=(3, 3, 33, 0.3))
    assert marks_of(find_candidates(probability, geometry, 0.05)) == [(34.0, True), (4.0, True)]


def test_at_most_100_candidates_are_kept_those_of_the_mask_first():
    probability = np.zeros((3, 81, 81), np.float32)
    probability[1, 4::8, 4::8] = np.linspace(0.2, 0.4, 100).reshape(10, 10)
    probability[1, 4, 4] = probability[1, 12, 12] = 0.6
    probability[1, 76, :] = 0
    probability[1, 76, 8::4] = 0.15  # 19 spots, of which 10 fit
    geometry = Geometry(probability.shape, (0.0, 0.0, 0.0), (4.0, 4.0, 4.0))
    found = find_candidates(probability, geometry, 0.5)
    candidates = found.candidates
    assert len(candidates) == MAX_CANDIDATES == 100
    assert [number > 0 for number in found.numbers] == [True] * 2 + [False] * 98
    scores = [c.score for c in candidates[2:]]
    assert scores == sorted(scores, reverse=True)
    # The faintest go: 90 - 2 spots of 0.2 to 0.4, and only 10 of those of 0.15.
    assert sum(c.index_zyx[1] == 76 for c in candidates) == 10


def test_scan_has_at_most_100_marks_the_likeliest_of_a_mask_of_more_nodules():
    probability = np.zeros((3, 81, 81), np.float32)
    probability[1, 4::6, 4::6] = np.linspace(0.6, 0.99, 169).reshape(13, 13)
    found = find_candidates(probability, Geometry(probability.shape, (0.0, 0.0, 0.0), (4.0, 4.0, 4.0)), 0.5)
    marks = found.marks("1.2.3")
    assert (len(found.nodules), len(marks)) == (169, 100)
    assert marks["probability"].tolist() == sorted((n.score for n in found.nodules), reverse=True)[:100]
    assert list(marks) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]


def test_candidates_in_the_mask_are_the_nodules_of_the_mask():
    probability = np.zeros((24, 24, 60), np.float32)
    probability[ball_mask(UNIT, [(8, 12, 12), (17, 12, 12)], 10.0, probability.shape)] = 0.8
    probability[10:13, 10:13, 40:43] = 0.7
    probability[10:13, 10:13, 50:53] = 0.2
    geometry = Geometry(probability.shape, (-5.0, 3.0, 70.0), UNIT)
    found = find_candidates(probability, geometry, 0.5)
    nodules = extract_nodules(probability >= 0.5, geometry, probability)
    assert (len(found.candidates), len(nodules)) == (4, 3)
    assert found.nodules == nodules


def test_nodule_below_the_smallest_score_leaves_the_mask_and_stays_a_candidate():
    probability, geometry = spots((9, 9, 40), sure=(3, 3, 3, 0.9), doubtful=(3, 3, 33, 0.6))
    found = find_candidates(probability, geometry, 0.5)
    assert found.mask.sum() == 2 * 27
    kept = found.keep(0.7)
    assert marks_of(kept) == [(4.0, True), (34.0, False)]
    np.testing.assert_array_equal(kept.mask, probability >= 0.9)
    assert kept.candidates == found.candidates


def test_nodule_that_just_reaches_the_smallest_score_stays():
    probability, geometry = spots((9, 9, 9), spot=(3, 3, 3, 0.75))  # a cube is as round as a ball
    found = find_candidates(probability, geometry, 0.5)
    score = found.candidates[0].score
    assert score == pytest.approx(0.75)
    assert found.keep(score).mask.sum() == 27
    assert not found.keep(np.nextafter(score, 1)).mask.any()


def test_one_of_two_touching_nodules_can_leave_the_mask():
    shape = (24, 24, 30)
    left, right = (ball_mask(UNIT, [(x, 12, 12)], 10.0, shape) for x in (8, 17))
    probability = np.where(left, 0.95, np.where(right, 0.6, 0.0)).astype(np.float32)
    geometry = Geometry(shape, (0.0, 0.0, 0.0), UNIT)
    found = find_candidates(probability, geometry, 0.5)
    assert len(found.nodules) == 2
    kept = found.keep(found.nodules[0].score)
    assert len(kept.nodules) == 1
    assert kept.mask[12, 12, 8] and not kept.mask[12, 12, 18]


@pytest.mark.parametrize("min_score", [-0.1, 1.1, math.nan])
def test_smallest_score_outside_of_0_to_1_is_refused(live, min_score):
    with pytest.raises(ValueError, match="min_score must be 0 to 1 or null"):
        live(Bright(), min_score=min_score)


# ----------------------------------------------------------------------------------------------------- which scans

PARTS = ("train", "validation", "test")


def parts_of(run_dir):
    """{series UID: part} of the split beside a checkpoint."""
    split = json.loads((run_dir / "checkpoints" / "split.json").read_text())
    return {uid: part for part in PARTS for uid in split[part]}


def test_validation_scans_are_chosen_and_named_so(run_dir, processed_dir):
    split = json.loads((run_dir / "checkpoints" / "split.json").read_text())
    chosen = choose_scans(processed_dir, run_dir / "checkpoints" / "best_model.pth", "validation")
    assert chosen == dict.fromkeys(split["validation"], "validation")


def test_all_scans_are_marked_with_their_part(run_dir, processed_dir):
    chosen = choose_scans(processed_dir, run_dir / "checkpoints" / "best_model.pth", "all")
    assert chosen == parts_of(run_dir)
    assert len(chosen) == 4


def test_test_scans_are_those_of_the_fold_that_was_held_out(fold_run, processed_dir):
    chosen = choose_scans(processed_dir, fold_run / "checkpoints" / "best_model.pth", "test")
    assert chosen == {read_processed_list(processed_dir)[2]: "test"}


def test_training_without_a_fold_has_no_test_scans(run_dir, processed_dir):
    with pytest.raises(ValueError, match="has none of the test scans"):
        choose_scans(processed_dir, run_dir / "checkpoints" / "best_model.pth", "test")


def test_new_scans_are_those_of_no_part(processed_dir, tmp_path):
    first, second, third, fourth = read_processed_list(processed_dir)
    split = {"train": [first], "validation": ["1.2.3"], "test": [third], "fold": 2}
    (tmp_path / "split.json").write_text(json.dumps(split))
    chosen = choose_scans(processed_dir, tmp_path / "model.pth", "new")
    assert chosen == {second: "new", fourth: "new"}


def test_split_of_an_earlier_version_has_no_test_scans(processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    (tmp_path / "split.json").write_text(json.dumps({"train": uids[1:], "validation": uids[:1]}))
    assert list(choose_scans(processed_dir, tmp_path / "model.pth", "all").values()) == ["validation"] + ["train"] * 3


def test_all_scans_without_a_split_are_of_unknown_part(processed_dir, tmp_path):
    assert set(choose_scans(processed_dir, tmp_path / "model.pth", "all").values()) == {"unknown"}


def test_validation_scans_without_a_split_are_an_error(processed_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"split\.json does not exist"):
        choose_scans(processed_dir, tmp_path / "model.pth", "validation")


def test_folder_without_scans_of_the_subset_is_an_error(processed_dir, tmp_path):
    (tmp_path / "split.json").write_text('{"train": [], "validation": ["1.2.3"]}')
    with pytest.raises(ValueError, match=r"has none of the validation scans .*; name another data_dir or subset"):
        choose_scans(processed_dir, tmp_path / "model.pth", "validation")


def test_unknown_subset_is_refused(processed_dir, tmp_path):
    with pytest.raises(ValueError, match="subset must be one of validation, test, train, all, new, not 'training'"):
        choose_scans(processed_dir, tmp_path / "model.pth", "training")


# ---------------------------------------------------------------------------------------------------- infer_dataset


@pytest.fixture(scope="module")
def dataset_run(run_dir, processed_dir, tmp_path_factory):
    """All scans of the data set with the nodule of Block in each: (output folder, returned table)."""
    folder = tmp_path_factory.mktemp("inference")
    path = run_dir / "checkpoints" / "best_model.pth"
    inferencer = NoduleInferencer(path, folder, "cpu", mixed_precision=False)
    inferencer.predictor.model = Block()
    return folder, inferencer.infer_dataset(processed_dir, "all")


def test_all_files_of_the_brief_are_written(dataset_run, processed_dir):
    folder, _ = dataset_run
    for uid in read_processed_list(processed_dir):
        for name in (f"predicted_masks/{uid}.npy", f"visualizations/{uid}.png", f"{uid}_nodules.npy"):
            assert (folder / name).is_file()
    assert (folder / "inference_summary.npy").is_file()


def test_no_temporary_file_is_left(dataset_run):
    assert not [path for path in dataset_run[0].rglob("*") if path.name.startswith(".")]


def test_predicted_mask_is_what_the_network_found(dataset_run, processed_dir):
    folder, _ = dataset_run
    expected = np.zeros((32, 48, 48), np.uint8)
    expected[10:14, 20:25, 20:26] = 1
    mask = np.load(folder / "predicted_masks" / f"{read_processed_list(processed_dir)[0]}.npy")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


def test_picture_opens_and_is_not_empty(dataset_run, processed_dir):
    folder, _ = dataset_run
    picture = matplotlib.image.imread(folder / "visualizations" / f"{read_processed_list(processed_dir)[0]}.png")
    assert picture.ndim == 3 and min(picture.shape[:2]) > 300
    assert picture.std() > 0.05


def test_nodules_file_opens_as_the_brief_opens_one(dataset_run, run_dir, processed_dir):
    folder, _ = dataset_run
    grid_spacing = tuple(load_checkpoint(run_dir / "checkpoints" / "best_model.pth").inference.grid_spacing)
    uid = read_processed_list(processed_dir)[0]
    (nodule,) = np.load(folder / f"{uid}_nodules.npy", allow_pickle=True).item()
    metadata = np.load(processed_dir / f"{uid}_metadata.npy", allow_pickle=True).item()
    index = np.array([22.5, 22.0, 11.5])
    assert nodule["center_voxel"] == pytest.approx(index)
    assert nodule["center_world"] == pytest.approx(np.array(metadata["origin"]) + index * metadata["spacing"])
    assert nodule["bbox"] == (10, 14, 20, 25, 20, 26)
    probability = torch.sigmoid(Block()(torch.zeros(1, 1, 32, 48, 48)))[0, 0].numpy()
    geometry = read_processed(processed_dir, uid).geometry
    (expected,) = find_candidates(probability, geometry, 0.5, grid_spacing).nodules
    assert nodule["probability"] == pytest.approx(expected.score)
    assert 0 < nodule["probability"] <= 1


def test_nodules_table_says_what_the_nodules_file_says(dataset_run, processed_dir):
    folder, _ = dataset_run
    uid = read_processed_list(processed_dir)[0]
    (nodule,) = np.load(folder / f"{uid}_nodules.npy", allow_pickle=True).item()
    (row,) = pd.read_csv(folder / f"{uid}_nodules.csv", dtype={"seriesuid": str}).to_dict("records")
    assert [row["coordX"], row["coordY"], row["coordZ"]] == pytest.approx(nodule["center_world"])
    assert [row["voxelX"], row["voxelY"], row["voxelZ"]] == pytest.approx(nodule["center_voxel"])
    for name in ("probability", "diameter_mm", "volume_mm3", "volume_voxels"):
        assert row[name] == pytest.approx(nodule[name])


def test_candidates_have_the_columns_of_luna16_and_one_row_a_nodule(dataset_run, processed_dir):
    table = pd.read_csv(dataset_run[0] / "candidates.csv", dtype={"seriesuid": str})
    assert list(table) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    assert table["seriesuid"].tolist() == read_processed_list(processed_dir)


def test_candidates_file_has_faint_spots_that_the_nodules_file_has_not(trained, processed_dir):
    class BlockAndFaint(Block):
        def forward(self, image):
            logits = super().forward(image)
            logits[..., 20:24, 10:14, 36:40] = -1  # p = 0.27
            return logits

    inferencer = trained(BlockAndFaint())
    (uid,) = inferencer.infer_dataset(processed_dir)["seriesuid"]
    assert len(pd.read_csv(inferencer.output_dir / f"{uid}_nodules.csv")) == 1
    assert len(pd.read_csv(inferencer.output_dir / "candidates.csv")) == 2


def test_summary_table_has_a_row_a_scan_with_its_part(dataset_run, run_dir):
    folder, returned = dataset_run
    table = pd.read_csv(folder / "inference_summary.csv", dtype={"seriesuid": str})
    pd.testing.assert_frame_equal(table, returned, check_dtype=False)
    assert dict(zip(table["seriesuid"], table["part"], strict=True)) == parts_of(run_dir)
    assert table["nodules"].tolist() == [1, 1, 1, 1]


def test_summary_file_holds_the_nodules_of_each_scan(dataset_run, processed_dir):
    summary = np.load(dataset_run[0] / "inference_summary.npy", allow_pickle=True).item()
    assert list(summary["scans"]) == read_processed_list(processed_dir)
    assert all(len(scan["nodules"]) == 1 for scan in summary["scans"].values())
    assert summary["threshold"] == 0.5


def test_only_validation_scans_are_inferred_by_default(trained, run_dir, processed_dir):
    table = trained(Nothing()).infer_dataset(processed_dir)
    split = json.loads((run_dir / "checkpoints" / "split.json").read_text())
    assert table["seriesuid"].tolist() == split["validation"]


def test_scan_without_a_finding_has_empty_tables_and_a_picture(trained, processed_dir):
    inferencer = trained(Nothing())
    (uid,) = inferencer.infer_dataset(processed_dir)["seriesuid"]
    assert pd.read_csv(inferencer.output_dir / f"{uid}_nodules.csv").empty
    assert pd.read_csv(inferencer.output_dir / "candidates.csv").empty
    assert np.load(inferencer.output_dir / f"{uid}_nodules.npy", allow_pickle=True).item() == []
    assert (inferencer.output_dir / "visualizations" / f"{uid}.png").stat().st_size > 1000


def test_results_of_another_threshold_are_not_mixed(trained, processed_dir):
    trained(Nothing()).infer_dataset(processed_dir)
    with pytest.raises(FileExistsError, match=r"holds results of .* at threshold 0\.5, .*overwrite=True"):
        trained(Nothing(), threshold=0.6).infer_dataset(processed_dir)


def test_results_of_another_smallest_score_are_not_mixed(trained, processed_dir):
    trained(Nothing(), min_score=0.25).infer_dataset(processed_dir)
    with pytest.raises(FileExistsError, match=r"min_score 0\.25 and 0 mirrors \(what differs: min_score\); name"):
        trained(Nothing(), min_score=0.5).infer_dataset(processed_dir)


def test_results_of_another_checkpoint_are_not_mixed(trained, run_dir, processed_dir, tmp_path):
    trained(Nothing()).infer_dataset(processed_dir)
    shutil.copytree(run_dir / "checkpoints", tmp_path / "copy")
    path = tmp_path / "copy" / "best_model.pth"
    save_checkpoint(path, replace(load_checkpoint(path), epoch=7))  # other bytes
    other = NoduleInferencer(path, trained().output_dir, "cpu", min_score=0.0, mixed_precision=False)
    with pytest.raises(FileExistsError, match="holds results of"):
        other.infer_dataset(processed_dir)


def test_same_checkpoint_and_threshold_may_write_again(trained, processed_dir):
    trained(Nothing()).infer_dataset(processed_dir)
    assert len(trained(Nothing()).infer_dataset(processed_dir)) == 1


def test_overwrite_takes_the_place_of_other_results(trained, processed_dir):
    trained(Nothing()).infer_dataset(processed_dir)
    trained(Nothing(), threshold=0.6, overwrite=True).infer_dataset(processed_dir)
    summary = np.load(trained().output_dir / "inference_summary.npy", allow_pickle=True).item()
    assert summary["threshold"] == 0.6


def test_overwrite_leaves_nothing_of_other_results(trained, processed_dir, tmp_path):
    trained(Nothing()).infer_scan(write_chest(tmp_path / "chest.mhd"))
    inferencer = trained(Nothing(), threshold=0.6, overwrite=True)
    (uid,) = inferencer.infer_dataset(processed_dir)["seriesuid"]
    assert [path.name for path in inferencer.output_dir.glob("*_nodules.csv")] == [f"{uid}_nodules.csv"]


def test_data_prepared_with_other_settings_is_refused(trained, processed_dir, tmp_path):
    shutil.copytree(processed_dir, tmp_path / "other")
    for path in (tmp_path / "other").glob("*_metadata.json"):
        metadata = json.loads(path.read_text())
        metadata["preprocessing"]["hu_max"] = 500.0
        path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"preprocessed otherwise .*hu_max: 500\.0 instead of 400\.0"):
        trained(Nothing()).infer_dataset(tmp_path / "other")


def test_results_of_other_scans_of_the_same_checkpoint_are_not_mixed(trained, processed_dir, tmp_path):
    trained(Nothing()).infer_dataset(processed_dir)
    refusal = rf"holds results of .*, of the validation scans of {processed_dir} \(what differs: .*\); name another"
    with pytest.raises(FileExistsError, match=refusal):
        trained(Nothing()).infer_dataset(processed_dir, "all")
    shutil.copytree(processed_dir, tmp_path / "copy")
    with pytest.raises(FileExistsError, match=refusal):
        trained(Nothing()).infer_dataset(tmp_path / "copy")
    with pytest.raises(FileExistsError, match=refusal):
        trained(Nothing()).infer_scan(write_chest(tmp_path / "chest.mhd"))


def test_raw_scans_and_a_data_set_are_not_mixed(trained, processed_dir, tmp_path):
    trained(Nothing()).infer_scan(write_chest(tmp_path / "chest.mhd"))
    with pytest.raises(FileExistsError, match=r"holds results of .*, of single scans \(what differs: .*\); name"):
        trained(Nothing()).infer_dataset(processed_dir)


def test_results_say_whose_they_are(dataset_run, run_dir, processed_dir):
    path = run_dir / "checkpoints" / "best_model.pth"
    for name in ("inference.json", "inference_summary.json"):
        origin = json.loads((dataset_run[0] / name).read_text())
        assert origin["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (origin["threshold"], origin["mirrors"]) == (0.5, 0)
        assert datetime.fromisoformat(origin["date"]).tzinfo is not None
    origin = json.loads((dataset_run[0] / "inference.json").read_text())
    assert (origin["data_dir"], origin["subset"]) == (str(processed_dir), "all")


def test_one_bad_scan_costs_none_of_the_others(run_dir, processed_dir, tmp_path, capsys):
    shutil.copytree(processed_dir, tmp_path / "data")
    uids = read_processed_list(processed_dir)
    (tmp_path / "data" / "images" / f"{uids[2]}.npy").unlink()
    words = {"checkpoint_path": run_dir / "checkpoints" / "best_model.pth", "output_dir": tmp_path / "out"}
    words |= {"data_dir": tmp_path / "data", "subset": "all", "device": "cpu"}
    assert infer.main([f"--{name}={value}" for name, value in words.items()]) == 1
    (failed,) = pd.read_csv(tmp_path / "out" / "failed_scans.csv", dtype={"seriesuid": str}).to_dict("records")
    assert failed["seriesuid"] == uids[2]
    assert "does not exist; run python preprocess.py first" in failed["reason"]
    table = pd.read_csv(tmp_path / "out" / "inference_summary.csv", dtype={"seriesuid": str})
    assert table["seriesuid"].tolist() == [uid for uid in uids if uid != uids[2]]
    assert "1 scan could not be used" in capsys.readouterr().out


class Marker(nn.Module):
    """Finds what is bright, more surely the brighter it is."""

    def forward(self, image):
        return 8 * (image - 0.5)


@pytest.fixture(scope="module")
def uneven_data(phantom_dir, tmp_path_factory):
    """Phantoms at 32 x 48 x 48, of which two were cut to half their slices, so that the voxel sizes differ."""
    folder = tmp_path_factory.mktemp("uneven")
    shutil.copytree(phantom_dir, folder / "phantom")
    for path in sorted((folder / "phantom" / "raw").rglob("*.mhd"))[:2]:
        scan = sitk.ReadImage(str(path))
        for old in path.parent.glob(f"{path.stem}.*"):
            old.unlink()
        sitk.WriteImage(scan[:, :, scan.GetDepth() // 4 : 3 * scan.GetDepth() // 4], str(path))
    preprocessor = LUNA16Preprocessor(
        folder / "phantom" / "raw",
        folder / "phantom" / "annotations.csv",
        folder / "none",
        folder / "processed",
        target_size=(32, 48, 48),
    )
    assert not preprocessor.process_all().failed
    return folder / "processed"


@pytest.mark.parametrize("min_score", [0.25, 0.3, 0.35])
def test_array_alone_gives_the_very_mask_that_the_data_set_gives(uneven_data, tmp_path, min_score):
    run = tmp_path / "run"
    Trainer(uneven_data, run, num_epochs=1, device="cpu", mixed_precision=False, **TINY).train()
    path = run / "checkpoints" / "best_model.pth"
    inferencer = NoduleInferencer(path, tmp_path / "out", "cpu", min_score=min_score, mixed_precision=False)
    inferencer.predictor.model = Marker()
    inferencer.infer_dataset(uneven_data, "all")
    spacings, kept, marked = set(), 0, 0
    for uid in read_processed_list(uneven_data):
        image = np.load(uneven_data / "images" / f"{uid}.npy")
        mask = inferencer.predict(image)
        np.testing.assert_array_equal(mask, np.load(tmp_path / "out" / "predicted_masks" / f"{uid}.npy"))
        kept += mask.sum()
        marked += (inferencer.predict_probability(image) >= 0.5).sum()
        spacings.add(tuple(read_metadata(uneven_data, uid).grid.spacing))
    assert 0 < kept < marked and len(spacings) > 1


def test_array_alone_gives_the_very_mask_with_a_sliding_window(trained, processed_dir):
    inferencer = trained(Marker(), min_score=0.15)
    inferencer.predictor.settings = replace(inferencer.settings, window=(16, 24, 24))
    (uid,) = inferencer.infer_dataset(processed_dir)["seriesuid"]
    mask = inferencer.predict(np.load(processed_dir / "images" / f"{uid}.npy"))
    assert mask.any()
    np.testing.assert_array_equal(mask, np.load(inferencer.output_dir / "predicted_masks" / f"{uid}.npy"))


def test_specks_are_no_nodules_but_one_coarse_voxel_is():
    probability = np.zeros((12, 12, 40), np.float32)
    probability[5, 5, 5] = 0.9  # 1 mm3
    probability[4:6, 4:6, 14] = 0.9  # 4 mm3, below a ball of 2 mm
    probability[4:6, 4:6, 24:26] = 0.9  # 8 mm3
    fine = find_candidates(probability, Geometry(probability.shape, (0.0, 0.0, 0.0), UNIT), 0.5)
    assert [nodule.volume_voxels for nodule in fine.nodules] == [8]
    assert (fine.mask.sum(), len(fine.candidates)) == (8, 3)  # specks are marks still
    coarse = find_candidates(probability, Geometry(probability.shape, (0.0, 0.0, 0.0), (1.4, 1.4, 5.0)), 0.5)
    assert sorted(nodule.volume_voxels for nodule in coarse.nodules) == [1, 4, 8]


def test_what_cleaning_leaves_out_of_a_spot_stays_a_mark():
    centers, shape = np.array([[10, 10, 12], [10, 10, 28]]), (20, 20, 40)
    balls = [
        np.linalg.norm(np.indices(shape) - c[:, None, None, None], axis=0) <= r
        for c, r in zip(centers, (6, 2), strict=True)
    ]
    probability = np.where(balls[0] | balls[1], 0.8, 0.0).astype(np.float32)
    probability[10, 10, 12:28] = np.maximum(probability[10, 10, 12:28], 0.15)
    given = probability, Geometry(shape, (0.0, 0.0, 0.0), UNIT), 0.5
    plain = find_candidates(*given, image=probability)
    cleaned = find_candidates(*given, cleaning=Cleaning(smallest_mm=5.0), image=probability)
    assert len(plain.nodules) == 2 and len(cleaned.nodules) == 1
    assert [found.center_xyz for found in cleaned.candidates] == [found.center_xyz for found in plain.candidates]


def test_lump_that_opening_takes_off_is_a_nodule_or_a_mark():
    shape, offset = (20, 20, 40), np.indices((20, 20, 40))
    large, small = (
        np.linalg.norm(offset - np.array(middle)[:, None, None, None], axis=0) <= radius
        for middle, radius in (((10, 10, 10), 6), ((10, 10, 21), 2))
    )
    probability = np.where(large | small, 0.8, 0.0).astype(np.float32)
    probability[10, 10, 10:21] = 0.8
    given = probability, Geometry(shape, (0.0, 0.0, 0.0), UNIT), 0.5
    opened = find_candidates(*given, cleaning=Cleaning(opening_mm=1.0), image=probability)
    assert len(opened.nodules) == 2 and opened.mask[10, 10, 21]
    sparing = find_candidates(*given, cleaning=Cleaning(opening_mm=1.0, smallest_mm=6.0), image=probability)
    assert len(sparing.nodules) == 1 and not sparing.mask[10, 10, 21]
    assert [round(found.center_xyz[0]) for found in sparing.candidates] == [10, 21]


def test_learnt_score_decides_which_faint_spots_are_kept():
    probability = np.zeros((30, 30, 60), np.float32)
    probability[2::4, 2::4, 2::6] = 0.3  # 490 of them
    probability[14, 14, 30:33] = (0.0, 0.11, 0.0)
    given = probability, Geometry(probability.shape, (0.0, 0.0, 0.0), UNIT), 0.5
    found = find_candidates(*given, score=lambda features: 1 - features.certainty)
    assert len(found.candidates) == MAX_CANDIDATES
    assert found.candidates[0].index_zyx == (14, 14, 31) and found.candidates[0].score > 0.8


def test_map_of_many_specks_is_noise_and_takes_no_longer(monkeypatch):
    rng = np.random.default_rng(0)
    probability = np.where(rng.random((60, 80, 80)) < 0.02, 0.9, 0.0).astype(np.float32)
    probability[20:24, 20:24, 20:24] = 0.95
    described = []
    features_of = infer.features_of
    monkeypatch.setattr(infer, "features_of", lambda *given: described.append(1) or features_of(*given))
    found = find_candidates(probability, Geometry(probability.shape, (0.0, 0.0, 0.0), UNIT), 0.5, smallest_mm3=0)
    assert len(infer._components(probability >= 0.5)) > 3000
    assert found.is_noise
    assert len(found.nodules) == infer.MOST_COMPONENTS and len(described) <= 2 * infer.MOST_COMPONENTS
    assert found.mask[20:24, 20:24, 20:24].all()  # the largest stay


def test_map_that_marks_more_than_a_litre_is_noise_and_stays_whole():
    probability = np.zeros((60, 60, 60), np.float32)
    probability[5:55, 5:55, 5:55] = 0.9
    geometry = Geometry(probability.shape, (0.0, 0.0, 0.0), (2.1, 2.0, 2.0))
    found = find_candidates(probability, geometry, 0.5)
    assert found.is_noise and found.mask.sum() == 50**3
    assert not find_candidates(probability, Geometry(probability.shape, (0.0, 0.0, 0.0), UNIT), 0.5).is_noise


def test_noise_is_looked_at_once(live):
    network = Counting()
    image = spotted(*2 * np.argwhere(np.ones((12, 12, 12))))  # 1728 spots
    live(network, window=(8, 8, 8)).predict_probability(image)
    once = len(network.seen)
    network.seen.clear()
    live(network, window=(8, 8, 8), mirrors=3).predict_probability(image)
    assert len(network.seen) == once


def test_noise_is_told(trained, processed_dir, caplog):
    class Speckled(nn.Module):
        def forward(self, image):
            torch.manual_seed(0)
            return torch.where(torch.rand(image.shape) < 0.03, 5.0, -10.0)

    with caplog.at_level("INFO"):
        trained(Speckled()).infer_dataset(processed_dir)
    assert "the maps of 1 of 1 scans are mostly noise" in caplog.text


def test_picture_counts_the_annotated_nodules_that_the_tables_count(trained, processed_dir, monkeypatch):
    (uid,) = choose_scans(processed_dir, trained().checkpoint_path, "validation")
    figures = []
    monkeypatch.setattr(infer.ResultFolder, "write_scan", lambda self, result, figure: figures.append(figure))
    inferencer, scan = trained(Nothing()), read_processed(processed_dir, uid)
    voxels = {(16.0, 24.0, 24.0): 8, (16.0, 24.0, 26.0): 8, (2.0, 4.0, 4.0): 0}  # two touch, one is unseen
    nodules = [AnnotatedNodule(tuple(scan.geometry.world(index)), index, 5.0, n) for index, n in voxels.items()]
    scan = replace(scan, metadata=replace(scan.metadata, nodules=tuple(nodules)))
    inferencer._finish({uid: "validation"}, {uid: "here"}, scan, np.zeros(scan.mask.shape, np.float32))
    assert "0 predicted, 3 annotated, 3 missed" in figures[0].get_suptitle()


def test_specks_in_one_place_share_a_row_of_the_picture(processed_dir):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    mask = np.zeros(scan.mask.shape, np.uint8)
    mask[10:13, 20:22, 20:26:2] = 1  # three, a voxel apart
    mask[10:13, 40:42, 40:42] = 1
    fine = Geometry(mask.shape, (0.0, 0.0, 0.0), UNIT)
    found = extract_nodules(mask, fine)
    figure = infer.draw_overlay(np.asarray(scan.image, np.float32), fine, mask, found, title="scan")
    assert "4 predicted" in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes[::4]]
    assert len(titles) == 2
    assert sum("and 2 more here" in title for title in titles) == 1


def test_any_character_of_a_name_is_drawn(tmp_path):
    pixels = np.zeros((8, 16, 16), np.float32)
    grid = Geometry(pixels.shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    infer.draw_overlay(pixels, grid, pixels.astype(np.uint8), [], title="a$1^$b_{x").savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_picture_of_a_missed_nodule_says_so(processed_dir):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    truth = np.zeros(scan.mask.shape, np.uint8)
    truth[10:14, 20:25, 20:26] = 1
    figure = infer.draw_overlay(np.asarray(scan.image, np.float32), scan.geometry, 0 * truth, [], truth, "scan")
    assert "0 predicted, 1 annotated, 1 missed" in figure.get_suptitle()
    assert figure.axes[0].get_title().startswith("missed")


def test_picture_takes_a_nodule_for_missed_by_the_rule_of_the_tables(processed_dir):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    truth, mask = np.zeros((2, *scan.mask.shape), np.uint8)
    truth[10:14, 20:25, 20:26] = 1
    mask[10:14, 25:35, 25:40] = mask[13, 24, 25] = 1  # touches it, its centre is elsewhere
    found = extract_nodules(mask, scan.geometry)
    figure = infer.draw_overlay(np.asarray(scan.image, np.float32), scan.geometry, mask, found, truth, "scan")
    assert "1 predicted, 1 annotated, 1 missed" in figure.get_suptitle()


def test_picture_of_the_first_finding_counts_all(processed_dir):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    mask = np.zeros(scan.mask.shape, np.uint8)
    mask[4:8, 4:8, 4:8] = mask[14:18, 24:28, 24:28] = 1
    found = extract_nodules(mask, scan.geometry)
    figure = infer.draw_overlay(np.asarray(scan.image, np.float32), scan.geometry, mask, found, title="scan", most=1)
    assert "2 predicted (the first 1 of 2 findings)" in figure.get_suptitle()
    assert len(figure.axes) == 4


def test_picture_names_the_sides_of_the_patient(processed_dir):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    nothing = np.zeros(scan.mask.shape, np.uint8)
    figure = infer.draw_overlay(np.asarray(scan.image, np.float32), scan.geometry, nothing, [], None, "scan")
    # x grows to the patient's left, y to the back.
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["R", "L"], ["R", "L"], ["A", "P"]]


def test_picture_without_a_finding_shows_whole_slices(processed_dir):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    nothing = np.zeros(scan.mask.shape, np.uint8)
    figure = infer.draw_overlay(np.asarray(scan.image, np.float32), scan.geometry, nothing, [], None, "scan")
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [
        "axial, no nodule found",
        "coronal",
        "sagittal",
    ]
    for axes, rows in zip(figure.axes, (1, 0, 0), strict=False):  # y upright, then z
        height_mm = nothing.shape[rows] * scan.geometry.spacing_zyx[rows]
        assert abs(np.diff(axes.get_ylim())[0]) == pytest.approx(height_mm)


# -------------------------------------------------------------------------------------------------------- infer_scan


@pytest.fixture(scope="module")
def chest_runs(run_dir, tmp_path_factory):
    """{flipped: (scan, mask in its grid, nodule, folder)} of the chest, straight and flipped."""
    runs = {}
    for flipped in (False, True):
        folder = tmp_path_factory.mktemp("chest")
        path = write_chest(folder / "chest.mhd", flipped=flipped)
        inferencer = NoduleInferencer(run_dir / "checkpoints" / "best_model.pth", folder, "cpu", mixed_precision=False)
        inferencer.predictor.model = Bright(HALF)
        (nodule,) = inferencer.infer_scan(path)
        mask = sitk.ReadImage(str(folder / "predicted_masks" / "chest.nii.gz"))
        runs[flipped] = sitk.ReadImage(str(path)), mask, nodule, folder
    return runs


def test_other_scan_of_the_same_file_name_is_not_replaced(trained, tmp_path):
    for patient in ("A", "B"):
        (tmp_path / patient).mkdir()
    inferencer, first = trained(Nothing()), write_chest(tmp_path / "A" / "ct.mha")
    for _ in range(2):
        inferencer.infer_scan(first)  # again is no other
    second = write_chest(tmp_path / "B" / "ct.mha")
    with pytest.raises(FileExistsError, match=r"holds results of another ct, .*A.ct\.mha; name another output_dir"):
        inferencer.infer_scan(second)
    trained(Nothing(), overwrite=True).infer_scan(second)
    summary = json.loads((inferencer.output_dir / "inference_summary.json").read_text())
    assert summary["scans"]["ct"]["source"] == str(second)


@pytest.mark.parametrize("flipped", [False, True])
def test_files_for_slicer_show_the_nodules_where_they_are(chest_runs, flipped):
    _, mask, nodule, folder = chest_runs[flipped]
    (segment,) = read_mask(folder / "predicted_masks" / "chest.seg.nrrd").segments
    assert segment.name == f"nodule 1: {nodule['diameter_mm']:.1f} mm, {nodule['probability']:.2f}"
    shown = read_marks([folder / "predicted_masks" / "chest.seg.nrrd"], None, Geometry.from_image(mask))
    assert int(shown.nodules[0].inside.sum()) == int(sitk.GetArrayFromImage(mask).sum())
    np.testing.assert_allclose(shown.nodules[0].center_xyz, nodule["center_world"], atol=2.0)  # coarser voxels
    points = json.loads((folder / "predicted_masks" / "chest.mrk.json").read_text())["markups"][0]["controlPoints"]
    assert [point["position"] for point in points] == [nodule["center_world"]]


@pytest.mark.parametrize("flipped", [False, True])
def test_ball_in_a_raw_scan_is_found_where_it_is(chest_runs, flipped):
    nodule = chest_runs[flipped][2]
    assert np.linalg.norm(np.subtract(nodule["center_world"], BALL_CENTER)) < 3  # half a voxel
    assert nodule["diameter_mm"] == pytest.approx(2 * BALL_RADIUS_MM, rel=0.1)


@pytest.mark.parametrize("name", ["flipped.mhd", "chest.nii.gz", "chest.mha", "chest.nrrd"])
def test_same_patient_in_another_file_has_the_same_nodule(trained, chest_runs, tmp_path, name):
    path = write_chest(tmp_path / name, flipped=name.startswith("flipped"))
    (nodule,) = trained(Bright(HALF)).infer_scan(path)
    assert nodule["center_world"] == pytest.approx(chest_runs[False][2]["center_world"], abs=0.01)
    assert nodule["volume_voxels"] == chest_runs[False][2]["volume_voxels"]


@pytest.mark.parametrize("flipped", [False, True])
def test_mask_of_a_raw_scan_lies_on_its_own_grid(chest_runs, flipped):
    scan, mask, _, _ = chest_runs[flipped]
    assert mask.GetSize() == scan.GetSize()
    assert mask.GetPixelID() == sitk.sitkUInt8
    for get in (sitk.Image.GetOrigin, sitk.Image.GetSpacing, sitk.Image.GetDirection):
        assert get(mask) == pytest.approx(get(scan), abs=1e-4)


@pytest.mark.parametrize("flipped", [False, True])
def test_written_mask_lies_alike_for_those_who_read_qform_or_sform(chest_runs, flipped):
    scan, _, _, folder = chest_runs[flipped]
    header = NiftiHeader.read(folder / "predicted_masks" / "chest.nii.gz")
    assert header.qform is not None
    np.testing.assert_allclose(header.qform, header.sform, atol=1e-4)
    to_lps = np.diag([-1.0, -1.0, 1.0])
    np.testing.assert_allclose(to_lps @ header.sform[:, 3], scan.GetOrigin(), atol=1e-4)
    expected = np.reshape(scan.GetDirection(), (3, 3)) * scan.GetSpacing()
    np.testing.assert_allclose(to_lps @ header.sform[:, :3], expected, atol=1e-4)


@pytest.mark.parametrize("flipped", [False, True])
def test_mask_of_a_raw_scan_covers_the_ball(chest_runs, flipped):
    scan, mask, _, _ = chest_runs[flipped]
    found, ball = sitk.GetArrayFromImage(mask) > 0, sitk.GetArrayFromImage(scan) == 400
    assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > 0.85


@pytest.mark.parametrize("flipped", [False, True])
def test_table_and_mask_of_a_raw_scan_agree_within_a_voxel(chest_runs, flipped):
    _, mask, _, folder = chest_runs[flipped]
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(sitk.ConnectedComponent(mask))
    (row,) = pd.read_csv(folder / "chest_nodules.csv").to_dict("records")
    table = [row["coordX"], row["coordY"], row["coordZ"]]
    assert shape.GetNumberOfLabels() == 1
    assert (np.abs(np.subtract(table, shape.GetCentroid(1))) < mask.GetSpacing()).all()


def test_raw_scan_is_reported_as_new(chest_runs):
    table = pd.read_csv(chest_runs[False][3] / "inference_summary.csv")
    assert table[["seriesuid", "part", "nodules"]].to_numpy().tolist() == [["chest", "new", 1]]


@pytest.mark.parametrize("index", [0, 2], ids=["straight", "flipped"])
def test_raw_phantom_gives_the_mask_of_its_processed_array(trained, phantom_dir, tmp_path, monkeypatch, index):
    monkeypatch.setattr(infer, "MAX_PICTURED", 1)  # for speed
    uid, path = list(find_scans(phantom_dir / "raw").items())[index]
    preprocessor = LUNA16Preprocessor(
        phantom_dir / "raw",
        phantom_dir / "annotations.csv",
        tmp_path / "none",  # lungs by threshold, as for a raw scan
        tmp_path / "processed",
        target_size=(32, 48, 48),
    )
    preprocessor.process_single_scan(uid)
    inferencer = trained(Bright())
    inferencer.infer_scan(path)
    expected = inferencer.predict(read_processed(tmp_path / "processed", uid).image)
    assert expected.any()
    np.testing.assert_array_equal(np.load(inferencer.output_dir / "predicted_masks" / f"{uid}.npy"), expected)


def test_picture_of_a_raw_scan_shows_the_ct_itself(trained, tmp_path, monkeypatch):
    pictured = []
    draw = infer.draw_overlay

    def watch(image, *given, **more):
        pictured.append(image)
        return draw(image, *given, **more)

    monkeypatch.setattr(infer, "draw_overlay", watch)
    trained(Nothing()).infer_scan(write_chest(tmp_path / "chest.mhd"))
    (image,) = pictured
    body = (-350 + 1000) / 1400
    middle = np.asarray(image)[image.shape[0] // 2, image.shape[1] // 2]
    assert middle[len(middle) // 2] == pytest.approx(body, abs=0.01)  # between the lungs, where the network sees air


def test_raw_scan_says_how_its_lungs_were_found_and_on_what_grid(trained, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trained(Bright(HALF)).infer_scan(write_chest(tmp_path / "chest.mhd"))
    assert "chest: lungs by threshold: 2.4 litres on the right, 2.4 on the left; grid" in caplog.text
    assert "grid of 32 x 48 x 48 voxels of 7.5 x 5.8 x 6.2 mm (z, y, x)" in caplog.text
    assert "chest: 1 nodule, the highest score is " in caplog.text


def test_scan_unlike_the_training_scans_is_told_in_log_and_result(trained, tmp_path, caplog):
    inferencer = trained(Bright(HALF))
    inferencer.learnt = {"slice_mm": (1.0, 2.0)}
    inferencer.infer_scan(write_chest(tmp_path / "chest.mhd"))
    assert "chest is unlike the training scans: slices of 6 mm, where training scans have 1 to 2" in caplog.text
    summary = json.loads((inferencer.output_dir / "inference_summary.json").read_text())["scans"]["chest"]
    assert summary["unlike_training"] == "slices of 6 mm, where training scans have 1 to 2"
    assert summary["lungs"] == "2.4 litres on the right, 2.4 on the left"


def test_network_that_wants_no_lungs_is_not_told_that_there_are_none(trained, tmp_path, caplog):
    inferencer = trained(Bright(HALF))
    inferencer.preprocessing = replace(inferencer.preprocessing, mask_lungs=False)
    inferencer.learnt = {}
    inferencer.infer_scan(write_chest(tmp_path / "chest.mhd"))
    summary = json.loads((inferencer.output_dir / "inference_summary.json").read_text())["scans"]["chest"]
    assert (summary["lungs"], summary["unlike_training"]) == ("not looked for", "no")
    assert "unlike" not in caplog.text


def test_checkpoint_knows_what_its_training_scans_were_like(run_dir):
    learnt = load_checkpoint(run_dir / "checkpoints" / "best_model.pth").learnt
    assert set(learnt) == {"slice_mm", "pixel_mm", "noise_hu"}
    assert all(low <= high for low, high in learnt.values())


class Level(nn.Module):
    """Gives a cube the probability p, and everything else nearly none."""

    def __init__(self, p):
        super().__init__()
        self.logit = math.log(p / (1 - p))

    def forward(self, image):
        logits = torch.full_like(image, -9.0)
        logits[..., 10:14, 20:24, 20:24] = self.logit
        return logits


@pytest.mark.parametrize(
    ("probability", "told"),
    [
        (0.01, "no nodule found; no faint mark either: the highest probability of a voxel is 0.01"),
        (0.3, "no nodule found; 1 fainter marks with scores up to 0."),
    ],
)
def test_clean_scan_is_told_from_a_network_that_marks_nothing(trained, tmp_path, caplog, probability, told):
    with caplog.at_level("INFO"):
        trained(Level(probability)).infer_scan(write_chest(tmp_path / "chest.mhd"))
    assert f"chest: {told}" in caplog.text


def test_raw_training_scan_is_warned_of(trained, run_dir, phantom_dir, monkeypatch, caplog):
    monkeypatch.setattr(infer, "MAX_PICTURED", 1)
    uid = read_split(run_dir / "checkpoints" / "split.json").train[0]
    inferencer = trained(Nothing())
    inferencer.infer_scan(find_scans(phantom_dir / "raw")[uid])
    assert f"{uid} was seen in training: what this network finds there" in caplog.text
    assert pd.read_csv(inferencer.output_dir / "inference_summary.csv")["part"].tolist() == ["train"]


def test_hundredth_scan_costs_what_the_first_one_costs(trained, tmp_path, monkeypatch):
    """Counts what is read and written beside the scan's own files, but for the summary's own size."""
    path = write_chest(tmp_path / "a.mha", (12, 20, 20))
    inferencer = trained(Nothing())
    reads, tables = [], []
    read_bytes, read_csv = Path.read_bytes, pd.read_csv
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read_bytes(self))
    monkeypatch.setattr(pd, "read_csv", lambda *given, **more: tables.append(given) or read_csv(*given, **more))
    for name in "abcde":
        shutil.copy(path, tmp_path / f"{name}.mha") if name != "a" else None
        inferencer.infer_scan(tmp_path / f"{name}.mha")
    assert not [read for read in reads if read.suffix == ".pth"]  # the checkpoint is hashed when it is loaded
    assert not tables  # marks are appended
    summary = json.loads((inferencer.output_dir / "inference_summary.json").read_text())
    assert list(summary["scans"]) == list("abcde")


def test_summary_of_many_scans_is_written_when_enough_are_new_and_when_the_inferencer_goes(
    trained, tmp_path, monkeypatch
):
    def count_scans():
        return len(json.loads((tmp_path / "out" / "inference_summary.json").read_text())["scans"])

    monkeypatch.setattr(infer, "SUMMARY_SHARE", 0.5)
    path = write_chest(tmp_path / "s0.mha", (12, 20, 20))
    inferencer, counts = trained(Nothing()), []
    for number in range(6):
        inferencer.infer_scan(path)
        counts.append(count_scans())
        path = Path(shutil.copy(path, tmp_path / f"s{number + 1}.mha"))
    assert counts == [1, 2, 3, 3, 5, 5]
    table = pd.read_csv(tmp_path / "out" / "inference_summary.csv")
    assert table["seriesuid"].tolist() == [f"s{number}" for number in range(6)]  # is always whole
    del inferencer
    assert count_scans() == 6


def test_overwrite_leaves_files_of_others_alone(trained, processed_dir):
    inferencer = trained(Nothing())
    (uid,) = inferencer.infer_dataset(processed_dir)["seriesuid"]
    mine = [inferencer.output_dir / name for name in ("reader2_nodules.csv", "visualizations/paper.svg")]
    for path in mine:
        path.write_text("mine")
    trained(Nothing(), threshold=0.6, overwrite=True).infer_dataset(processed_dir, "train")
    assert [path.read_text() for path in mine] == ["mine"] * 2
    assert not list(inferencer.output_dir.rglob(f"*{uid}*"))


def test_marks_of_a_scan_that_is_done_again_are_replaced(trained, tmp_path):
    first, second = write_chest(tmp_path / "a.mha"), write_chest(tmp_path / "b.mha")
    for path in (first, second, first):
        inferencer = trained(Bright(HALF))
        inferencer.infer_scan(path)
    assert sorted(pd.read_csv(inferencer.output_dir / "candidates.csv")["seriesuid"]) == ["a", "b"]


def test_two_processes_in_one_folder_both_arrive_whole(run_dir, tmp_path):
    code = f"""
import sys
import torch
from infer import NoduleInferencer
torch.set_num_threads(1)
inferencer = NoduleInferencer({str(run_dir / "checkpoints" / "best_model.pth")!r}, {str(tmp_path / "out")!r}, "cpu")
for path in sys.argv[1:]:
    inferencer.infer_scan(path)
"""
    names = [f"{letter}{number}" for letter in "ab" for number in range(3)]
    for name in names:
        write_chest(tmp_path / f"{name}.mha", (12, 20, 20))
    paths = [str(tmp_path / f"{name}.mha") for name in names]
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, *part], cwd=ROOT) for part in (paths[:3], paths[3:])]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    summary = json.loads((tmp_path / "out" / "inference_summary.json").read_text())
    assert sorted(summary["scans"]) == names
    assert sorted(pd.read_csv(tmp_path / "out" / "inference_summary.csv")["seriesuid"]) == names
    assert sorted(json.loads((tmp_path / "out" / "inference.json").read_text())["scans"]) == names


def test_raw_scan_needs_a_checkpoint(live, tmp_path):
    with pytest.raises(RuntimeError, match="needs the preprocessing of a checkpoint"):
        live(Bright()).infer_scan(write_chest(tmp_path / "chest.mhd"))


def test_file_that_is_no_scan_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"a scan must be one of \.mhd.*not 'picture\.png'"):
        trained().infer_scan(tmp_path / "picture.png")


def test_command_line_takes_several_paths_and_tells_no_result_where_nothing_was_searched(run_dir, tmp_path, capsys):
    command = ["--checkpoint_path", str(run_dir / "checkpoints" / "best_model.pth"), "--device", "cpu", "--input"]
    paths = [str(write_chest(tmp_path / f"{name}.mha")) for name in ("a", "b")]
    assert infer.main([*command, *paths, "--output_dir", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out" / "predicted_masks").glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz"}
    capsys.readouterr()
    (tmp_path / "c.mha").write_text("no scan")
    assert infer.main([*command, str(tmp_path / "c.mha"), "--output_dir", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().out
    assert "no nodule found" not in told
    assert "1 scan could not be used" in told


def test_folder_without_a_scan_is_refused(trained, tmp_path):
    (tmp_path / "series").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no scan in .*series: no \.mhd, \.mha"):
        trained().infer_scan(tmp_path / "series")


def test_missing_scan_is_an_error(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mhd does not exist"):
        trained().infer_scan(tmp_path / "none.mhd")


def test_scan_without_lungs_warns(trained, tmp_path, caplog):
    sitk.WriteImage(
        sitk.GaussianSource(sitk.sitkFloat32, [16, 16, 16], scale=100.0, spacing=[7, 7, 7]),
        str(tmp_path / "blob.mha"),
    )
    trained(Nothing()).infer_scan(tmp_path / "blob.mha")
    assert "no lungs were found" in caplog.text


# ------------------------------------------------------------------------------------------- snippet, command line

SNIPPET = """
# single_inference.py
from infer import NoduleInferencer
import numpy as np

inferencer = NoduleInferencer(
    checkpoint_path='experiments/luna16_unet/checkpoints/best_model.pth',
    output_dir='results',
    device='cuda',
    threshold=0.5
)

# Загрузка данных
image = np.load('data/LUNA16/processed/images/sample.npy')

# Предсказание
mask_pred = inferencer.predict(image)

# Извлечение узелков
metadata = np.load('data/LUNA16/processed/sample_metadata.npy', allow_pickle=True).item()
nodules = inferencer.extract_nodule_candidates(
    mask_pred, 
    metadata['origin'], 
    metadata['spacing']
)

print(f"Detected {len(nodules)} nodules")
for i, nodule in enumerate(nodules):
    print(f"Nodule {i+1}: center={nodule['center_world']}, diameter={nodule['diameter_mm']:.1f}mm")
"""  # noqa: W291 - word for word


def test_snippet_of_the_brief_works_word_for_word(run_dir, processed_dir, tmp_path, monkeypatch, capsys):
    uid = read_processed_list(processed_dir)[0]
    (tmp_path / "data/LUNA16/processed/images").mkdir(parents=True)
    shutil.copy(processed_dir / "images" / f"{uid}.npy", tmp_path / "data/LUNA16/processed/images/sample.npy")
    shutil.copy(processed_dir / f"{uid}_metadata.npy", tmp_path / "data/LUNA16/processed/sample_metadata.npy")
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    *_, bias = (tensor for name, tensor in checkpoint.weights.items() if name.endswith("bias"))
    bias += 1000  # every voxel is nodule
    (tmp_path / "experiments/luna16_unet/checkpoints").mkdir(parents=True)
    save_checkpoint(tmp_path / "experiments/luna16_unet/checkpoints/best_model.pth", checkpoint)
    (tmp_path / "single_inference.py").write_text(SNIPPET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("single_inference.py")
    grid = read_processed(processed_dir, uid).geometry
    diameter = (6 / math.pi * 32 * 48 * 48 * grid.voxel_volume_mm3) ** (1 / 3)
    first, second = capsys.readouterr().out.splitlines()
    center = json.loads(second.partition("center=")[2].partition(", diameter")[0])
    assert first == "Detected 1 nodules"
    assert center == pytest.approx(grid.world([15.5, 23.5, 23.5]), abs=0.01)
    assert second.endswith(f", diameter={diameter:.1f}mm")


def test_network_of_the_checkpoint_predicts(run_dir, processed_dir, trained):
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    network = LungNodule3DUNet(**checkpoint.arguments)
    network.load_state_dict(checkpoint.weights)
    with torch.no_grad():
        expected = torch.sigmoid(network.eval()(torch.from_numpy(np.array(scan.image, np.float32))[None, None]))
    np.testing.assert_allclose(trained().predict_probability(scan.image), expected[0, 0].numpy(), rtol=1e-5)


def test_command_line_infers_the_validation_scans(run_dir, processed_dir, tmp_path, capsys):
    path = run_dir / "checkpoints" / "best_model.pth"
    status = infer.main(
        [
            f"--checkpoint_path={path}",
            f"--output_dir={tmp_path}",
            f"--data_dir={processed_dir}",
            "--device=cpu",
            "--threshold=0.99",
        ]
    )
    (uid,) = json.loads((path.parent / "split.json").read_text())["validation"]
    assert status == 0
    assert (tmp_path / "predicted_masks" / f"{uid}.npy").is_file()
    assert uid in capsys.readouterr().out


def test_command_line_infers_one_raw_scan(run_dir, tmp_path, capsys):
    path = write_chest(tmp_path / "chest.nii.gz")
    arguments = {"checkpoint_path": run_dir / "checkpoints" / "best_model.pth", "output_dir": tmp_path / "out"}
    arguments |= {"input": path, "device": "cpu", "threshold": 0.999}
    assert infer.main([f"--{name}={value}" for name, value in arguments.items()]) == 0
    assert "no nodule found" in capsys.readouterr().out
    assert (tmp_path / "out" / "predicted_masks" / "chest.nii.gz").is_file()


@pytest.mark.parametrize("given", [{"subset": "validation"}, {"data_dir": "data"}])
def test_choice_of_a_data_set_with_a_raw_scan_is_refused(trained, tmp_path, given):
    with pytest.raises(InputError, match=f"leave out {next(iter(given))} with input: it is for"):
        trained().run(tmp_path / "chest.mhd", **given)


def found_of(nodule):
    """The nodule of a dict of the brief."""
    center, index, edges = nodule["center_world"], nodule["center_voxel"][::-1], nodule["bbox"]
    box = Box(edges[::2], edges[1::2])
    volume = nodule["volume_voxels"], nodule["volume_mm3"]
    return infer.FoundNodule(center, index, nodule["diameter_mm"], *volume, box, nodule["probability"])


def test_console_tables_fit_a_terminal(dataset_run, chest_runs):
    _, summary = dataset_run
    long = summary.assign(seriesuid=["1.3.6.1.4.1.14519.5.2.1.6279.6001." + str(n) * 30 for n in range(4)])
    long.loc[0, ["nodules", "largest_diameter_mm", "highest_score"]] = [0, math.nan, math.nan]
    nodules = infer.nodule_table("1.3.6.1.4.1.14519.5.2.1.6279.6001." + "1" * 30, [found_of(chest_runs[False][2])])
    for text in (infer.format_scans(long), infer.format_nodules(nodules)):
        assert "nan" not in text.lower() and "/" not in text
        assert max(map(len, text.splitlines())) <= 80
    assert "3 nodules in 3 of 4 scans" in infer.format_scans(long)
    assert infer.format_nodules(nodules[:0]) == "no nodule found"


def test_command_line_without_a_checkpoint_ends_with_status_1(tmp_path, caplog):
    assert infer.main([f"--checkpoint_path={tmp_path / 'none.pth'}", "--device=cpu"]) == 1
    assert "run python train.py first" in caplog.text


# ------------------------------------------------------------------------------------------------------- many scans


def test_scans_come_back_in_order(processed_dir):
    uids = read_processed_list(processed_dir)[::-1]
    assert map_scans(processed_dir, uids, lambda s: s.seriesuid, lambda s, uid: (s.seriesuid, uid), "test") == [
        (uid, uid) for uid in uids
    ]
    assert map_scans(processed_dir, [], len, max, "test") == []


def test_last_scan_is_finished_while_the_network_computes_the_next(processed_dir):
    uids = read_processed_list(processed_dir)[:2]
    second_begun = threading.Event()

    def compute(scan):
        if scan.seriesuid == uids[1]:
            second_begun.set()

    def finish(scan, computed):
        return second_begun.wait(timeout=30)

    assert map_scans(processed_dir, uids, compute, finish, "test") == [True, True]


def test_next_scan_is_read_while_the_network_computes(processed_dir, monkeypatch):
    uids = read_processed_list(processed_dir)[:2]
    second_read = threading.Event()

    def read(data_dir, uid, in_memory):
        if uid == uids[1]:
            second_read.set()
        return read_processed(data_dir, uid, in_memory)

    monkeypatch.setattr(infer, "read_processed", read)
    waited = map_scans(
        processed_dir, uids, lambda scan: second_read.wait(timeout=30), lambda scan, computed: computed, "test"
    )
    assert waited == [True, True]


def test_several_scans_are_finished_at_the_same_time_and_come_back_in_order(processed_dir):
    uids = read_processed_list(processed_dir)[:2]
    both = threading.Barrier(2, timeout=30)

    def finish(scan, computed):
        both.wait()
        return scan.seriesuid

    assert map_scans(processed_dir, uids, lambda scan: None, finish, "test", finishers=2) == uids


@pytest.mark.parametrize("finishers", [1, 3])
def test_few_scans_are_in_memory(processed_dir, monkeypatch, finishers):
    uids = read_processed_list(processed_dir) * 3
    lock, alive, most = threading.Lock(), 0, 0

    def count(change):
        nonlocal alive, most
        with lock:
            alive += change
            most = max(most, alive)

    def read(data_dir, uid, in_memory):
        count(1)
        return read_processed(data_dir, uid, in_memory)

    monkeypatch.setattr(infer, "read_processed", read)
    map_scans(processed_dir, uids, lambda scan: None, lambda scan, computed: count(-1), "test", finishers=finishers)
    assert (alive, most <= finishers + 2) == (0, True)


def test_error_of_any_stage_is_raised(processed_dir):
    uids = read_processed_list(processed_dir)

    def fail(*given):
        raise OSError("disk full")

    for compute, finish in ((fail, lambda scan, computed: None), (lambda scan: None, fail)):
        with pytest.raises(OSError, match="disk full"):
            map_scans(processed_dir, uids, compute, finish, "test")
    with pytest.raises(FileNotFoundError):
        map_scans(processed_dir, [*uids, "1.2.3"], lambda scan: None, lambda scan, computed: None, "test")


def flipped_scan():
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(200, size=(8, 9, 10), dtype=np.uint8))
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    return image


def test_written_image_reads_back(tmp_path):
    write_image(tmp_path / "mask.nii.gz", flipped_scan())
    image = sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(flipped_scan()))


@pytest.mark.parametrize("kept_bytes", [400, 0])
def test_image_that_the_disk_cuts_off_is_an_error(tmp_path, monkeypatch, kept_bytes):
    write = sitk.WriteImage

    def write_half(image, name, **options):
        write(image, name, **options)
        Path(name).write_bytes(Path(name).read_bytes()[:kept_bytes])

    monkeypatch.setattr(sitk, "WriteImage", write_half)
    with pytest.raises(OSError, match="disk full"):
        write_image(tmp_path / "mask.nii.gz", flipped_scan())


def test_image_that_could_not_be_written_is_not_there(tmp_path, monkeypatch):
    write = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", lambda image, name, **options: write(image * 0, name, **options))
    with pytest.raises(OSError, match="could not be written"):
        write_image(tmp_path / "mask.nii.gz", flipped_scan())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("window", [None, (16, 16, 16)])
def test_network_that_gives_nan_is_an_error_and_no_scan_without_nodules(live, window):
    class Overflows(nn.Module):
        def forward(self, image):
            return torch.where(image > 0.99, torch.nan, -image)

    image = np.full((24, 24, 24), 0.5, np.float32)
    image[2, 2, 2] = 1.0
    with pytest.raises(UserError, match="numbers that are not finite; try float32"):
        live(Overflows(), window).predict_probability(image)


def test_scan_that_is_named_is_used_also_below_the_output_folder(trained, tmp_path):
    path = write_chest(tmp_path / "mine.mha")
    inferencer = trained(Bright(HALF))
    (inferencer.output_dir / "sub").mkdir(parents=True)
    beside, below = inferencer.output_dir / "named.mha", inferencer.output_dir / "sub" / "found.mha"
    for copy in (beside, below):
        shutil.copyfile(path, copy)
    scans, failed = inferencer._name_scans([beside, inferencer.output_dir / "sub"], None, True)
    assert [scan.path for scan in scans] == [beside] and not failed


def test_name_of_an_earlier_run_goes_to_its_scan_alone(trained, tmp_path):
    paths = [write_chest(tmp_path / folder / "scan.mha") for folder in "ab" if not (tmp_path / folder).mkdir()]
    inferencer = trained(Bright(HALF))
    for _ in range(2):
        scans, _ = inferencer._name_scans(paths[1:], None, False)
        inferencer.folder.claim(None, None, {scan.name: scan.source for scan in scans})
        scans, _ = inferencer._name_scans([*paths, paths[0]], None, False)
        assert {scan.source: scan.name for scan in scans} == {str(paths[0]): "scan_2", str(paths[1]): "scan"}
        inferencer.folder.claim(None, None, {scan.name: scan.source for scan in scans})


def test_scan_may_be_called_na(trained, tmp_path):
    first, second = write_chest(tmp_path / "NA.mha"), write_chest(tmp_path / "b.mha")
    for path in (first, second, second):
        inferencer = trained(Bright(HALF))
        inferencer.infer_scan(path)
    for name in ("candidates.csv", "inference_summary.csv"):
        table = pd.read_csv(inferencer.output_dir / name, keep_default_na=False)
        assert sorted(table["seriesuid"]) == ["NA", "b"]


def test_row_of_the_summary_waits_until_it_is_written(trained, tmp_path, monkeypatch):
    folder = trained(Bright(HALF)).folder
    folder._new_scans["a"] = {"nodules": []}
    write = infer.write_objects

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    folder.path.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(infer, "write_objects", full)
    with pytest.raises(OSError, match="No space"):
        folder.flush_summary()
    monkeypatch.setattr(infer, "write_objects", write)
    folder.flush_summary()
    assert list(json.loads((folder.path / "inference_summary.json").read_text())["scans"]) == ["a"]


def test_arrays_of_a_data_set_are_not_kept(trained, processed_dir, monkeypatch):
    inferencer, kept = trained(Bright(HALF)), []
    monkeypatch.setattr(inferencer.folder, "write_tables", lambda results, failed: kept.extend(results))
    inferencer.infer_dataset(processed_dir, "train")
    assert kept and all(result.found.labels.size == 1 and result.found.nodules for result in kept)


def test_nodule_between_thick_slices_has_a_voxel_of_its_own():
    fine = Geometry((20, 20, 20), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mask = np.zeros(fine.shape_zyx, np.uint8)
    mask[7:9, 9:12, 9:12] = 1
    nodules = extract_nodules(mask, fine)
    ranks = sitk.Image(20, 20, 4, sitk.sitkUInt16)
    ranks.SetSpacing((1.0, 1.0, 5.0))
    infer.mark_lost_nodules(ranks, nodules)
    array = sitk.GetArrayFromImage(ranks)
    assert np.argwhere(array == 1).tolist() == [[2, 10, 10]]
    infer.mark_lost_nodules(ranks, nodules)  # it is not lost any more
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ranks), array)
