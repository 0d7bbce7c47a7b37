"""Wrong data are told by name, and right ones are not told off; the inputs are those of the study."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import wrong_data


@pytest.fixture(scope="module")
def data() -> wrong_data.Data:
    return wrong_data.phantom_data()


@pytest.mark.parametrize("kind", wrong_data.VALUES)
def test_scan_that_is_not_in_hu_is_refused(data, kind):
    assert wrong_data.said_of(wrong_data.VALUES[kind](data)).startswith("1.2.3: the scan is not in HU")


MISFITS = {
    "mask 120 mm too high": "of it lies outside",
    "mask without geometry": "of it lies outside",
    "mask in RAS": "the lung mask lies outside of the scan; is it another patient's?",
    "mask of one lung": "the lung mask lacks 1.7 of 1.7 litres on the right of what looks like lung",
    "mask of labels 1 and 2": "the lung mask lacks 1.7 of 1.7 litres on the right and 1.5 of 1.5 litres on the left",
    "mask of 0 and 255": "the lung mask holds the labels [0, 255] and none of (3, 4), so it is not used",
    "empty mask": "the lung mask holds the labels [0] and none of (3, 4), so it is not used",
}


@pytest.mark.parametrize("kind", wrong_data.MASKS)
def test_lung_mask_that_does_not_fit_is_told(data, kind):
    said = wrong_data.said_of(wrong_data.MASKS[kind](data))
    assert MISFITS.get(kind, "of it is soft tissue; is it upside down, another scan's, or drawn far too wide?") in said


@pytest.mark.parametrize("kind", wrong_data.ANNOTATIONS)
def test_annotations_at_whose_places_nothing_is_are_told(data, kind):
    said = wrong_data.said_of(wrong_data.ANNOTATIONS[kind](data))
    assert "must be LPS millimetres, not RAS, voxels or z, y, x" in said


@pytest.mark.parametrize("kind", wrong_data.RIGHT)
def test_right_data_is_not_told_off(data, kind):
    assert wrong_data.said_of(wrong_data.RIGHT[kind](data)) == ""
