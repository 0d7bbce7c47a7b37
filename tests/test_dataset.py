"""Augmentation, samples, batches and splits."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import metadata_of, nodule_at
from monai import transforms as monai
from monai.transforms import create_rotate, create_scale
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.utils.data import DataLoader

import dataset
from dataset import (
    Augmentation,
    AugmentationParameters,
    LUNA16Dataset,
    Patches,
    PatchSampler,
    SampleKey,
    ScanSampler,
    _affine_matrix,
    _apply_affine,
    _whole_nodule,
    augment_batch,
    collate,
    cut_patch,
    find_folds,
    find_patients,
    make_loader,
    make_split,
    nodule_points,
    patch_start,
)
from utils import IGNORED, Box, Geometry, read_metadata, read_processed, read_processed_list, write_metadata

NO_POINTS = np.empty((0, 3), int)
NO_CHANGE = Augmentation(
    rotate90_prob=0, flip_prob=0, affine_prob=0, noise_prob=0, scale_prob=0, shift_prob=0, paste_per_scan=0
)  # to switch single changes on by dataclasses.replace
DRAWS = 2000


def draw(augmentation, index, shape=(8, 16, 16), spacing=(2.0, 1.0, 1.0), points=NO_POINTS):
    return augmentation.draw(np.random.default_rng([0, 0, index]), shape, spacing, np.asarray(points))


def augment(array, drawn, mask=None):
    """Augmented image and mask (z, y, x) of one float array; its mask is where it is above 0.5 unless one is given."""
    image = torch.as_tensor(array, dtype=torch.float32)[None, None]
    mask = (image > 0.5).to(torch.uint8) if mask is None else torch.as_tensor(mask)[None, None]
    image, mask = augment_batch(image, mask, [drawn])
    return image[0, 0].numpy(), mask[0, 0].numpy()


def same(first, second):
    """Whether two draws are equal in every field."""
    pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.fixture(scope="module")
def many_draws():
    return [draw(Augmentation(), index) for index in range(DRAWS)]


@pytest.mark.parametrize(
    ("changed", "probability"),
    [
        pytest.param(lambda d: d.quarter_turns != 0, 0.5, id="quarter turns"),
        pytest.param(lambda d: d.flips[0], 0.5, id="flip z"),
        pytest.param(lambda d: d.flips[1], 0.5, id="flip y"),
        pytest.param(lambda d: d.flips[2], 0.5, id="flip x"),
        pytest.param(lambda d: d.noise_std > 0, 0.3, id="noise"),
        pytest.param(lambda d: d.scale != 1, 0.3, id="scale"),
        pytest.param(lambda d: d.shift != 0, 0.3, id="shift"),
        pytest.param(lambda d: d.affine is not None, 0.3, id="affine"),
    ],
)
def test_each_change_has_the_probability_of_the_brief(many_draws, changed, probability):
    share = np.mean([changed(drawn) for drawn in many_draws])
    assert abs(share - probability) < 4 * math.sqrt(probability * (1 - probability) / DRAWS)


def test_one_two_and_three_quarter_turns_are_equally_likely(many_draws):
    turns = [drawn.quarter_turns for drawn in many_draws if drawn.quarter_turns]
    for number in (1, 2, 3):
        assert abs(turns.count(number) / len(turns) - 1 / 3) < 4 * math.sqrt(2 / 9 / len(turns))


@pytest.mark.parametrize(
    ("amount", "largest"),
    [
        pytest.param(lambda d: d.noise_std, 0.05, id="noise"),
        pytest.param(lambda d: abs(d.scale - 1), 0.1, id="scale"),
        pytest.param(lambda d: abs(d.shift), 0.1, id="shift"),
    ],
)
def test_amounts_reach_those_of_the_brief_and_no_further(many_draws, amount, largest):
    assert 0.95 * largest < max(map(amount, many_draws)) <= largest


def test_changes_are_independent_of_each_other(many_draws):
    flags = np.array(
        [[d.quarter_turns != 0, *d.flips, d.noise_std > 0, d.scale != 1, d.shift != 0] for d in many_draws], float
    )
    correlation = np.corrcoef(flags.T) - np.eye(flags.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_quarter_turns_are_half_turns_where_the_plane_is_not_square():
    augmentation = dataclasses.replace(NO_CHANGE, rotate90_prob=1.0)
    assert {draw(augmentation, i, shape=(8, 16, 12)).quarter_turns for i in range(50)} == {2}


def test_all_quarter_turns_happen_where_the_plane_is_square():
    augmentation = dataclasses.replace(NO_CHANGE, rotate90_prob=1.0)
    assert {draw(augmentation, i, shape=(8, 16, 16)).quarter_turns for i in range(50)} == {1, 2, 3}


def test_rotation_without_zoom_is_rigid_in_millimetres():
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0, zoom=0.0)
    spacing = np.diag([5.0, 2.0, 0.7])
    for index in range(20):
        in_mm = spacing @ draw(augmentation, index, spacing=(5.0, 2.0, 0.7)).affine @ np.linalg.inv(spacing)
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(in_mm) > 0


def test_rotation_about_each_axis_reaches_fifteen_degrees_and_no_further():
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0, zoom=0.0)
    turns = [draw(augmentation, index, spacing=(1.0, 1.0, 1.0)).affine for index in range(300)]
    degrees = np.abs(Rotation.from_matrix(turns).as_euler("xyz", degrees=True)).max(axis=0)
    assert (degrees > 14).all()
    assert (degrees < 15 + 1e-6).all()


def test_zoom_along_each_axis_reaches_ten_per_cent_and_no_further():
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0, rotate_degrees=0.0)
    sizes = np.array([1 / np.diag(draw(augmentation, index).affine) for index in range(300)])
    assert (sizes.max(axis=0) > 1.09).all() and (sizes.min(axis=0) < 0.91).all()
    assert sizes.max() < 1.1 + 1e-9 and sizes.min() > 0.9 - 1e-9


def test_affine_makes_no_nodule_at_a_point_beside_its_nodule():
    mask = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    mask[0, 2, 2, 2] = 1
    points = np.array([[2, 2, 2], [8, 8, 8]])
    _, kept = _apply_affine(torch.rand(1, 12, 12, 12), mask, np.eye(3), points)
    torch.testing.assert_close(kept, mask)


def test_affine_that_would_push_a_nodule_out_is_left_out():
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0)
    drawn = [draw(augmentation, index, points=[[0, 0, 0]]) for index in range(200)]
    assert any(d.affine is None for d in drawn)
    assert any(d.affine is not None for d in drawn)


def test_one_probability_does_not_move_the_draws_of_the_others():
    usual, certain = draw(Augmentation(), 3), draw(Augmentation(flip_prob=1.0), 3)
    assert certain.flips == (True, True, True)
    assert same(dataclasses.replace(certain, flips=usual.flips), usual)


# --------------------------------------------------------------------------------------------------- what is applied


def test_no_change_leaves_image_and_mask_as_they_are():
    image = np.random.default_rng(0).random((3, 4, 5), dtype=np.float32)
    moved, mask = augment(image, AugmentationParameters())
    np.testing.assert_array_equal(moved, image)
    np.testing.assert_array_equal(mask, image > 0.5)


def test_quarter_turn_and_flip_by_hand():
    image = np.array([[[1, 2], [3, 4]]], float)
    turned, _ = augment(image, AugmentationParameters(quarter_turns=1))
    flipped, _ = augment(image, AugmentationParameters(flips=(False, False, True)))
    np.testing.assert_array_equal(turned, [[[2, 4], [1, 3]]])
    np.testing.assert_array_equal(flipped, [[[2, 1], [4, 3]]])


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flips", itertools.product((False, True), repeat=3))
def test_image_and_mask_turn_and_flip_together(turns, flips):
    image = np.random.default_rng(0).random((4, 6, 6))
    moved, mask = augment(image, AugmentationParameters(quarter_turns=turns, flips=flips))
    np.testing.assert_array_equal(mask, moved > 0.5)


def ball(shape, spacing, center, radius_mm):
    """Smooth-edged ball in [0, 1]; spacing and centre voxel in (z, y, x)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((index - center) * np.asarray(spacing), axis=-1)
    return np.clip((radius_mm - distance) / 2 + 0.5, 0, 1)


def test_affine_moves_image_and_mask_together():
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0)
    spacing = (3.0, 1.0, 1.5)
    image = ball((20, 48, 40), spacing, (12, 16, 25), 9)
    for index in range(10):
        moved, mask = augment(image, draw(augmentation, index, image.shape, spacing))
        distance = np.subtract(ndimage.center_of_mass(moved), ndimage.center_of_mass(mask))
        assert np.linalg.norm(distance) < 0.5
        assert np.linalg.norm(np.subtract(ndimage.center_of_mass(moved), (12, 16, 25))) > 0.1


@pytest.mark.parametrize("index", range(4))
def test_affine_gives_the_image_that_scipy_gives(index):
    image = ndimage.gaussian_filter(np.random.default_rng(1).random((10, 14, 12)), 1)
    drawn = draw(dataclasses.replace(NO_CHANGE, affine_prob=1.0), index, image.shape, (3.0, 1.0, 2.0))
    center = (np.array(image.shape) - 1) / 2
    expected = ndimage.affine_transform(image, drawn.affine, center - drawn.affine @ center, order=1, mode="reflect")
    np.testing.assert_allclose(augment(image, drawn)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("drawn", "transforms"),
    [
        (AugmentationParameters(quarter_turns=1), [monai.Rotate90(1, spatial_axes=(1, 2))]),
        (AugmentationParameters(quarter_turns=3), [monai.Rotate90(3, spatial_axes=(1, 2))]),
        (AugmentationParameters(flips=(True, False, True)), [monai.Flip((0, 2))]),
        (
            AugmentationParameters(2, (False, True, False)),
            [monai.Rotate90(2, spatial_axes=(1, 2)), monai.Flip(1)],
        ),
        (
            AugmentationParameters(scale=1.08, shift=-0.06),
            [monai.ScaleIntensity(minv=None, maxv=None, factor=0.08), monai.ShiftIntensity(-0.06, safe=False)],
        ),
    ],
)
def test_turns_flips_and_intensities_are_those_of_monai(drawn, transforms):
    image = np.random.default_rng(0).random((8, 12, 12), dtype=np.float32)
    expected = monai.Compose(transforms)(torch.from_numpy(image)[None])[0]
    np.testing.assert_allclose(augment(image, drawn)[0], expected, atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_affine_of_image_and_mask_is_that_of_monai(index):
    image = ndimage.gaussian_filter(np.random.default_rng(1).random((10, 16, 14)), 1).astype(np.float32)
    drawn = draw(dataclasses.replace(NO_CHANGE, affine_prob=1.0), index, image.shape, (2.0, 1.0, 1.5))
    moved, mask = augment(image, drawn)
    matrix = np.eye(4)
    matrix[:3, :3] = drawn.affine
    given = torch.from_numpy(image)[None]
    for array, found, mode in ((given, moved, "bilinear"), ((given > 0.5).float(), mask, "nearest")):
        affine = monai.Affine(affine=matrix, mode=mode, padding_mode="reflection", align_corners=False, image_only=True)
        np.testing.assert_allclose(found, affine(array)[0], atol=1e-5)


def test_affine_of_angles_and_zooms_is_that_of_monai():
    angles, zooms = np.array([0.2, -0.15, 0.1]), np.array([1.1, 0.95, 1.05])
    expected = np.eye(4)
    for axis, angle in enumerate(angles):
        sense = -1 if axis == 1 else 1  # MONAI turns the other way about the middle axis
        turn = create_rotate(3, [sense * angle if axis == other else 0 for other in range(3)])
        expected = np.asarray(turn) @ expected
    expected = expected @ np.asarray(create_scale(3, list(1 / zooms)))
    np.testing.assert_allclose(_affine_matrix(angles, zooms, (1.0, 1.0, 1.0)), expected[:3, :3], atol=1e-12)


def test_noise_spreads_as_that_of_monai():
    image = torch.zeros(1, 40, 40, 40)
    theirs = monai.RandGaussianNoise(prob=1, std=0.04, sample_std=False).set_random_state(0)(image)
    ours, _ = augment(image[0], AugmentationParameters(noise_std=0.04, noise_seed=1))
    assert ours.std() == pytest.approx(float(theirs.std()), rel=0.02)


def moments_mm(image, spacing):
    """Second moments (3, 3) of the brightness in mm^2."""
    index = np.stack(np.meshgrid(*map(np.arange, image.shape), indexing="ij"), axis=-1) * np.asarray(spacing)
    points, weights = index.reshape(-1, 3), image.reshape(-1)
    return np.cov(points.T, aweights=weights)


def test_rotation_keeps_a_ball_a_ball_on_an_anisotropic_grid():
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0, zoom=0.0)
    spacing = (2.0, 1.0, 2.0)
    image = ball((32, 64, 32), spacing, (15.5, 31.5, 15.5), 20)
    before = moments_mm(image, spacing)
    for index in range(5):
        after = moments_mm(augment(image, draw(augmentation, index, image.shape, spacing))[0], spacing)
        np.testing.assert_allclose(after, before, atol=0.03 * before[0, 0])


def test_rotation_after_a_quarter_turn_keeps_a_ball_a_ball():
    # The plane is square in voxels, not in mm: after an odd quarter turn the spacings of y and x have changed places.
    augmentation = dataclasses.replace(NO_CHANGE, affine_prob=1.0, zoom=0.0, rotate90_prob=1.0)
    image = ball((32, 48, 48), (2.0, 1.0, 2.0), (15.5, 23.5, 23.5), 16)
    for index in range(8):
        drawn = draw(augmentation, index, image.shape, (2.0, 1.0, 2.0))
        after = moments_mm(augment(image, drawn)[0], (2.0, 2.0, 1.0) if drawn.quarter_turns % 2 else (2.0, 1.0, 2.0))
        np.testing.assert_allclose(after, np.eye(3) * after.trace() / 3, atol=0.05 * after.trace() / 3)


def test_mask_stays_zero_and_one_under_an_affine():
    image = ball((10, 20, 20), (1, 1, 1), (4, 9, 9), 4)
    drawn = draw(dataclasses.replace(NO_CHANGE, affine_prob=1.0), 0, image.shape, (1.0, 1.0, 1.0))
    _, mask = augment(image, drawn)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}


def test_points_follow_the_array_under_turns_and_flips():
    augmentation = dataclasses.replace(NO_CHANGE, rotate90_prob=0.8, flip_prob=0.5)
    for shape, index in itertools.product([(4, 7, 7), (4, 7, 5)], range(40)):
        image = np.zeros(shape)
        image[1, 2, 4] = 1
        drawn = draw(augmentation, index, shape, points=[[1, 2, 4]])
        np.testing.assert_array_equal(drawn.points, np.argwhere(augment(image, drawn)[0]))


@pytest.mark.parametrize("voxel", [(2, 5, 7), (0, 0, 0), (5, 11, 3)])
def test_nodule_of_one_voxel_never_vanishes(voxel):
    image = np.zeros((6, 12, 12))
    image[voxel] = 1
    for index in range(300):
        drawn = draw(Augmentation(affine_prob=1.0), index, image.shape, (5.0, 1.4, 1.4), [voxel])
        assert augment(image, drawn)[1].any()


def test_noise_has_its_standard_deviation():
    noisy, _ = augment(np.zeros((20, 20, 25)), AugmentationParameters(noise_std=0.05, noise_seed=7))
    assert noisy.std() == pytest.approx(0.05, rel=0.04)
    assert abs(noisy.mean()) < 4 * 0.05 / 100


def test_noise_is_the_same_for_the_same_seed_only():
    first, again, other = (
        augment(np.zeros((2, 3, 4)), AugmentationParameters(noise_std=0.05, noise_seed=seed))[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_scale_multiplies_and_shift_adds():
    moved, mask = augment(np.full((1, 1, 2), 0.6), AugmentationParameters(scale=1.1, shift=-0.05))
    np.testing.assert_allclose(moved, 0.61, rtol=1e-6)
    np.testing.assert_array_equal(mask, 1)


@pytest.fixture
def two_scans(tmp_path):
    """A scan with a 6 mm nodule of 0.8 at (10, 10, 10) and one without, both lung of 0.1 elsewhere; 1 mm voxels."""
    images, masks = np.full((2, 24, 24, 24), 0.1, np.float16), np.zeros((2, 24, 24, 24), np.uint8)
    masks[0][np.linalg.norm(np.mgrid[-10:14, -10:14, -10:14], axis=0) <= 3] = 1
    images[0][masks[0] == 1] = 0.8
    nodule = nodule_at(10.0, 10.0, 10.0, diameter_mm=6.0, voxels=int(masks[0].sum()))
    for index, nodules in enumerate([[nodule], []]):
        for kind, array in (("images", images[index]), ("masks", masks[index])):
            (tmp_path / kind).mkdir(exist_ok=True)
            np.save(tmp_path / kind / f"{index}.npy", array)
        write_metadata(tmp_path, metadata_of(*nodules, seriesuid=str(index), shape_zyx=(24, 24, 24)))
        (tmp_path / "points").mkdir(exist_ok=True)
        np.save(tmp_path / "points" / f"{index}.npy", np.argwhere(masks[index] < 2).astype(np.int32))  # all is lung
    return tmp_path


def pasted(folder, patch_size_zyx=(16, 16, 16), **changes):
    augmentation = dataclasses.replace(NO_CHANGE, **({"paste_prob": 1.0} | changes))
    return LUNA16Dataset(folder, ["0", "1"], augmentation, patch_size_zyx=patch_size_zyx)


def test_patch_without_a_nodule_gets_one_of_another_scan_with_its_mask(two_scans):
    sample = pasted(two_scans)[SampleKey(0, 0, 1, (12, 12, 12))]
    image, mask = sample["image"][0].numpy(), sample["mask"][0].numpy()
    assert mask.sum() == np.load(two_scans / "masks" / "0.npy").sum()
    np.testing.assert_array_equal(image, np.where(mask == 1, np.float16(0.8), np.float16(0.1)))
    np.testing.assert_allclose(sample["augmentation"].points, [np.argwhere(mask).mean(axis=0)], atol=0.6)


def test_pasted_nodules_lie_in_many_places_of_their_patches(two_scans):
    data = pasted(two_scans)
    places = [data[SampleKey(0, place, 1, (12, 12, 12))]["augmentation"].points[0] for place in range(60)]
    assert (np.ptp(places, axis=0) >= 5).all()  # of 16, in which the nodule takes 11


def test_nodules_are_pasted_beside_a_vessel_rather_than_far_from_any(two_scans):
    image = np.load(two_scans / "images" / "1.npy")
    image[9, 9, :] = 0.6
    np.save(two_scans / "images" / "1.npy", image)
    data = pasted(two_scans)
    masks = [data[SampleKey(0, place, 1, (12, 12, 12))]["mask"][0].numpy() for place in range(60)]
    touching = np.mean([mask[5, 5].any() for mask in masks])
    np.save(two_scans / "images" / "1.npy", np.full((24, 24, 24), 0.1, np.float16))
    masks = [data[SampleKey(0, place, 1, (12, 12, 12))]["mask"][0].numpy() for place in range(60)]
    assert touching > 1.5 * np.mean([mask[5, 5].any() for mask in masks]) > 0  # where there is no vessel


def test_stored_scans_stay_as_they_are_when_nodules_are_pasted(two_scans):
    pasted(two_scans)[SampleKey(0, 0, 1, (12, 12, 12))]
    assert not np.load(two_scans / "masks" / "1.npy").any()


def test_pasted_nodule_lets_what_is_brighter_shine_through(two_scans):
    image = np.load(two_scans / "images" / "1.npy")
    image[12, 12, :] = 0.95  # a vessel
    np.save(two_scans / "images" / "1.npy", image)
    sample = pasted(two_scans)[SampleKey(0, 0, 1, (12, 12, 12))]
    np.testing.assert_array_equal(sample["image"][0, 8, 8].numpy(), np.float16(0.95))
    assert sample["mask"][0, 8, 8].any()


def test_no_nodule_is_pasted_into_tissue(two_scans):
    np.save(two_scans / "images" / "1.npy", np.full((24, 24, 24), 0.7, np.float16))
    assert not pasted(two_scans)[SampleKey(0, 0, 1, (12, 12, 12))]["mask"].any()


def test_patch_with_a_nodule_gets_no_second_one(two_scans):
    sample = pasted(two_scans)[SampleKey(0, 0, 0, (10, 10, 10))]
    assert sample["mask"].sum() == np.load(two_scans / "masks" / "0.npy").sum()


def test_nodules_are_pasted_as_often_as_asked(two_scans):
    data = pasted(two_scans, paste_prob=0.3)
    shown = [bool(data[SampleKey(0, place, 1, (12, 12, 12))]["mask"].any()) for place in range(400)]
    assert abs(np.mean(shown) - 0.3) < 0.08


def test_nodule_that_has_no_room_in_a_patch_is_not_pasted(two_scans):
    augmentation = dataclasses.replace(NO_CHANGE, paste_prob=1.0)
    data = LUNA16Dataset(two_scans, ["0", "1"], augmentation, patch_size_zyx=(8, 8, 8))
    assert not data[SampleKey(0, 0, 1, (12, 12, 12))]["mask"].any()


def test_nodules_are_pasted_into_whole_scans(two_scans, monkeypatch):
    monkeypatch.setattr(dataset, "MOST_PASTED", 1.0)
    sample = pasted(two_scans, None, paste_per_scan=9)[SampleKey(0, 0, 1, pastes=3)]
    mask, points = sample["mask"][0].numpy(), sample["augmentation"].points.astype(int)
    assert len(points) == 3 and len(np.unique(points, axis=0)) > 1
    assert mask[tuple(points.T)].all()
    size = np.load(two_scans / "masks" / "0.npy").sum()
    assert size < mask.sum() <= 3 * size
    assert not np.load(two_scans / "masks" / "1.npy").any()  # what is stored stays as it is


def test_nodules_of_whole_scans_are_pasted_into_the_lungs_alone(two_scans):
    np.save(two_scans / "points" / "1.npy", np.array([[8, 8, 15], [15, 9, 8]], np.int32))
    data = pasted(two_scans, None, paste_per_scan=1)
    places = {tuple(data[SampleKey(epoch, 0, 1, pastes=1)]["augmentation"].points[0]) for epoch in range(20)}
    assert places == {(8, 8, 15), (15, 9, 8)}


def test_nodule_that_its_scan_cuts_off_is_not_pasted(two_scans):
    nodule = nodule_at(2.0, 10.0, 10.0, diameter_mm=6.0, voxels=100)
    write_metadata(two_scans, metadata_of(nodule, seriesuid="0", shape_zyx=(24, 24, 24)))
    assert not pasted(two_scans, None, paste_per_scan=3)[SampleKey(0, 0, 1, pastes=3)]["mask"].any()


def test_nodule_that_the_lung_mask_cuts_is_not_pasted(two_scans):
    nodule = nodule_at(10.0, 10.0, 10.0, diameter_mm=6.0, voxels=100)
    cut = dataclasses.replace(nodule, cut_by_lungs=True, mean_hu=-100.0)
    write_metadata(two_scans, metadata_of(cut, seriesuid="0", shape_zyx=(24, 24, 24)))
    assert not pasted(two_scans, None, paste_per_scan=3)[SampleKey(0, 0, 1, pastes=3)]["mask"].any()


def test_no_patch_is_drawn_around_a_nodule_that_the_lung_mask_blackens():
    here, there = (nodule_at(z, 10.0, 10.0, diameter_mm=6.0, voxels=100) for z in (5.0, 15.0))
    for mean_hu, drawn in ((-990.0, [[5, 10, 10]]), (-100.0, [[5, 10, 10], [15, 10, 10]])):
        metadata = metadata_of(
            here, dataclasses.replace(there, cut_by_lungs=True, mean_hu=mean_hu), shape_zyx=(24, 24, 24)
        )
        assert nodule_points(metadata).tolist() == drawn


def test_without_a_nodule_in_any_scan_nothing_is_pasted(two_scans):
    data = LUNA16Dataset(two_scans, ["1"], dataclasses.replace(NO_CHANGE, paste_per_scan=3))
    assert not data[SampleKey(0, 0, 0, pastes=3)]["mask"].any()


def test_fewer_nodules_are_pasted_in_the_last_quarter_of_the_epochs():
    sampler, numbers = ScanSampler(3, seed=0, pastes=10, epochs=8), []
    for sampler.epoch in range(8):
        numbers.append({key.pastes for key in sampler})
    assert numbers == [{10}, {10}, {10}, {10}, {10}, {10}, {10}, {5}]


def donors(volumes, number=20, most_voxels=math.inf, seeds=3000):
    """Nodules that are drawn of some with so many voxels, for each seed."""
    data = LUNA16Dataset.__new__(LUNA16Dataset)
    data._volumes = np.array(volumes)
    return [data._donors_of_one_size(number, most_voxels, np.random.default_rng(seed)) for seed in range(seeds)]


def test_nodules_of_one_sample_are_near_in_size_and_the_first_is_any():
    volumes = np.array([10, 20, 21, 40, 500, 900])
    drawn = donors(volumes)
    assert all((volumes[numbers].max() <= 2 * volumes[numbers[0]]) for numbers in drawn)
    assert all((volumes[numbers].min() >= volumes[numbers[0]] / 2) for numbers in drawn)
    assert all(len(set(numbers)) > 1 for numbers in drawn)
    np.testing.assert_allclose(np.bincount([numbers[0] for numbers in drawn]) / 3000, 1 / 6, atol=0.03)
    assert {len(numbers) for numbers in donors(volumes, number=1)} == {1}


def test_pasted_nodules_take_a_small_part_of_a_scan():
    assert [len(numbers) for numbers in donors([30], most_voxels=100, seeds=1)] == [3]
    assert [len(numbers) for numbers in donors([300], most_voxels=100, seeds=1)] == [1]


def test_nodules_of_few_voxels_are_not_pasted_beside_larger_ones(two_scans):
    few, many = nodule_at(8.0, 8.0, 8.0, voxels=7), nodule_at(12.0, 12.0, 12.0, voxels=8)
    for nodules, expected in (([few, many], [8]), ([few], [7])):
        write_metadata(two_scans, metadata_of(*nodules, seriesuid="0", shape_zyx=(24, 24, 24)))
        assert pasted(two_scans, None, paste_per_scan=1)._volumes.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip_prob": 1.5}, "flip_prob must be at most 1"),
        ({"noise_prob": -0.1}, "noise_prob must not be negative"),
        ({"noise_std": math.nan}, "noise_std must not be negative"),
        ({"zoom": 1.0}, "zoom must be below 1"),
    ],
)
def test_impossible_augmentation_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**change)


def test_each_sample_of_a_batch_has_its_own_change():
    images = torch.arange(4.0).reshape(1, 1, 1, 1, 4).repeat(2, 1, 1, 1, 1)
    drawn = [AugmentationParameters(), AugmentationParameters(flips=(False, False, True))]
    moved, masks = augment_batch(images, images > 1.5, drawn)
    assert moved[:, 0, 0, 0].tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert masks[:, 0, 0, 0].tolist() == [[False, False, True, True], [True, True, False, False]]


# ------------------------------------------------------------------------------------------------- samples, batches


@pytest.fixture
def uids(processed_dir):
    return read_processed_list(processed_dir)


def test_sample_without_augmentation_is_what_is_stored(processed_dir, uids):
    sample = LUNA16Dataset(processed_dir, uids)[SampleKey(5, 0, 2)]
    scan = read_processed(processed_dir, uids[2])
    assert sample["augmentation"] is None
    assert sample["seriesuid"] == uids[2]
    assert (sample["image"].dtype, sample["mask"].dtype) == (torch.float16, torch.uint8)
    np.testing.assert_array_equal(sample["image"][0], scan.image)
    np.testing.assert_array_equal(sample["mask"][0], scan.mask)


def test_plain_index_is_of_epoch_zero(processed_dir, uids):
    dataset = LUNA16Dataset(processed_dir, uids, Augmentation())
    assert same(dataset[1]["augmentation"], dataset[SampleKey(0, 1, 1)]["augmentation"])


@pytest.mark.parametrize("cache", ["device", "memory"])
def test_scans_that_are_kept_give_the_same_samples_without_their_files(processed_dir, uids, tmp_path, cache):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    augmentation = Augmentation(paste_prob=1)
    kept = LUNA16Dataset(data, uids, augmentation, patch_size_zyx=(8, 8, 8), cache=cache)
    mapped = LUNA16Dataset(processed_dir, uids, augmentation, patch_size_zyx=(8, 8, 8))
    shutil.rmtree(data)
    for scan in range(len(uids)):
        key = SampleKey(0, scan, scan, (10, 20, 30))
        assert torch.equal(kept[key]["image"], mapped[key]["image"])
        assert torch.equal(kept[key]["mask"], mapped[key]["mask"])


def test_no_file_of_a_scan_stays_open(processed_dir, uids):
    dataset = LUNA16Dataset(processed_dir, uids)
    before = psutil.Process().num_fds()
    samples = [dataset[index] for index in range(len(uids))]
    assert psutil.Process().num_fds() == before and len(samples) == len(uids)


@pytest.mark.parametrize(("free", "kept"), [(2.01, True), (1.99, False)])
def test_scans_are_kept_in_memory_where_half_of_it_is_free(processed_dir, uids, monkeypatch, caplog, free, kept):
    caplog.set_level("INFO")
    taken = 3 * 32 * 48 * 48 * len(uids)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free * taken))
    assert LUNA16Dataset(processed_dir, uids, cache=None).cache == ("memory" if kept else "files")
    assert ("kept in memory" in caplog.text) == kept


@pytest.mark.parametrize(
    ("free", "paste_prob", "paste_per_scan", "patch_size", "cache"),
    [
        (2.01, 0.0, 0, None, "device"),
        (1.99, 0.0, 0, None, "memory"),
        (2.01, 0.0, 1, None, "memory"),
        (2.01, 0.0, 1, (16, 16, 16), "device"),
        (2.01, 0.1, 0, (16, 16, 16), "memory"),
    ],
)
def test_scans_are_kept_on_a_gpu_where_half_of_it_is_free(
    processed_dir, uids, monkeypatch, free, paste_prob, paste_per_scan, patch_size, cache
):
    augmentation = Augmentation(paste_prob=paste_prob, paste_per_scan=paste_per_scan)
    dataset = LUNA16Dataset(processed_dir, uids, augmentation, patch_size_zyx=patch_size)
    taken = 3 * 32 * 48 * 48 * len(uids)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * taken), 0))
    assert dataset._choose_cache(torch.device("cuda")) == cache


def test_samples_of_files_are_copies(processed_dir, uids):
    dataset = LUNA16Dataset(processed_dir, uids)
    before = dataset[0]["image"].clone()
    dataset[0]["image"].fill_(0.5)
    assert torch.equal(dataset[0]["image"], before)


def test_same_seed_epoch_and_place_draw_the_same(processed_dir, uids):
    first, second = (LUNA16Dataset(processed_dir, uids, Augmentation(), seed=4)[SampleKey(7, 1, 2)] for _ in range(2))
    assert same(first["augmentation"], second["augmentation"])


@pytest.mark.parametrize(("seed", "epoch", "place"), [(5, 7, 0), (4, 8, 0), (4, 7, 1)])
def test_another_seed_epoch_or_place_draws_something_else(processed_dir, uids, seed, epoch, place):
    first = LUNA16Dataset(processed_dir, uids, Augmentation(), seed=4)[SampleKey(7, 0, 2)]["augmentation"]
    second = LUNA16Dataset(processed_dir, uids, Augmentation(), seed=seed)[SampleKey(epoch, place, 2)]["augmentation"]
    assert first.noise_seed != second.noise_seed


def test_points_of_a_sample_are_its_nodules_as_they_were_moved(processed_dir, uids):
    augmentation = dataclasses.replace(NO_CHANGE, flip_prob=1.0)
    drawn = LUNA16Dataset(processed_dir, uids, augmentation)[0]["augmentation"]
    nodules = read_metadata(processed_dir, uids[0]).nodules
    expected = [np.array([31, 47, 47]) - np.rint(nodule.index_zyx) for nodule in nodules]
    np.testing.assert_array_equal(drawn.points, expected)


def test_nodule_without_a_voxel_is_no_point():
    nodules = nodule_at(0.4, 1.6, 3.2), nodule_at(9.0, 9.0, 9.0, voxels=0)
    points = nodule_points(metadata_of(*nodules, shape_zyx=(2, 3, 4)))
    np.testing.assert_array_equal(points, [[0, 2, 3]])


def test_scan_without_nodules_has_no_points():
    assert nodule_points(metadata_of(shape_zyx=(2, 3, 4))).shape == (0, 3)


def test_point_of_a_nodule_that_reaches_in_from_outside_lies_on_the_array():
    points = nodule_points(metadata_of(nodule_at(2.3, 1.0, -1.4), shape_zyx=(2, 3, 4)))
    np.testing.assert_array_equal(points, [[1, 1, 0]])


def test_scan_that_is_not_there_is_an_error(processed_dir):
    with pytest.raises(FileNotFoundError, match=r"run python preprocess\.py first"):
        LUNA16Dataset(processed_dir, ["1.2.3"])


def batches(dataset, workers):
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=ScanSampler(len(dataset), seed=3),
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context="fork" if workers else None,
    )
    return [
        (*augment_batch(batch["image"].float(), batch["mask"], batch["augmentation"]), batch["seriesuid"])
        for batch in loader
    ]


def test_batches_do_not_depend_on_the_number_of_workers(processed_dir, uids):
    dataset = LUNA16Dataset(processed_dir, uids, Augmentation(affine_prob=1.0, noise_prob=1.0), seed=1)
    for (image, mask, names), (image2, mask2, names2) in zip(batches(dataset, 0), batches(dataset, 2), strict=True):
        assert names == names2
        assert torch.equal(image, image2)
        assert torch.equal(mask, mask2)


def test_collate_stacks_arrays_and_lists_the_rest():
    sample = {"image": torch.zeros(1, 2, 3, 4), "mask": torch.zeros(1, 2, 3, 4), "seriesuid": "a", "augmentation": None}
    batch = collate([sample, sample | {"seriesuid": "b"}])
    assert batch["image"].shape == batch["mask"].shape == (2, 1, 2, 3, 4)
    assert (batch["seriesuid"], batch["augmentation"]) == (["a", "b"], [None, None])


def test_collate_refuses_scans_of_different_shapes():
    samples = [{"image": torch.zeros(1, *shape), "mask": torch.zeros(1, *shape)} for shape in ((2, 3, 4), (2, 3, 5))]
    with pytest.raises(ValueError, match=r"must have one shape, not \[\(2, 3, 4\), \(2, 3, 5\)\].*target_size"):
        collate(samples)


def test_sampler_yields_each_scan_once_whole_and_numbered():
    sampler = ScanSampler(5, seed=0)
    sampler.epoch = 7
    keys = list(sampler)
    assert len(sampler) == 5
    assert [(key.epoch, key.position, key.center_zyx) for key in keys] == [(7, place, None) for place in range(5)]
    assert sorted(key.scan for key in keys) == [0, 1, 2, 3, 4]


def order(seed, epoch):
    sampler = ScanSampler(20, seed)
    sampler.epoch = epoch
    return [key.scan for key in sampler]


def test_sampler_order_is_the_same_for_the_same_seed_and_epoch():
    assert order(1, 2) == order(1, 2)


@pytest.mark.parametrize(("seed", "epoch"), [(1, 3), (2, 2)])
def test_sampler_order_differs_for_another_seed_or_epoch(seed, epoch):
    assert order(1, 2) != order(seed, epoch)


def test_loader_of_a_cpu_uses_no_workers(processed_dir, uids):
    dataset = LUNA16Dataset(processed_dir, uids)
    loader = make_loader(dataset, ScanSampler(4, 0), 3, num_workers=4, device=torch.device("cpu"))
    assert loader.num_workers == 0
    assert [len(batch["seriesuid"]) for batch in loader] == [3, 1]


# ----------------------------------------------------------------------------------------------------------- patches

TWO_SCANS = [metadata_of(nodule_at(10.0, 20.0, 30.0, voxels=500), nodule_at(8.0, 8.0, 8.0, voxels=1)), metadata_of()]
LUNG_POINTS = [[(5, 5, 5), (6, 6, 6)], [(30, 30, 30)]]


def patch_sampler(seed=0, **settings):
    settings = {"per_scan": 1000, "nodule_share": 0.5, "hard_share": 0.25, "warmup_epochs": 0} | settings
    return PatchSampler(TWO_SCANS, LUNG_POINTS, Patches((8, 8, 8), **settings), seed)


@pytest.mark.parametrize(("epoch", "share"), [(0, 1.0), (2, 0.75), (4, 0.5), (9, 0.5)])
def test_share_of_nodule_patches_falls_over_the_warmup(epoch, share):
    sampler = patch_sampler(warmup_epochs=4)
    sampler.epoch = epoch
    lungs = [(5, 5, 5), (6, 6, 6), (30, 30, 30)]
    around_nodules = sum(key.center_zyx not in lungs for key in sampler)
    assert around_nodules / 2000 == pytest.approx(share, abs=4 * np.sqrt(0.25 / 2000))


def test_negative_warmup_is_refused():
    with pytest.raises(ValueError, match="warmup_epochs must not be negative"):
        patch_sampler(warmup_epochs=-1)


def near(key, point):
    return key.scan == 0 and np.abs(np.subtract(key.center_zyx, point)).max() <= 3


def test_patch_lies_around_its_centre():
    np.testing.assert_array_equal(patch_start((10, 20, 30), (40, 40, 40), (4, 6, 8)), [8, 17, 26])


def test_patch_at_an_edge_is_moved_inside():
    np.testing.assert_array_equal(patch_start((0, 39, 50), (40, 40, 40), (4, 6, 8)), [0, 34, 32])


def test_patch_is_the_part_of_the_array_at_its_start():
    array = torch.arange(60).reshape(3, 4, 5)
    np.testing.assert_array_equal(cut_patch(array, np.array([1, 0, 2]), (2, 2, 2)), array[1:3, 0:2, 2:4])


def test_array_smaller_than_the_patch_is_filled_up_with_air():
    array = torch.ones((1, 2, 2))
    start = patch_start((0, 0, 0), array.shape, (2, 2, 3))
    np.testing.assert_array_equal(cut_patch(array, start, (2, 2, 3)), [[[1, 1, 0], [1, 1, 0]], [[0] * 3] * 2])


@pytest.mark.parametrize(("start", "size"), [((-1, -2, 3), (3, 4, 3)), ((-3, 0, 0), (2, 2, 2)), ((5, 1, 1), (2, 2, 2))])
def test_patch_that_reaches_out_of_its_array_is_filled_up_with_air(start, size):
    array = torch.arange(1, 61).reshape(3, 4, 5)
    wide = np.pad(array, 10)[tuple(slice(10 + s, 10 + s + n) for s, n in zip(start, size, strict=True))]
    np.testing.assert_array_equal(cut_patch(array, np.array(start), size), wide)


def test_patch_of_a_piece_of_a_scan_may_reach_out_of_it(processed_dir, tmp_path):
    shutil.copytree(processed_dir, tmp_path / "data")
    uid = read_processed_list(processed_dir)[0]
    metadata = read_metadata(processed_dir, uid)
    piece = dataclasses.replace(metadata.scan_geometry, spacing=(1.0, 1.0, 1.0))
    write_metadata(tmp_path / "data", dataclasses.replace(metadata, scan_geometry=piece))
    found = []
    for folder in (processed_dir, tmp_path / "data"):
        data = LUNA16Dataset(folder, [uid], patch_size_zyx=(8, 8, 8))
        found.append(data[SampleKey(0, 0, 0, (1, 20, 20))]["image"][0].numpy())
    whole, piece = found
    np.testing.assert_array_equal(piece[3:], whole[:5])
    assert not piece[:3].any()


def test_sample_of_a_patch_is_cut_from_image_and_mask(processed_dir, uids):
    sample = LUNA16Dataset(processed_dir, uids, patch_size_zyx=(8, 12, 16))[SampleKey(0, 0, 0, (10, 20, 24))]
    scan = read_processed(processed_dir, uids[0])
    np.testing.assert_array_equal(sample["image"][0], scan.image[6:14, 14:26, 16:32])
    np.testing.assert_array_equal(sample["mask"][0], scan.mask[6:14, 14:26, 16:32])


def test_points_of_a_patch_are_those_of_the_nodules_in_it(processed_dir, uids):
    center = nodule_points(read_metadata(processed_dir, uids[0]))[0]
    dataset = LUNA16Dataset(processed_dir, uids, NO_CHANGE, patch_size_zyx=(4, 4, 4))
    sample = dataset[SampleKey(0, 0, 0, tuple(center.tolist()))]
    assert [2, 2, 2] in sample["augmentation"].points.astype(int).tolist()
    assert len(sample["augmentation"].points) < len(read_metadata(processed_dir, uids[0]).nodules)


def test_epoch_has_the_asked_for_number_of_patches_for_each_scan():
    sampler = patch_sampler(per_scan=7)
    assert len(sampler) == len(list(sampler)) == 14


def test_half_of_the_patches_are_around_nodules_and_each_nodule_is_equally_likely():
    keys = list(patch_sampler())
    assert [len(scan.nodules) for scan in TWO_SCANS] == [2, 0]  # of 500 voxels and of 1
    for point in ([10, 20, 30], [8, 8, 8]):
        share = np.mean([near(key, point) and key.center_zyx not in ((5, 5, 5), (6, 6, 6)) for key in keys])
        # Of the second nodule's 7 x 7 x 7 places two are those of the lungs' points, too.
        assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000) + 0.25 * 2 / 343


def test_other_patches_are_around_lung_points_of_all_scans():
    keys = list(patch_sampler(nodule_share=0))
    assert {(key.scan, key.center_zyx) for key in keys} == {(0, (5, 5, 5)), (0, (6, 6, 6)), (1, (30, 30, 30))}
    assert abs(np.mean([key.scan for key in keys]) - 0.5) < 4 * math.sqrt(0.25 / 2000)


def test_patch_around_a_nodule_holds_its_centre():
    for key in patch_sampler(nodule_share=1):
        start = patch_start(key.center_zyx, (40, 40, 40), (8, 8, 8))
        inside = [((start <= p) & (p < start + 8)).all() for p in np.array([[10, 20, 30], [8, 8, 8]])]
        assert any(inside)


def test_data_set_without_nodules_gives_patches_of_the_lungs():
    patches = Patches((8, 8, 8), 5, nodule_share=1.0, hard_share=0.5, warmup_epochs=0)
    sampler = PatchSampler(TWO_SCANS[1:], LUNG_POINTS[1:], patches, seed=0)
    assert {key.center_zyx for key in sampler} == {(30, 30, 30)}


def test_patches_are_the_same_for_the_same_seed_and_epoch():
    assert list(patch_sampler()) == list(patch_sampler())


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_patches_differ_for_another_seed_or_epoch(seed, epoch):
    sampler = patch_sampler(seed=seed)
    sampler.epoch = epoch
    assert [key.center_zyx for key in sampler] != [key.center_zyx for key in patch_sampler()]


def test_sampler_opens_no_array(processed_dir, uids, monkeypatch):
    load = np.load

    def refuse(path, **kwargs):
        assert path.parent.name == "points", "an array was opened"
        return load(path, **kwargs)

    monkeypatch.setattr(np, "load", refuse)
    dataset = LUNA16Dataset(processed_dir, uids, Augmentation(), patch_size_zyx=(16, 16, 16))
    patches = Patches((16, 16, 16), 10, 0.5, 0.5, warmup_epochs=0)
    sampler = PatchSampler(dataset.metadata, dataset.lung_points(), patches, seed=0)
    sampler.record(list(sampler), [0.9] * 40)
    assert len(list(sampler)) == 40
    with pytest.raises(AssertionError, match="an array was opened"):  # the trap works
        dataset[next(iter(sampler))]


@pytest.mark.parametrize(("count", "share"), [(1, 2 / 2000), (50, 100 / 2000), (250, 0.25), (900, 0.25)])
def test_hard_patches_are_drawn_again_as_often_as_asked_and_each_twice_at_most(count, share):
    sampler = patch_sampler(nodule_share=0, hard_share=0.25)
    hard = [SampleKey(0, 0, 1, (20, 20, x)) for x in range(count)]
    sampler.record([*hard, SampleKey(0, 0, 1, (1, 1, 1))], [1.0, *[0.5] * (count - 1), 0.1])
    centers = [key.center_zyx for key in sampler]
    again = np.mean([center[:2] == (20, 20) for center in centers])
    assert abs(again - share) < 4 * math.sqrt(share * (1 - share) / 2000)
    assert (1, 1, 1) not in centers


def test_patch_that_is_mastered_is_no_longer_hard():
    sampler = patch_sampler()
    key = SampleKey(0, 0, 1, (20, 20, 20))
    sampler.record([key], [0.9])
    sampler.record([key], [0.2])
    assert sampler.hard == {}


def test_patch_that_shows_a_nodule_becomes_no_hard_one_and_one_with_a_pasted_nodule_stays():
    sampler = patch_sampler()
    hard, nodule = SampleKey(0, 0, 1, (20, 20, 20)), SampleKey(0, 1, 0, (8, 8, 8))
    sampler.record([hard, nodule], [0.9, math.nan])
    sampler.record([hard], [math.nan])
    assert sampler.hard == {(1, (20, 20, 20)): 0.9}


def test_only_the_hardest_patches_are_kept():
    sampler = patch_sampler(per_scan=1)
    sampler.record([SampleKey(0, i, 0, (i, i, i)) for i in range(3)], [0.6, 0.9, 0.8])
    assert sampler.hard == {(0, (1, 1, 1)): 0.9, (0, (2, 2, 2)): 0.8}


def test_hard_patches_survive_a_resume():
    sampler, resumed = patch_sampler(), patch_sampler()
    sampler.record([SampleKey(0, 0, 1, (20, 20, 20))], [0.9])
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert list(resumed) == list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodule_share": 1.1}, "nodule_share must be between 0 and 1"),
        ({"hard_share": -0.1}, "hard_share must be between 0 and 1"),
        ({"per_scan": 0}, "per_scan must be at least 1"),
    ],
)
def test_impossible_sampling_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        patch_sampler(**arguments)


# ------------------------------------------------------------------------------------------------------------ splits


@pytest.fixture
def make_scans(tmp_path):
    """Writes metadata of scans with and without nodules; returns their names.

    The scans n<i> and e<i> are of fold i % subsets, or of none, and of the patient that ``patients`` tells by the name.
    """

    def make(with_nodules, without=0, subsets=None, patients=None):
        names = [f"n{i:02d}" for i in range(with_nodules)] + [f"e{i:02d}" for i in range(without)]
        for name in names:
            nodules = [nodule_at(1.0, 1.0, 1.0)] if name.startswith("n") else []
            fold = int(name[1:]) % subsets if subsets else None
            patient = patients(name) if patients else None
            write_metadata(tmp_path, metadata_of(*nodules, seriesuid=name, fold=fold, patient=patient))
        return names

    return make


def test_a_fifth_of_the_scans_is_for_validation(tmp_path, make_scans):
    split = make_split(tmp_path, make_scans(10, 10))
    assert (len(split.train), len(split.validation)) == (16, 4)


def test_split_is_stratified_by_having_a_nodule(tmp_path, make_scans):
    names = make_scans(10, 5)
    for seed in range(5):
        validation = make_split(tmp_path, names, seed=seed).validation
        assert sorted(name[0] for name in validation) == ["e", "n", "n"]


def test_split_is_complete_and_disjoint(tmp_path, make_scans):
    names = make_scans(7, 6)
    split = make_split(tmp_path, names, 0.3)
    assert sorted(split.train + split.validation) == sorted(names)


def test_split_is_the_same_for_the_same_seed_in_whatever_order_the_scans_come(tmp_path, make_scans):
    names = make_scans(8, 8)
    assert make_split(tmp_path, names, seed=2) == make_split(tmp_path, names[::-1], seed=2)


def test_split_differs_for_another_seed(tmp_path, make_scans):
    names = make_scans(8, 8)
    assert len({tuple(make_split(tmp_path, names, seed=seed).validation) for seed in range(5)}) > 1


def test_split_is_sorted(tmp_path, make_scans):
    split = make_split(tmp_path, make_scans(12, 12, subsets=3)[::-1], 0.5, fold=1)
    parts = [getattr(split, part) for part in ("train", "validation", "test")]
    assert all(len(part) > 1 for part in parts)
    assert parts == [tuple(sorted(part)) for part in parts]


def test_split_without_a_fold_holds_out_nothing(tmp_path, make_scans):
    split = make_split(tmp_path, make_scans(8, 8))
    assert (split.test, split.fold) == ((), None)


@pytest.mark.parametrize("counts", [(2, 0), (1, 1), (0, 2), (3, 0), (1, 3)])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_each_side_has_a_scan(tmp_path, make_scans, counts, fraction):
    split = make_split(tmp_path, make_scans(*counts), fraction)
    assert split.train and split.validation


def test_validation_has_a_nodule_where_two_scans_have_one(tmp_path, make_scans):
    split = make_split(tmp_path, make_scans(2, 20), 0.1)
    assert any(name.startswith("n") for name in split.validation)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_scans_cannot_be_split(tmp_path, make_scans, count):
    with pytest.raises(ValueError, match=f"two patients or more, not {count}"):
        make_split(tmp_path, make_scans(count))


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5, math.nan])
def test_fraction_outside_of_0_and_1_is_refused(tmp_path, make_scans, fraction):
    with pytest.raises(ValueError, match="validation_fraction must be between 0 and 1"):
        make_split(tmp_path, make_scans(4), fraction)


def test_scans_of_one_patient_are_never_split(tmp_path, make_scans):
    names = make_scans(6, 6, patients=lambda name: f"LIDC-IDRI-{int(name[1:]):04d}")  # n<i> and e<i>
    for seed in range(10):
        split = make_split(tmp_path, names, 0.4, seed)
        assert not {name[1:] for name in split.train} & {name[1:] for name in split.validation}


def test_two_scans_of_one_patient_cannot_be_split(tmp_path, make_scans):
    names = make_scans(2, patients=lambda name: "LIDC-IDRI-0332")
    with pytest.raises(ValueError, match="two patients or more, not 1"):
        make_split(tmp_path, names)


def test_scan_of_an_unknown_patient_is_its_own(caplog):
    with caplog.at_level("INFO"):
        assert find_patients({"a": metadata_of(patient="LIDC-IDRI-0001"), "b": metadata_of()}) == {
            "a": "LIDC-IDRI-0001",
            "b": "b",
        }
    assert caplog.text == ""


def test_without_any_known_patient_the_log_says_so(caplog):
    with caplog.at_level("INFO"):
        assert find_patients({"a": metadata_of()}) == {"a": "a"}
    assert "each scan counts as its own" in caplog.text


@pytest.mark.parametrize(("spacing_zyx", "turns"), [((1.0, 0.7, 0.7), {1, 2, 3}), ((1.0, 0.7, 0.9), {2})])
def test_quarter_turns_want_equal_spacing(spacing_zyx, turns):
    augmentation = Augmentation(rotate90_prob=1.0)
    drawn = [
        augmentation.draw(np.random.default_rng(seed), (8, 16, 16), spacing_zyx, np.empty((0, 3))) for seed in range(40)
    ]
    assert {parameters.quarter_turns for parameters in drawn} == turns


@pytest.mark.parametrize(
    ("name", "probability"),
    [
        ("zoom", "affine_prob"),
        ("rotate_degrees", "affine_prob"),
        ("noise_std", "noise_prob"),
    ]
    + [("scale_factor", "scale_prob"), ("shift_offset", "shift_prob")],
)
def test_range_of_a_change_that_never_happens_is_refused(name, probability):
    with pytest.raises(ValueError, match=f"{name} would be ignored: {probability} is 0"):
        Augmentation(**{probability: 0.0, name: 0.3})
    Augmentation(**{probability: 0.0})


def test_order_augmentation_and_split_draw_from_streams_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(dataset, "generator_of", lambda *key: seen.append(key) or np.random.default_rng(abs(hash(key))))
    list(ScanSampler(3, seed=0))
    list(patch_sampler())
    assert len({stream for stream, *_ in seen}) == 2


# ------------------------------------------------------------------------------------------------------------- folds


def hashed(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10


@pytest.mark.parametrize("fold", [0, 3, 9])
def test_fold_is_the_subset_folder_that_the_scans_lie_in(tmp_path, make_scans, caplog, fold):
    split = make_split(tmp_path, make_scans(20, 10, subsets=10), fold=fold)
    assert (split.test, split.fold) == ((f"e0{fold}", f"n0{fold}", f"n1{fold}"), fold)
    assert "unofficial" not in caplog.text


def test_train_validation_and_test_are_complete_and_disjoint(tmp_path, make_scans):
    names = make_scans(20, 10, subsets=10)
    split = make_split(tmp_path, names, fold=4)
    parts = [getattr(split, part) for part in ("train", "validation", "test")]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    assert [len(part) for part in parts] == [21, 6, 3]  # a fifth of 18 and of 9 scans for validation


def test_each_scan_is_held_out_by_one_fold(tmp_path, make_scans):
    names = make_scans(20, 10, subsets=10)
    held_out = [list(make_split(tmp_path, names, fold=fold).test) for fold in range(10)]
    assert sorted(itertools.chain(*held_out)) == sorted(names)


def test_patient_with_a_scan_in_the_fold_is_in_no_other_part(tmp_path, make_scans):
    names = make_scans(20, subsets=10, patients=lambda name: "twice" if name in ("n03", "n17") else name)
    split = make_split(tmp_path, names, fold=3)
    assert split.test == ("n03", "n13")
    assert sorted(split.train + split.validation) == sorted(set(names) - {"n03", "n13", "n17"})


def test_flat_scans_are_in_the_fold_of_their_hash_and_the_log_says_so(tmp_path, make_scans, caplog):
    names = make_scans(15, 15)
    split = make_split(tmp_path, names, fold=hashed("n00"))
    assert list(split.test) == sorted(name for name in names if hashed(name) == hashed("n00"))
    assert "unofficial folds" in caplog.text


def test_folds_of_flat_scans_do_not_depend_on_order_seed_or_other_scans(tmp_path, make_scans):
    names = make_scans(15, 15)
    fold = hashed("n00")
    tests = [
        list(make_split(tmp_path, order, seed=seed, fold=fold).test) for order, seed in ((names, 0), (names[::-1], 5))
    ]
    assert tests[0] == tests[1]
    assert find_folds({"n00": metadata_of()}, {"n00": "n00"}) == {"n00": fold}


def test_flat_scans_of_one_patient_are_in_one_fold():
    flat = {f"scan{i}": metadata_of() for i in range(5)}
    assert find_folds(flat, dict.fromkeys(flat, "LIDC-IDRI-0332")) == dict.fromkeys(flat, hashed("LIDC-IDRI-0332"))


def test_scan_without_a_fold_beside_others_is_never_held_out(caplog):
    assert find_folds({"a": metadata_of(fold=3), "b": metadata_of()}, {"a": "a", "b": "b"}) == {"a": 3}
    assert "1 of 2 scans have no fold, such as b, and are held out in none" in caplog.text


@pytest.mark.parametrize("fold", [-1, 10])
def test_fold_outside_of_0_to_9_is_refused(tmp_path, make_scans, fold):
    with pytest.raises(ValueError, match=f"fold must be 0 to 9, not {fold}"):
        make_split(tmp_path, make_scans(20, subsets=10), fold=fold)


def test_fold_without_a_scan_is_refused(tmp_path, make_scans):
    with pytest.raises(ValueError, match=r"fold 9 has no scan; there are \[0, 1, 2\]"):
        make_split(tmp_path, make_scans(6, subsets=3), fold=9)


def test_fold_must_leave_two_patients(tmp_path, make_scans):
    with pytest.raises(
        ValueError, match=r"two patients or more, not 1, beside the 1 scans of fold 0; hold out another"
    ):
        make_split(tmp_path, make_scans(2, subsets=2), fold=0)


# ------------------------------------------------------------------------------- excluded findings, pieces of scans


def with_excluded(processed_dir, folder, *findings):
    """A copy of a data set whose first scan has excluded findings; its series UID and its nodules' mask."""
    shutil.copytree(processed_dir, folder)
    uid = read_processed_list(folder)[0]
    write_metadata(folder, dataclasses.replace(read_metadata(folder, uid), excluded=findings))
    return uid, np.asarray(read_processed(folder, uid).mask)


@pytest.mark.parametrize("cache", ["device", "memory", "files"])
def test_excluded_finding_is_ignored_but_for_nodules(processed_dir, tmp_path, cache):
    metadata = read_metadata(processed_dir, read_processed_list(processed_dir)[0])
    (nodule, *_), grid = metadata.nodules, metadata.grid
    beside = np.add(nodule.center_xyz, (nodule.diameter_mm / 2, 0, 0))
    uid, mask = with_excluded(
        processed_dir, tmp_path / "data", (*beside.tolist(), nodule.diameter_mm), (1e4, 0, 0, 5.0)
    )
    data = LUNA16Dataset(tmp_path / "data", [uid], cache=cache)
    for _ in range(2):  # the kept mask is not changed
        found = data[0]["mask"][0].numpy()
        ball = np.linalg.norm(grid.world(np.indices(mask.shape).reshape(3, -1).T) - beside, axis=1)
        ball = ball.reshape(mask.shape) <= nodule.diameter_mm / 2
        np.testing.assert_array_equal(found, np.where(mask > 0, 1, np.where(ball, 2, 0)))
    assert set(np.unique(found)) == {0, 1, 2}


def test_patch_ignores_the_part_of_a_finding_that_lies_in_it(processed_dir, tmp_path):
    metadata = read_metadata(processed_dir, read_processed_list(processed_dir)[0])
    corner = metadata.grid.world((3, 5, 7))
    uid, _ = with_excluded(processed_dir, tmp_path / "data", (*corner.tolist(), -1.0))  # 10 mm where it is unknown
    whole = LUNA16Dataset(tmp_path / "data", [uid])[0]["mask"][0]
    data = LUNA16Dataset(tmp_path / "data", [uid], patch_size_zyx=(8, 8, 8))
    patch = data[SampleKey(0, 0, 0, (4, 9, 11))]["mask"][0]
    assert (patch == 2).any()
    assert torch.equal(patch, whole[0:8, 5:13, 7:15])


def test_turns_and_affines_keep_what_is_ignored():
    mask = np.zeros((8, 16, 16), np.uint8)
    mask[2:4, 4:8, 4:8], mask[5:7, 9:12, 9:12] = 1, 2
    image = np.zeros(mask.shape, np.float32)
    _, moved = augment(image, AugmentationParameters(1, (True, False, True), np.eye(3)), mask)
    assert [(moved == value).sum() for value in (1, 2)] == [32, 18]


def test_background_is_drawn_from_whole_scans_while_there_are_any():
    whole = metadata_of(seriesuid="whole")
    whole = dataclasses.replace(whole, scan_geometry=Geometry((40, 40, 40), (0.0, 0.0, 0.0), (3.0, 3.0, 3.0)))
    scans = [metadata_of(seriesuid="piece", shape_zyx=(10, 10, 10)), whole]
    points = [np.full((5, 3), 5), np.full((5, 3), 20)]
    patches = Patches((8, 8, 8), per_scan=20, nodule_share=0.0, hard_share=0.0, warmup_epochs=0)
    assert {key.scan for key in PatchSampler(scans, points, patches, seed=0)} == {1}
    assert {key.scan for key in PatchSampler(scans[:1], points[:1], patches, seed=0)} == {0}


def test_nodule_in_an_excluded_finding_keeps_its_voxel():
    mask = np.full((9, 9, 9), IGNORED, np.uint8)
    mask[3, 3, 3] = 1
    drawn = AugmentationParameters(affine=np.eye(3) * 2, points=np.array([[3, 3, 3]]))  # fetches every other voxel
    _, moved = augment_batch(torch.zeros(1, 1, 9, 9, 9), torch.from_numpy(mask)[None, None], [drawn])
    assert moved[0, 0, 4, 4, 4] == 1


def test_donor_is_all_of_its_nodule_and_no_neighbour():
    mask = np.zeros((30, 40, 40), np.uint8)
    mask[10:14, 10:13, 8:38] = 1  # much longer than wide
    mask[11, 11, 12] = 0  # hollow in the middle
    mask[18:20, 10:13, 8:24] = 1  # another one
    box, nodule = _whole_nodule(torch.from_numpy(mask), Box.of_size((5, 5, 6), (12, 12, 12)))
    assert (box.lower, box.upper) == ((9, 9, 7), (15, 14, 39))
    np.testing.assert_array_equal(nodule, mask[9:15, 9:14, 7:39])
    for at_edge, small in ((mask[10:], (0, 6, 6)), (mask[20:], (0, 6, 6))):  # the scan ends before; nothing is there
        assert not _whole_nodule(torch.from_numpy(at_edge), Box.of_size(small, (6, 12, 12)))[1].any()


def test_nodule_that_the_lung_mask_hides_teaches_nothing(processed_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    uid = read_processed_list(data)[0]
    scan = read_processed(data, uid)
    inside = np.argwhere(np.asarray(scan.mask) == 1)
    hidden = tuple(inside[: len(inside) // 2].T)
    image = np.array(scan.image)
    image[hidden] = 0
    np.save(data / "images" / f"{uid}.npy", image)
    shown = LUNA16Dataset(data, [uid])[0]["mask"][0]
    assert (shown[hidden] == 1).all()  # dark, but inside of the lung mask
    nodules = tuple(dataclasses.replace(nodule, cut_by_lungs=True) for nodule in scan.metadata.nodules)
    write_metadata(data, dataclasses.replace(scan.metadata, nodules=nodules))
    mask = LUNA16Dataset(data, [uid])[0]["mask"][0]
    assert (mask[hidden] == IGNORED).all() and (mask == 1).sum() == len(inside) - len(hidden[0])
