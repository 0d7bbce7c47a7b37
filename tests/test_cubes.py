"""Cubes of LUNA16's nodules with the radiologists' masks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from conftest import image_of
from test_preprocess import install_contours

from data import cubes
from utils import InputError

ORIGIN, SPACING = (-40.0, -30.0, -200.0), (0.8, 0.8, 2.0)


def square(index: int, middle: tuple[int, int], reach: int) -> str:
    """A contour just outside of a square of pixels: column, row a line."""
    y, x = middle
    low, high = -reach - 1, reach + 1
    side = range(low, high + 1)
    points = [(y + low, x + i) for i in side] + [(y + i, x + high) for i in side]
    points += [(y + high, x + i) for i in reversed(side)] + [(y + i, x + low) for i in reversed(side)]
    return "\n".join(f"{column},{row}" for row, column in points)


@pytest.fixture
def luna16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scan with a nodule of 11 x 11 pixels and 4 slices, one at its border, and one without contours."""
    array = np.full((60, 120, 110), -850, np.int16)
    array[28:32, 55:66, 45:56] = 20
    (tmp_path / "raw").mkdir()
    sitk.WriteImage(image_of(array, SPACING, ORIGIN), str(tmp_path / "raw" / "1.1.mhd"))
    rows = ["1.1,0,18,-141,10", "1.1,-38,18,-141,8", "1.1,30,50,-100,6"]
    (tmp_path / "annotations.csv").write_text("\n".join(["seriesuid,coordX,coordY,coordZ,diameter_mm", *rows]))
    drawn = [
        ("1.1", reader, 1, ORIGIN[2] + 2 * z, square(z, (60, 50), reach))
        for reader, reach in ((1, 5), (2, 5), (3, 7))
        for z in range(28, 32)
    ]
    drawn += [("1.1", 4, 1, -141.0, square(29, (60, 2), 3))]
    install_contours(tmp_path / "site", monkeypatch, *drawn)
    return tmp_path


def test_cube_holds_the_nodule_in_its_middle(luna16, capsys):
    words = ["--raw_data_dir", luna16 / "raw", "--annotations_path", luna16 / "annotations.csv"]
    assert cubes.main([*map(str, words), "--output_dir", str(luna16 / "out")]) == 0
    assert "1 cubes of 1 scans" in capsys.readouterr().out
    with np.load(luna16 / "out" / "lidc_nodules.npz") as found:
        hu, mask = found["hu"], found["mask"]
    assert (hu.shape, hu.dtype, mask.dtype) == ((1, 51, 51, 51), np.int16, np.uint8)
    place = np.argwhere(mask[0])
    np.testing.assert_allclose(place.mean(axis=0), (25, 25, 25), atol=0.6)
    np.testing.assert_array_equal(np.ptp(place, axis=0) + 1, (9, 9, 9))  # 8 mm from edge to edge, 11 pixels of 0.8 mm
    assert hu[0][mask[0] > 0].mean() > -150 and hu[0][mask[0] == 0].mean() < -840
    (row,) = pd.read_csv(luna16 / "out" / "lidc_nodules.csv").to_dict("records")
    assert (row["seriesuid"], row["patient_id"], row["coordZ"]) == (1.1, 1.1, -141.0)
    assert np.isclose(row["eq_diameter_mm"], 2 * (3 * mask.sum() / (4 * np.pi)) ** (1 / 3), atol=0.01)


def test_scans_without_contours_are_refused(luna16):
    (luna16 / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.1,30,50,-100,6\n")
    with pytest.raises(InputError, match=r"no nodule of .* has contours"):
        cubes.CubeMaker(luna16 / "raw", luna16 / "annotations.csv", luna16 / "out").write()
    assert not (luna16 / "out").exists()
    with pytest.raises(InputError, match="per_patient must be at least 1"):
        cubes.CubeMaker(per_patient=0)
