"""Lungs by threshold, given masks, and what is told of a scan's values; on phantoms that are cut, turned, changed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import image_of

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import lungs

from data.lungs import fill_dents, find_lungs, measure_noise, widen
from data.phantom import make_phantom
from preprocess import LUNG_LABELS, Preprocessing
from utils import Geometry, read_scan, resample


@pytest.mark.parametrize("index", range(4))
def test_threshold_lungs_overlap_with_luna16s(phantom_dir, index):
    path = next((phantom_dir / "raw" / f"subset{index}").glob("*.mhd"))
    labels = sitk.ReadImage(str(phantom_dir / "seg-lungs-LUNA16" / path.name))
    expected = np.isin(sitk.GetArrayFromImage(labels), (3, 4))
    found = sitk.Resample(find_lungs(read_scan(path)).image, labels, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    found = sitk.GetArrayFromImage(found) > 0
    assert 2 * (found & expected).sum() / (found.sum() + expected.sum()) > 0.8


@pytest.fixture(scope="module")
def lungs_phantom() -> tuple[sitk.Image, sitk.Image]:
    """A scan of 96 x 96 x 48 voxels and its lungs."""
    phantom = make_phantom(0, seed=5, size_xyz=(96, 96, 48))
    labels = sitk.GetArrayFromImage(phantom.lungs)
    return phantom.image, Geometry.from_image(phantom.lungs).image(np.isin(labels, LUNG_LABELS).astype(np.uint8))


@pytest.mark.parametrize("kind", lungs.KINDS)
def test_lungs_are_found_wherever_they_lie(lungs_phantom, kind):
    dice = {method: row.dice for _, method, row in lungs.study(*lungs_phantom, [kind])}
    assert dice["here"] > 0.92
    assert dice["here, dents filled"] > 0.92


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("whole", "1.2 litres on the right, 1.1 on the left"),
        ("sides cut", "1.2 litres on the right, 1.1 on the left; cut by the view's edge (right, left)"),
        ("back cut", "1.2 litres on the right, 1.1 on the left; cut by the view's edge (back)"),
        ("half", "1.2 litres on the right, 0.0 on the left; cut by the view's edge (left)"),
        ("bases", "0.4 litres on the right, 0.3 on the left; cut by the view's edge (top)"),
        (
            "bases and bowel",
            "0.6 litres on the right, 0.5 on the left; cut by the view's edge (top); no lung: 353 ml below the lungs",
        ),
    ],
)
def test_what_is_to_be_said_of_the_lungs_is_said(lungs_phantom, kind, text):
    assert str(find_lungs(lungs.KINDS[kind](*lungs_phantom)[0])) == text


def without_left_lung(scan: sitk.Image, mask: sitk.Image) -> sitk.Image:
    """The left lung full of fluid."""
    hu, inside, geometry = lungs.arrays(scan, mask)
    middle = find_lungs(scan).middle
    left = inside & (np.arange(hu.shape[2]) >= middle)
    hu[left] = 20
    return lungs.images(hu, inside, geometry)[0]


def test_side_without_a_lung_is_kept_whole(lungs_phantom):
    scan = without_left_lung(*lungs_phantom)
    found = find_lungs(scan)
    assert found.doubtful == "left"
    assert str(found).endswith("nearly no lung on the left, so that side is searched whole")
    prepared = Preprocessing(target_size=None, target_spacing=(4.0, 4.0, 4.0)).prepare(scan)
    mask = resample(lungs_phantom[1], prepared.grid, linear=False)
    left = sitk.GetArrayFromImage(mask) > 0
    left[..., : int(prepared.grid.index(found.image.TransformIndexToPhysicalPoint((found.middle, 0, 0)))[2]) + 1] = (
        False
    )
    assert prepared.lungs[left].all()
    cropped = Preprocessing(target_size=None, target_spacing=(4.0,) * 3, crop_to_lungs=True).prepare(scan)
    assert cropped.lungs.sum() == pytest.approx(prepared.lungs.sum(), rel=0.1)


@pytest.mark.parametrize("diameter", [50, 60, 80])
def test_mass_at_the_chest_wall_is_kept_and_costs_little(lungs_phantom, diameter):
    scan, mask = lungs_phantom
    changed, _ = lungs.mass(diameter)(scan, mask)
    ball = sitk.GetArrayFromImage(changed) != sitk.GetArrayFromImage(scan)
    grid = Geometry.from_image(scan)
    kept, plain = (
        sitk.GetArrayFromImage(resample(widen(fill(find_lungs(changed)), 20, 8), grid, fill=1e3)) <= 0
        for fill in (fill_dents, lambda found: found.image)
    )
    assert kept[ball].mean() > 0.9 > plain[ball].mean()
    assert kept.sum() < 1.15 * plain.sum() + ball.sum()


def litres_of(hu: np.ndarray, geometry: Geometry) -> list[float]:
    return [round(volume, 1) for volume in find_lungs(geometry.image(hu.astype(np.int16))).litres]


@pytest.mark.parametrize("padding", [-3024, -1024, -1000, 0])
def test_lungs_that_a_circle_of_view_cuts_are_kept(lungs_phantom, padding):
    hu, geometry = sitk.GetArrayFromImage(lungs_phantom[0]), Geometry.from_image(lungs_phantom[0])
    in_view = np.hypot(*np.ogrid[-41:55, -47.5:48]) * geometry.spacing_zyx[1] < 105
    assert litres_of(np.where(in_view, np.maximum(hu, -1024), padding), geometry) == [1.2, 1.1]


@pytest.mark.parametrize("padding", [-2000, -1024, 0])
def test_frame_around_a_scan_is_no_lung(lungs_phantom, padding):
    padded = sitk.ConstantPad(sitk.Maximum(lungs_phantom[0], -1024), [20] * 3, [20] * 3, padding)
    assert litres_of(sitk.GetArrayFromImage(padded), Geometry.from_image(padded)) == [1.2, 1.1]


@pytest.mark.parametrize(("radius_mm", "hu_there"), [(18, -900), (60, -1000)])
def test_something_dark_above_the_lungs_does_not_replace_them(lungs_phantom, radius_mm, hu_there):
    hu, geometry = sitk.GetArrayFromImage(lungs_phantom[0]), Geometry.from_image(lungs_phantom[0])
    distance = np.hypot(*np.ogrid[-48:48, -48:48]) * geometry.spacing_zyx[1]
    neck = np.full((34, 96, 96), -1000)
    neck[:, distance < 130] = 40
    neck[8:22, distance < radius_mm] = hu_there
    assert litres_of(np.concatenate([hu, neck]), replace(geometry, shape_zyx=(82, 96, 96))) == [1.2, 1.1]


@pytest.mark.parametrize("beside_mm", [0, 30])
@pytest.mark.parametrize("side", ["right", "left"])
def test_lung_of_half_a_view_is_on_its_side_and_none_is_in_doubt(lungs_phantom, side, beside_mm):
    scan, beside = lungs_phantom[0], round(beside_mm / lungs_phantom[0].GetSpacing()[0])
    middle = find_lungs(scan).middle
    found = find_lungs(scan[: middle - beside] if side == "right" else scan[middle + beside :])
    there, missing = found.litres if side == "right" else found.litres[::-1]
    assert there > 0.9
    assert missing < 0.1
    assert found.doubtful == ""


@pytest.mark.parametrize("slices", [2, 3, 5])
def test_few_slices_hold_lungs_too(lungs_phantom, slices):
    assert min(find_lungs(lungs_phantom[0][:, :, 20 : 20 + slices]).litres) > 0


def test_given_mask_of_one_lung_fits_where_there_is_no_other(lungs_phantom):
    scan, mask = lungs_phantom
    left = sitk.GetArrayFromImage(mask)
    left[..., : left.shape[2] // 2] = 0
    hu = np.where((sitk.GetArrayFromImage(mask) > 0) & (left == 0), 20, sitk.GetArrayFromImage(scan))
    scan, left = (Geometry.from_image(scan).image(array.astype(np.int16)) for array in (hu, left))
    assert Preprocessing(target_size=(8, 8, 8)).prepare(scan, left).lung_note == ""


@pytest.mark.parametrize(("factor", "size"), [(10, "3360"), (1e-3, "0.336")])
def test_sizes_that_are_no_millimetres_are_refused(lungs_phantom, factor, size):
    scan = sitk.Image(lungs_phantom[0])
    scan.SetSpacing([step * factor for step in scan.GetSpacing()])
    with pytest.raises(ValueError, match=f"the scan is {size} mm long, so its spacing .* is not in mm"):
        Preprocessing(target_size=(8, 8, 8)).prepare(scan)


def test_chest_that_holds_little_air_is_not_refused(lungs_phantom):
    hu, lung = (sitk.GetArrayFromImage(image) for image in lungs_phantom)
    back = np.arange(hu.shape[1])[:, None] > np.quantile(np.argwhere(lung)[:, 1], 0.3)
    full = np.where((hu < -950) & (lung == 0), -90, np.where((lung > 0) & back, 15, hu))  # effusions; fat to the edge
    prepared = Preprocessing(target_size=(8, 8, 8)).prepare(Geometry.from_image(lungs_phantom[0]).image(full))
    assert prepared.lung_source == "threshold"


CUBES = {
    "lung and wall": lambda hu: hu[20:30, 30:60, 10:40],
    "tissue": lambda hu: np.random.default_rng(0).normal(40, 15, (10, 20, 20)),
    "tissue with contrast": lambda hu: np.random.default_rng(0).normal(120, 15, (10, 20, 20)),
    "one value": lambda hu: np.zeros((4, 8, 8)),
}


@pytest.mark.parametrize("kind", CUBES)
def test_cube_of_a_scan_is_not_told_off(lungs_phantom, kind):
    hu = CUBES[kind](sitk.GetArrayFromImage(lungs_phantom[0]).astype(np.float32)).astype(np.float32)
    Preprocessing(target_size=(8, 8, 8)).prepare(image_of(hu, lungs_phantom[0].GetSpacing()))


@pytest.mark.parametrize("noise", [15, 40, 120])
def test_noise_is_measured_in_soft_tissue(lungs_phantom, noise):
    hu = sitk.GetArrayFromImage(lungs_phantom[0]).astype(np.float32)
    own = measure_noise(lungs_phantom[0])
    added = np.random.default_rng(0).normal(0, noise, hu.shape).astype(np.float32)
    found = measure_noise(Geometry.from_image(lungs_phantom[0]).image(hu + added))
    assert found == pytest.approx(np.hypot(own, noise), rel=0.25)


def test_noise_of_a_scan_without_soft_tissue_is_unknown():
    assert measure_noise(image_of(np.full((5, 9, 9), -800, np.int16))) is None


def test_box_of_bowel_gas_alone_is_no_lung():
    hu = np.full((40, 60, 60), 40, np.int16)
    hu[10:30, 20:35, 20:40] = -1000
    hu[:, :3] = hu[:, -3:] = hu[:, :, :3] = hu[:, :, -3:] = -1000
    assert find_lungs(Geometry(hu.shape, (0.0, 0.0, 0.0), (3.0, 3.0, 3.0)).image(hu)) is None


def test_scan_without_tissue_has_no_lungs():
    hu = np.random.default_rng(0).normal(-1000, 10, (10, 20, 20)).astype(np.int16)
    assert find_lungs(Geometry(hu.shape, (0.0, 0.0, 0.0), (3.0, 3.0, 3.0)).image(hu)) is None
