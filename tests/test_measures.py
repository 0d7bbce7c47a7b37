"""Measures of nodules, on balls and blocks whose measures are known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from conftest import HALF, chest

from data.measures import LungFrame, MeasuredScan, axial_diameters, density_of, edge_distance, inner_of, measure_nodules
from infer import extract_nodules, find_candidates
from preprocess import Preprocessing
from utils import Box, Geometry

CROPS = Path(__file__).resolve().parents[2] / "shared" / "real" / "crops"
GRID = Geometry((60, 60, 100), (-50.0, -30.0, -300.0), (1.0, 1.0, 1.0))


def ball(shape, center, radius_mm, spacing_zyx=(1.0, 1.0, 1.0)) -> np.ndarray:
    offsets = np.ogrid[tuple(slice(size) for size in shape)]
    return sum(((o - c) * s) ** 2 for o, c, s in zip(offsets, center, spacing_zyx, strict=True)) <= radius_mm**2


@pytest.fixture
def lungs() -> np.ndarray:
    """Two lungs of 35 voxels of width, 20 apart."""
    mask = np.zeros(GRID.shape_zyx, bool)
    mask[5:55, 5:55, 5:40] = mask[5:55, 5:55, 60:95] = True
    return mask


def frame_of(lungs, hu):
    return None if lungs is None else LungFrame.of(lungs, hu, GRID)


def measured(mask, lungs, hu=50.0):
    """Measures of all components of a mask, of one value in lungs of air."""
    nodules = extract_nodules(mask, GRID)
    ranks = np.zeros(mask.shape, np.uint16)
    for number, nodule in enumerate(nodules, start=1):
        ranks[nodule.box.slices][mask[nodule.box.slices]] = number
    return measure_nodules(nodules, ranks, GRID, (values := np.where(mask, hu, -850.0)), lungs, frame_of(lungs, values))


@pytest.mark.parametrize(
    ("center", "side", "third"),
    [((50, 30, 80), "left", "upper"), ((30, 30, 20), "right", "middle"), ((8, 30, 20), "right", "lower")],
)
def test_side_and_third_are_the_patients(lungs, center, side, third):
    (found,) = measured(ball(GRID.shape_zyx, center, 3), lungs)
    assert (found.side, found.lung_third) == (side, third)


def test_side_is_not_told_where_two_lungs_are_not_told_apart():
    (found,) = measured(ball(GRID.shape_zyx, (30, 30, 20), 3), np.ones(GRID.shape_zyx, bool))
    assert found.side == ""


def test_nothing_is_said_of_a_place_without_lungs():
    (found,) = measured(ball(GRID.shape_zyx, (30, 30, 20), 3), None)
    assert (found.side, found.lung_third) == ("", "")
    assert math.isnan(found.distance_to_lung_edge_mm)


def test_empty_lungs_have_no_frame():
    assert LungFrame.of(np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4)), GRID) is None


def test_distance_is_from_surface_to_the_edge_of_the_lungs(lungs):
    # The lung ends at voxel 4.5; the ball at 16.5.
    (found,) = measured(ball(GRID.shape_zyx, (30, 30, 20), 3), lungs)
    assert found.distance_to_lung_edge_mm == pytest.approx(12, abs=0.01)


def test_nodule_at_the_edge_has_no_distance(lungs):
    (found,) = measured(ball(GRID.shape_zyx, (30, 30, 6), 3), lungs)
    assert found.distance_to_lung_edge_mm == 0


def test_end_of_the_scan_is_no_edge_of_the_lungs():
    lungs = np.ones((30, 30, 30), bool)
    lungs[:, :, 29] = False
    mask = np.zeros((2, 2, 2), bool)
    mask[:] = True
    assert edge_distance(mask, Box((0, 14, 14), (2, 16, 16)), lungs, (1, 1, 1)) == pytest.approx(13)


def test_edge_that_is_far_away_is_found_and_one_that_is_not_there_is_not():
    lungs = np.ones((3, 3, 200), bool)
    block, box = np.ones((1, 1, 1), bool), Box((1, 1, 10), (2, 2, 11))
    assert math.isnan(edge_distance(block, box, lungs, (1, 1, 1)))
    lungs[:, :, 80] = False
    assert edge_distance(block, box, lungs, (1, 1, 1)) == pytest.approx(69)


@pytest.mark.parametrize(("spacing", "shape"), [((5.0, 1.0, 1.0), (20, 60, 60)), ((2.5, 0.7, 0.7), (30, 80, 80))])
def test_distance_holds_on_anisotropic_grids(spacing, shape):
    lungs = np.ones(shape, bool)
    lungs[0] = False
    mask = np.zeros(shape, bool)
    mask[6:8, 20:30, 20:30] = True  # five slices above the edge
    box = Box((6, 20, 20), (8, 30, 30))
    assert edge_distance(mask[box.slices], box, lungs, spacing) == pytest.approx(5 * spacing[0])


def test_nodule_that_the_lungs_leave_out_is_no_edge_of_theirs(lungs):
    mask = ball(GRID.shape_zyx, (30, 30, 20), 5)
    holes = lungs & ~ball(GRID.shape_zyx, (30, 30, 20), 6)
    assert measured(mask, holes)[0].distance_to_lung_edge_mm == measured(mask, lungs)[0].distance_to_lung_edge_mm > 5


def test_third_is_not_told_where_the_scan_cuts_the_lungs(lungs):
    hu = np.full(GRID.shape_zyx, -850.0)
    lower, upper = (corner[2] for corner in GRID.bounds())
    assert LungFrame.of(lungs, hu, GRID, (lower - 9, upper + 9)).third(-270) == "middle"
    assert LungFrame.of(lungs, hu, GRID, (lower - 9, upper - 5)).third(-270) == ""
    assert LungFrame.of(lungs, hu, GRID, (lower + 5, upper + 9)).third(-270) == ""


def test_windpipe_above_the_lungs_is_no_lung(lungs):
    lungs[55:, 28:32, 48:52] = True
    frame = LungFrame.of(lungs, np.full(GRID.shape_zyx, -850.0), GRID, tuple(corner[2] for corner in GRID.bounds()))
    assert (frame.lower_z_mm, frame.upper_z_mm) == (-295.5, -245.5)
    assert not LungFrame.of(lungs, np.full(GRID.shape_zyx, -850.0), GRID, (-296.0, 0.0)).is_whole


def test_distance_in_a_scan_is_to_the_mediastinum_too():
    ct = chest((80, 112, 120))
    prepared = Preprocessing(target_size=None, target_spacing=(2.0, 2.0, 2.0)).prepare(ct)
    found = find_candidates(prepared.array > HALF, prepared.grid, 0.5)
    (measure,) = MeasuredScan.of(ct, prepared.grid, found, prepared.own_lungs).measures
    assert measure.distance_to_lung_edge_mm == pytest.approx(24, abs=3)  # from x = -44 to x = -20
    assert measure.side == "right"


@pytest.mark.parametrize(
    ("size_yx", "degrees", "longest", "across"),
    [((12, 30), 0, 32.3, 13), ((3, 20), 45, 20.2, 3.5), ((4, 10), 0, 10.8, 4.4)],
)
def test_across_is_a_diameter_of_the_nodule_and_no_shadow_of_it(size_yx, degrees, longest, across):
    y, x = np.mgrid[-25:26, -25:26]
    turn = math.radians(degrees)
    along, aside = x * math.cos(turn) + y * math.sin(turn), -x * math.sin(turn) + y * math.cos(turn)
    mask = ((abs(along) <= size_yx[1] / 2) & (abs(aside) <= size_yx[0] / 2))[None]
    assert axial_diameters(mask, (1, 1, 1)) == pytest.approx((longest, across), abs=1.6)


def test_volume_mean_and_score_are_those_of_the_nodule(lungs):
    (found,) = measured(ball(GRID.shape_zyx, (30, 30, 20), 5), lungs, hu=-123.0)
    assert found.mean_hu == pytest.approx(-123)
    assert found.volume_mm3 == ball(GRID.shape_zyx, (30, 30, 20), 5).sum()
    assert found.equivalent_diameter_mm == pytest.approx(10, abs=0.2)
    assert math.isnan(found.score)


@pytest.mark.parametrize(("radius_mm", "density"), [(2, ""), (4, "solid")])
def test_density_of_a_small_nodule_is_not_told(lungs, radius_mm, density):
    (found,) = measured(ball(GRID.shape_zyx, (30, 30, 20), radius_mm), lungs)
    assert found.density == density


def test_density_needs_two_slices_of_the_scan():
    array = np.full((20, 60, 60), -850, np.int16)
    array[8:12, 28:33, 28:33] = 40
    mask = np.zeros((60, 60, 60), bool)
    mask[25:35, 28:33, 28:33] = True
    for step, density in ((3.0, "solid"), (6.0, "")):
        ct = sitk.GetImageFromArray(array)
        ct.SetSpacing((1, 1, step))
        grid = Geometry((60, 60, 60), (0, 0, 0), (1.0, 1.0, step / 3))
        found = find_candidates(mask.astype(np.float32), grid, 0.5)
        (measure,) = MeasuredScan.of(ct, grid, found, None).measures
        assert measure.density == density


def test_mean_is_that_of_what_lies_inside_the_rim(lungs):
    mask = ball(GRID.shape_zyx, (30, 30, 20), 5)
    hu = np.where(ball(GRID.shape_zyx, (30, 30, 20), 4.4), 50.0, -850.0)
    found = find_candidates(mask.astype(np.float32), GRID, 0.5)
    (measure,) = measure_nodules(found.nodules, found.ranks, GRID, hu, lungs, None)
    assert measure.mean_hu == 50


def test_of_two_nodules_each_is_measured_by_its_own_voxels(lungs):
    mask = ball(GRID.shape_zyx, (30, 30, 20), 6) | ball(GRID.shape_zyx, (30, 30, 80), 3)
    found = measured(mask, lungs)
    assert [m.nodule for m in found] == [1, 2]
    assert found[0].longest_axial_mm == pytest.approx(13, abs=0.1)  # of a ball of 6 mm around a voxel
    assert found[1].longest_axial_mm == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 0.7), (1.0, 0.5, 1.0)])
@pytest.mark.parametrize("degrees", [0, 30, 45, 80])
def test_axes_of_an_ellipse_are_found_however_it_lies(spacing, degrees):
    y, x = np.mgrid[-20 : 20.01 : spacing[1], -20 : 20.01 : spacing[2]]
    along = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
    across = -x * math.sin(math.radians(degrees)) + y * math.cos(math.radians(degrees))
    mask = np.zeros((3, *x.shape), bool)
    mask[1] = (along / 10) ** 2 + (across / 5) ** 2 <= 1
    longest, widest = axial_diameters(mask, spacing)
    assert longest == pytest.approx(20, abs=1)
    assert widest == pytest.approx(10, abs=1)


def test_slice_with_the_longest_diameter_is_taken():
    mask = np.zeros((3, 10, 10), bool)
    mask[0, 2, 2:5] = mask[2, 4, 1:9] = True
    assert axial_diameters(mask, (1, 1, 1)) == pytest.approx((8, 1))


def test_single_voxel_is_as_long_as_it_is():
    assert axial_diameters(np.ones((1, 1, 1), bool), (5.0, 0.7, 0.7)) == pytest.approx((0.7, 0.7))


@pytest.mark.parametrize(("core_mm", "density"), [(0, "ground glass"), (5, "part-solid"), (8, "solid")])
def test_density_is_that_of_what_lies_inside_the_rim(core_mm, density):
    mask, core = ball((21, 21, 21), (10, 10, 10), 8), ball((21, 21, 21), (10, 10, 10), core_mm - 0.5)
    hu = np.where(core, 0.0, -650.0) if core_mm else np.full(mask.shape, -650.0)
    assert density_of(hu[inner_of(mask, (1, 1, 1))]) == density


def test_rim_that_is_mixed_with_air_makes_a_solid_nodule_no_less_solid():
    mask = ball((21, 21, 21), (10, 10, 10), 4)
    hu = np.where(ball((21, 21, 21), (10, 10, 10), 3), 0.0, -700.0)
    assert (hu[mask] < -450).mean() > 0.5
    assert density_of(hu[inner_of(mask, (1, 1, 1))]) == "solid"


def test_nodule_of_few_voxels_is_judged_whole():
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2:4] = True
    np.testing.assert_array_equal(inner_of(mask, (1, 1, 1)), mask)


@pytest.mark.skipif(not CROPS.is_dir(), reason="real nodules are not here")
def test_density_agrees_with_the_ratings_of_radiologists_as_the_report_says():
    with np.load(CROPS / "lidc_nodules.npz") as crops:
        cubes, masks = crops["hu"], crops["mask"] > 0
    ratings = pd.read_csv(CROPS / "lidc_nodules.csv")["texture"]
    rated = ["ground glass" if r < 3 else "part-solid" if r == 3 else "solid" for r in ratings]
    judged = [density_of(hu[inner_of(mask, (1, 1, 1))]) for mask, hu in zip(masks, cubes, strict=True)]
    assert sum(a == b for a, b in zip(rated, judged, strict=True)) == 88
