"""Geometry against SimpleITK's own transforms, reading of scans, files and devices."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from conftest import metadata_of, nodule_at

import utils
from utils import (
    ANNOTATION_COLUMNS,
    AnnotatedNodule,
    Box,
    Geometry,
    InputError,
    Split,
    atomic_path,
    autocast_dtype,
    check,
    read_metadata,
    read_processed,
    read_processed_list,
    read_seriesuids,
    read_split,
    read_table,
    resample,
    scan_name,
    select_device,
    without_repeats,
    write_array,
    write_csv,
    write_json,
    write_metadata,
    write_objects,
    write_split,
    write_text,
)

FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
TURNED_Z = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # index x runs along world y
OBLIQUE = sitk.Euler3DTransform((0, 0, 0), 0.3, -0.5, 0.2).GetMatrix()
DIRECTIONS = {"identity": utils.IDENTITY, "flipped": FLIPPED, "turned": TURNED_Z, "oblique": OBLIQUE}

# ---------------------------------------------------------------------------------------------------------- geometry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=DIRECTIONS)
def pair(request: pytest.FixtureRequest) -> tuple[Geometry, sitk.Image]:
    """A geometry, and a SimpleITK image that was given the same numbers."""
    origin, spacing = (-166.1, 20.3, -340.7), (0.7, 0.8, 2.5)
    image = sitk.Image([40, 30, 20], sitk.sitkInt16)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(DIRECTIONS[request.param])
    return Geometry((20, 30, 40), origin, spacing, DIRECTIONS[request.param]), image


def some_indices() -> np.ndarray:
    """(50, 3) float indices (z, y, x) in and around a 20 x 30 x 40 array."""
    return np.random.default_rng(0).uniform(-5, 45, (50, 3))


def test_world_agrees_with_simpleitk(pair):
    geometry, image = pair
    expected = [image.TransformContinuousIndexToPhysicalPoint(index[::-1].tolist()) for index in some_indices()]
    np.testing.assert_allclose(geometry.world(some_indices()), expected, rtol=0, atol=1e-9)


def test_index_agrees_with_simpleitk(pair):
    geometry, image = pair
    points = np.random.default_rng(1).uniform(-300, 100, (50, 3))
    expected = [image.TransformPhysicalPointToContinuousIndex(point.tolist())[::-1] for point in points]
    np.testing.assert_allclose(geometry.index(points), expected, rtol=0, atol=1e-9)


def test_index_inverts_world(pair):
    geometry, _ = pair
    np.testing.assert_allclose(geometry.index(geometry.world(some_indices())), some_indices(), rtol=0, atol=1e-9)


def test_from_image_reads_all_four_fields(pair):
    geometry, image = pair
    assert Geometry.from_image(image) == geometry


def test_dict_survives_json(pair):
    geometry, _ = pair
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_world_of_one_index_on_a_flipped_scan_is_hand_countable():
    geometry = Geometry((5, 5, 5), (100.0, 200.0, 300.0), (1.0, 2.0, 5.0), FLIPPED)
    assert geometry.world((1, 2, 3)).tolist() == [97.0, 196.0, 305.0]


def test_bounds_reach_from_voxel_edge_to_voxel_edge():
    lower, upper = Geometry((2, 3, 4), (10.0, 20.0, 30.0), (1.0, 2.0, 5.0)).bounds()
    assert (lower.tolist(), upper.tolist()) == ([9.5, 19.0, 27.5], [13.5, 25.0, 37.5])


@pytest.mark.parametrize(
    ("direction", "aligned"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), True),
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), True),
        ((0, 1, 0, 1, 0, 0, 0, 0, 1), False),
        ((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1), False),
    ],
)
def test_axis_aligned_is_what_runs_along_its_own_axis_in_either_sense(direction, aligned):
    geometry = Geometry((2, 2, 2), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), tuple(map(float, direction)))
    assert geometry.is_axis_aligned == aligned


def test_bounds_of_a_flipped_scan_lie_on_the_other_side_of_its_origin():
    lower, upper = Geometry((2, 3, 4), (10.0, 20.0, 30.0), (1.0, 2.0, 5.0), FLIPPED).bounds()
    assert (lower.tolist(), upper.tolist()) == ([6.5, 15.0, 27.5], [10.5, 21.0, 37.5])


def test_bounds_agree_with_simpleitks_corners(pair):
    geometry, image = pair
    corners = [(x, y, z) for x in (-0.5, 39.5) for y in (-0.5, 29.5) for z in (-0.5, 19.5)]
    world = np.array([image.TransformContinuousIndexToPhysicalPoint(corner) for corner in corners])
    np.testing.assert_allclose(geometry.bounds(), [world.min(axis=0), world.max(axis=0)], rtol=0, atol=1e-9)


def test_covering_with_a_shape_stretches_the_voxels_over_the_box():
    grid = Geometry.covering((0, 0, 0), (8, 9, 10), shape_zyx=(5, 3, 4))
    assert grid == Geometry((5, 3, 4), (1.0, 1.5, 1.0), (2.0, 3.0, 2.0))


def test_covering_with_a_shape_ends_at_the_edges_of_the_box():
    lower, upper = Geometry.covering((-3, 2, 7), (8, 9, 10), shape_zyx=(7, 3, 11)).bounds()
    np.testing.assert_allclose([lower, upper], [[-3, 2, 7], [8, 9, 10]], rtol=0, atol=1e-9)


def test_covering_with_a_spacing_grows_the_box_to_whole_voxels():
    grid = Geometry.covering((0, 0, 0), (8, 9, 10), spacing=(2.0, 2.0, 3.0))
    assert grid == Geometry((4, 5, 4), (1.0, 1.0, 1.5), (2.0, 2.0, 3.0))


def test_covering_adds_no_voxel_for_a_rounding_error():
    assert Geometry.covering((0, 0, 0), (3 + 1e-7,) * 3, spacing=(1.0, 1.0, 1.0)).shape_zyx == (3, 3, 3)


def test_covering_a_thin_box_keeps_one_voxel():
    assert Geometry.covering((0, 0, 0), (1e-6, 1, 1), spacing=(1.0, 1.0, 1.0)).shape_zyx == (1, 1, 1)


def test_cropped_starts_at_the_world_position_of_its_first_voxel(pair):
    geometry, image = pair
    cropped = geometry.cropped(Box((3, 4, 5), (6, 8, 10)))
    assert cropped.shape_zyx == (3, 4, 5)
    np.testing.assert_allclose(cropped.origin, image.TransformIndexToPhysicalPoint((5, 4, 3)), rtol=0, atol=1e-9)


def test_contains_includes_the_outer_edge_of_the_outer_voxels():
    geometry = Geometry((2, 3, 4), (10.0, 20.0, 30.0), (1.0, 2.0, 5.0))
    points = [(9.5, 19.0, 27.5), (13.5, 25.0, 37.5), (9.4, 20, 30), (10, 25.1, 30), (10, 20, 37.6)]
    assert geometry.contains(points).tolist() == [True, True, False, False, False]


def test_contains_follows_a_flip():
    geometry = Geometry((2, 3, 4), (10.0, 20.0, 30.0), (1.0, 2.0, 5.0), FLIPPED)
    assert geometry.contains([(7, 16, 30), (13, 24, 30)]).tolist() == [True, False]


def test_image_carries_the_geometry(pair):
    geometry, _ = pair
    image = geometry.image(np.zeros((20, 30, 40), np.uint8))
    assert (image.GetOrigin(), image.GetSpacing(), image.GetDirection()) == (
        geometry.origin,
        geometry.spacing,
        geometry.direction,
    )


def test_image_puts_each_voxel_at_its_world_position(pair):
    geometry, _ = pair
    array = np.zeros((20, 30, 40), np.uint8)
    array[3, 4, 5] = 7
    image = geometry.image(array)
    assert image[image.TransformPhysicalPointToIndex(geometry.world((3, 4, 5)).tolist())] == 7


def test_voxel_volume_and_spacing_in_array_order():
    geometry = Geometry((2, 3, 4), (0.0, 0.0, 0.0), (1.0, 2.0, 5.0))
    assert (geometry.voxel_volume_mm3, geometry.spacing_zyx) == (10.0, (5.0, 2.0, 1.0))


def test_spacing_along_world_axes_follows_a_quarter_turn():
    geometry = Geometry((2, 3, 4), (0.0, 0.0, 0.0), (1.0, 2.0, 5.0), TURNED_Z)
    assert geometry.spacing_along_axes().tolist() == [2.0, 1.0, 5.0]


def test_resample_interpolates_linearly():
    image = Geometry((2, 2, 2), (0.0, 0.0, 0.0), (2.0, 2.0, 2.0)).image(np.arange(8, dtype=np.int16).reshape(2, 2, 2))
    middle = resample(image, Geometry((1, 1, 1), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))
    assert middle[0, 0, 0] == 3.5


def test_resample_without_interpolation_takes_the_nearest_voxel():
    image = Geometry((2, 2, 2), (0.0, 0.0, 0.0), (2.0, 2.0, 2.0)).image(np.arange(8, dtype=np.int16).reshape(2, 2, 2))
    near_last = Geometry((1, 1, 1), (1.2, 1.2, 1.2), (1.0, 1.0, 1.0))
    assert resample(image, near_last, linear=False)[0, 0, 0] == 7


def test_resample_fills_outside_the_image():
    image = Geometry((2, 2, 2), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).image(np.zeros((2, 2, 2), np.int16))
    assert resample(image, Geometry((1, 1, 1), (9.0, 9.0, 9.0), (1.0, 1.0, 1.0)), fill=-5)[0, 0, 0] == -5


# ------------------------------------------------------------------------------------------------------------- files


def write_and_fail(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt


def test_atomic_path_writes_the_file_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("done")
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["done"]


@contextmanager
def nearly_full_disk() -> Iterator[None]:
    """Lets no file grow above 10 kB, that of pytest's own words neither; to a writer it is a disk without room."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_with_torch(path: Path) -> None:
    with atomic_path(path) as temporary:
        torch.save({"weights": torch.zeros(100_000)}, temporary)


def append_rows(path: Path) -> None:
    utils.append_csv(path, pd.DataFrame({"a": range(10_000)}))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", lambda path: write_array(path, np.zeros(100_000))),
        ("a.json", lambda path: write_json(path, list(range(10_000)))),
        ("a.csv", lambda path: write_csv(path, pd.DataFrame({"a": range(10_000)}))),
        ("log.csv", append_rows),
        ("a.pth", save_with_torch),
    ],
)
def test_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, name, write):
    (tmp_path / name).write_text("a\n1\n")
    told = rf"{name} could not be written \(.* MB are free\); what was there before is intact"
    with pytest.raises(OSError, match=told), nearly_full_disk():
        write(tmp_path / name)
    assert (tmp_path / name).read_text().startswith("a\n1\n")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folder_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"a\.txt could not be written"):
        write_text(tmp_path / "a.txt", "new")


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path / "a.txt")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_failed_first_write_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


def test_old_file_stands_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"


def test_temporary_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        temporary.touch()
        assert temporary.name.endswith(".nii.gz")


def test_written_text_is_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "Größe: 3 mm²\n")
    assert (tmp_path / "a.txt").read_bytes() == "Größe: 3 mm²\n".encode()


def test_written_json_reads_back(tmp_path):
    write_json(tmp_path / "a.json", {"origin": [1.5, 2.0]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"origin": [1.5, 2.0]}


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"dice": math.nan, "rows": [(np.float64("nan"), 1.5, "x")]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"dice": None, "rows": [[None, 1.5, "x"]]}


def test_written_json_keeps_lists_of_numbers_on_one_line(tmp_path):
    write_json(tmp_path / "a.json", {"points": [[1, 2.5], [-3, 4e-7]], "name": "x"})
    lines = [line.strip() for line in (tmp_path / "a.json").read_text().splitlines()]
    assert lines == ["{", '"points": [', "[ 1, 2.5 ],", "[ -3, 4e-07 ]", "],", '"name": "x"', "}"]


def test_written_csv_has_no_index_column(tmp_path):
    write_csv(tmp_path / "a.csv", pd.DataFrame({"seriesuid": ["1.2"], "x": [0.5]}))
    assert (tmp_path / "a.csv").read_text() == "seriesuid,x\n1.2,0.5\n"


def test_written_array_keeps_values_and_type(tmp_path):
    write_array(tmp_path / "a.npy", np.array([[0, 0.5]], np.float16))
    array = np.load(tmp_path / "a.npy")
    assert (array.dtype, array.tolist()) == (np.float16, [[0.0, 0.5]])


def test_array_of_objects_is_refused(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        write_array(tmp_path / "a.npy", np.array([{}], dtype=object))


OBJECTS = {"origin": [1.0, 2.0, 3.0], "nodules": [{"diameter_mm": 6.5, "inside": True}], "source": None}


def test_written_objects_load_with_numpys_item(tmp_path):
    write_objects(tmp_path / "1.2_metadata.npy", OBJECTS)
    assert np.load(tmp_path / "1.2_metadata.npy", allow_pickle=True).item() == OBJECTS


def test_written_objects_have_an_equal_json_twin(tmp_path):
    write_objects(tmp_path / "1.2_metadata.npy", OBJECTS)
    assert json.loads((tmp_path / "1.2_metadata.json").read_text()) == OBJECTS


def test_written_list_loads_as_a_list(tmp_path):
    write_objects(tmp_path / "nodules.npy", [{"x": 1}, {"x": 2}])
    assert np.load(tmp_path / "nodules.npy", allow_pickle=True).item() == [{"x": 1}, {"x": 2}]


def annotation_file(folder: Path, *rows: str, columns: str = ",".join(ANNOTATION_COLUMNS)) -> Path:
    path = folder / "annotations.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def test_table_keeps_uids_as_text_and_numbers_as_floats(tmp_path):
    table = read_table(annotation_file(tmp_path, "1.10,1,-2,3.5,6"), ANNOTATION_COLUMNS)
    assert table.iloc[0].tolist() == ["1.10", 1.0, -2.0, 3.5, 6.0]


def test_compressed_table_is_read(tmp_path):
    pd.DataFrame({"seriesuid": ["1.10"], "x": [1]}).to_csv(tmp_path / "a.csv.gz", index=False)
    assert read_table(tmp_path / "a.csv.gz", ["seriesuid", "x"])["seriesuid"].tolist() == ["1.10"]


def test_table_without_rows_is_read(tmp_path):
    assert len(read_table(annotation_file(tmp_path), ANNOTATION_COLUMNS)) == 0


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"annotations\.csv does not exist"):
        read_table(tmp_path / "annotations.csv", ANNOTATION_COLUMNS)


def test_empty_file_is_no_table(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match="is no CSV table"):
        read_table(tmp_path / "a.csv", ANNOTATION_COLUMNS)


def test_table_names_its_missing_columns(tmp_path):
    with pytest.raises(ValueError, match="missing: coordZ, diameter_mm"):
        read_table(annotation_file(tmp_path, columns="seriesuid,coordX,coordY"), ANNOTATION_COLUMNS)


@pytest.mark.parametrize("value", ["", "left", "inf", "nan"])
def test_table_names_the_line_and_column_of_a_bad_number(tmp_path, value):
    path = annotation_file(tmp_path, "1.1,1,2,3,4", f"1.2,1,{value},3,4")
    with pytest.raises(ValueError, match="row 2: coordY is empty or no number"):
        read_table(path, ANNOTATION_COLUMNS)


def test_table_without_a_uid_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 1: seriesuid is empty"):
        read_table(annotation_file(tmp_path, ",1,2,3,4"), ANNOTATION_COLUMNS)


TABLE = "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.10,1.5,-2,3.5,6\n1.2,7,8,9.25,10\n"


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (lambda text: text, "utf-8-sig"),
        (lambda text: text, "utf-16"),
        (lambda text: text.replace("\n", "\r\n"), "utf-8"),
        (lambda text: text.replace(",", ";").replace(".5", ",5").replace(".25", ",25"), "utf-8-sig"),
        (lambda text: text.replace(",", ";"), "utf-8"),
        (lambda text: text.replace(",", "\t"), "utf-16"),
        (lambda text: text.replace(",", " , "), "utf-8"),
        (lambda text: re.sub(r"[^,\n]+", r'"\g<0>"', text), "utf-8"),
        (lambda text: text.replace("coordX", '"coordX"').replace("\n1", "\n 1"), "latin-1"),
        (lambda text: "\n" + text + "\n\n", "utf-8"),
    ],
)
def test_table_is_read_as_people_write_it(tmp_path, change, encoding):
    (tmp_path / "a.csv").write_bytes(change(TABLE).encode(encoding))
    table = read_table(tmp_path / "a.csv", ANNOTATION_COLUMNS)
    assert table[list(ANNOTATION_COLUMNS)].to_numpy().tolist() == [["1.10", 1.5, -2, 3.5, 6], ["1.2", 7, 8, 9.25, 10]]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_without_a_name_move_no_other_column(tmp_path, separator):
    rows = [["", "seriesuid", "", "coordX", "coordY", "coordZ", "diameter_mm"], ["0", "1.10", "x", "1", "2", "3", "4"]]
    (tmp_path / "a.csv").write_text("\n".join(separator.join(row) for row in rows))
    table = read_table(tmp_path / "a.csv", ANNOTATION_COLUMNS)
    assert table.loc[0, list(ANNOTATION_COLUMNS)].tolist() == ["1.10", 1, 2, 3, 4]


def test_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match="is cut off or no text"):
        read_table(tmp_path / "a.csv", ANNOTATION_COLUMNS)
    (tmp_path / "a.csv").write_bytes(TABLE.encode("utf-16-le"))
    with pytest.raises(ValueError, match="is no text; save it as CSV, UTF-8"):
        read_table(tmp_path / "a.csv", ANNOTATION_COLUMNS)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TABLE.encode())[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        read_table(tmp_path / "a.csv.gz", ANNOTATION_COLUMNS)


UIDS = "1.2.3\n1.2.10\n1.2.4\n"


@pytest.mark.parametrize(
    "text",
    [
        UIDS,
        "\ufeff" + UIDS,
        "seriesuid\n" + UIDS,
        "\ufeffseriesuid\n" + UIDS,
        "SeriesInstanceUID\n" + UIDS,
        "Series Instance UID\n" + UIDS,
        "scans of fold 1\n" + UIDS,
        UIDS.replace("\n", "\r\n\r\n"),
        '"1.2.3"\n"1.2.10"\n"1.2.4"\n',
        " 1.2.3 \n\t1.2.10\n1.2.4",
        UIDS.replace("\n", ";\n"),
        "patient;seriesuid;fold\n" + "".join(f"p;{uid};0\n" for uid in UIDS.split()),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_list_of_series_uids_is_read_as_people_write_it(tmp_path, text, encoding):
    (tmp_path / "seriesuids.csv").write_bytes(text.encode(encoding))
    assert read_seriesuids(tmp_path / "seriesuids.csv") == ["1.2.3", "1.2.10", "1.2.4"]


def test_names_that_are_no_uids_are_all_scans(tmp_path):
    (tmp_path / "seriesuids.csv").write_text("scan one\nb\nc\n")
    assert read_seriesuids(tmp_path / "seriesuids.csv") == ["scan one", "b", "c"]


def test_list_of_several_columns_must_name_the_one_with_the_uids(tmp_path):
    (tmp_path / "seriesuids.csv").write_text("1.2.3,a\n1.2.4,b\n")
    with pytest.raises(ValueError, match="has 2 columns, none of them named seriesuid"):
        read_seriesuids(tmp_path / "seriesuids.csv")


def test_nodule_listed_twice_counts_once_and_is_told(tmp_path, caplog):
    rows = ["1.1,1,2,3,6", "1.1,1,2,9,6", "1.2,1,2,3,6", "1.1,1.001,2,3,5"]
    table = without_repeats(read_table(annotation_file(tmp_path, *rows), ANNOTATION_COLUMNS), "annotations.csv")
    assert table.index.tolist() == [0, 1, 2]
    assert "annotations.csv: 1 of 4 nodules are listed twice and count once, such as one in 1.1" in caplog.text


# ------------------------------------------------------------------------------------------- processed scans, splits


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A processed data set of one scan of 2 x 3 x 4 voxels."""
    write_array(tmp_path / "images" / "1.1.npy", np.full((2, 3, 4), 0.5, np.float16))
    write_array(tmp_path / "masks" / "1.1.npy", np.ones((2, 3, 4), np.uint8))
    grid = Geometry((2, 3, 4), (1.0, 2.0, 3.0), (0.5, 1.0, 2.0))
    write_metadata(tmp_path, replace(metadata_of(nodule_at(0.0, 1.0, 2.0), seriesuid="1.1"), grid=grid))
    write_text(tmp_path / "processed_files.txt", "1.1\n")
    return tmp_path


def test_processed_scan_has_image_mask_and_metadata(data_dir):
    scan = read_processed(data_dir, "1.1")
    assert (scan.image.dtype, scan.mask.dtype, scan.image.mean(), scan.mask.sum()) == (np.float16, np.uint8, 0.5, 24)
    assert scan.metadata.grid.origin == (1.0, 2.0, 3.0)


def test_processed_scan_is_not_loaded_into_memory(data_dir):
    scan = read_processed(data_dir, "1.1")
    assert isinstance(scan.image, np.memmap)
    assert isinstance(scan.mask, np.memmap)


def test_processed_scan_has_the_geometry_of_its_metadata(data_dir):
    assert read_processed(data_dir, "1.1").geometry == Geometry((2, 3, 4), (1.0, 2.0, 3.0), (0.5, 1.0, 2.0))


def test_metadata_come_from_the_json_twin(data_dir):
    (data_dir / "1.1_metadata.npy").unlink()
    assert read_metadata(data_dir, "1.1").grid.spacing == (0.5, 1.0, 2.0)


def test_metadata_have_the_fields_that_the_brief_reads(data_dir):
    fields = np.load(data_dir / "1.1_metadata.npy", allow_pickle=True).item()
    assert (fields["origin"], fields["spacing"]) == ([1.0, 2.0, 3.0], [0.5, 1.0, 2.0])
    assert fields["nodules"][0]["center_voxel"] == [2.0, 1.0, 0.0]  # x, y, z


def test_metadata_come_back_as_they_were_written(tmp_path):
    nodule = AnnotatedNodule((-1.5, 2.0, 3.0), (0.5, 1.0, 2.0), 6.0, 7, "lidc", False, True)
    metadata = replace(metadata_of(nodule, fold=3, patient="LIDC-IDRI-0332"), preprocessing={"target_size": [1, 2, 3]})
    write_metadata(tmp_path, metadata)
    assert read_metadata(tmp_path, "a") == metadata


@pytest.mark.parametrize("text", ["{}", "[]", '{"origin": 3}', '{"shape_zyx": 5, "origin": [1], "spacing": [1]}'])
def test_metadata_of_another_version_say_what_to_run(data_dir, text):
    (data_dir / "1.1_metadata.json").write_text(text)
    with pytest.raises(InputError, match=r"of another version; run python preprocess\.py again"):
        read_metadata(data_dir, "1.1")


def test_array_of_another_shape_than_its_metadata_is_refused(data_dir):
    for kind, dtype in (("images", np.float16), ("masks", np.uint8)):
        write_array(data_dir / kind / "1.1.npy", np.ones((2, 3, 5), dtype))
    with pytest.raises(InputError, match=r"the arrays of 1\.1 have the shape \(2, 3, 5\), not that of its metadata"):
        read_processed(data_dir, "1.1")


def test_box_around_a_mask_is_half_open_and_tight():
    mask = np.zeros((3, 5, 6), np.uint8)
    mask[1, 2, 3] = mask[2, 4, 3] = 1
    box = Box.around(mask)
    assert box == Box((1, 2, 3), (3, 5, 4)) == Box.of_size((1, 2, 3), (2, 3, 1))
    assert box.shape_zyx == mask[box.slices].shape == (2, 3, 1)
    assert Box.around(np.zeros((2, 2, 2))) is None


@pytest.mark.parametrize("missing", ["images/1.1.npy", "masks/1.1.npy", "1.1_metadata.json"])
def test_processed_scan_with_a_missing_file_says_what_to_run(data_dir, missing):
    (data_dir / missing).unlink()
    with pytest.raises(FileNotFoundError, match=r"does not exist; run python preprocess\.py first"):
        read_processed(data_dir, "1.1")


def test_processed_scan_with_a_mask_of_another_shape_is_refused(data_dir):
    write_array(data_dir / "masks" / "1.1.npy", np.ones((2, 3, 5), np.uint8))
    with pytest.raises(ValueError, match=r"image \(2, 3, 4\) and mask \(2, 3, 5\) of 1\.1 differ"):
        read_processed(data_dir, "1.1")


def test_processed_list_is_read(data_dir):
    write_text(data_dir / "processed_files.txt", "1.1\n1.2\n")
    assert read_processed_list(data_dir) == ["1.1", "1.2"]


def test_missing_processed_list_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python preprocess\.py first"):
        read_processed_list(tmp_path)


def test_empty_processed_list_is_refused(data_dir):
    write_text(data_dir / "processed_files.txt", "\n")
    with pytest.raises(ValueError, match="lists no scan"):
        read_processed_list(data_dir)


def test_split_is_read(tmp_path):
    write_json(tmp_path / "split.json", {"train": ["1.1"], "validation": ["1.2"]})
    assert read_split(tmp_path / "split.json") == Split(("1.1",), ("1.2",))


def test_split_comes_back_as_it_was_written(tmp_path):
    split = Split(("1.1", "1.3"), ("1.2",), ("1.4",), fold=2)
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split
    assert split.parts == {"1.1": "train", "1.3": "train", "1.2": "validation", "1.4": "test"}


def test_missing_split_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"keep split\.json"):
        read_split(tmp_path / "split.json")


@pytest.mark.parametrize("text", ['{"train": []}', '{"train": [], "validation": "1.2"}', "[]"])
def test_split_without_its_two_lists_is_refused(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match="must hold the lists 'train' and 'validation'"):
        read_split(tmp_path / "split.json")


# ------------------------------------------------------------------------------------------------- seeds and devices


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(utils, "_warned_devices", set())


def test_cuda_becomes_the_cpu_where_there_is_none(no_cuda):
    assert select_device("cuda") == torch.device("cpu")


def test_missing_cuda_is_warned_of_once(no_cuda, caplog):
    select_device("cuda")
    select_device("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA device found: running on the CPU, which is much slower"
    ]


def test_cpu_is_chosen_without_a_warning(no_cuda, caplog):
    assert select_device("cpu") == torch.device("cpu")
    assert caplog.records == []


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_other_kinds_of_device_are_refused(device):
    with pytest.raises(ValueError, match=f"device must be 'cuda', 'cuda:<n>' or 'cpu', not '{device}'"):
        select_device(device)


def test_no_half_precision_unless_asked_for():
    assert autocast_dtype(torch.device("cpu"), mixed_precision=False) is None


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, None)])
def test_half_precision_on_the_cpu_needs_the_hardware(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert autocast_dtype(torch.device("cpu"), mixed_precision=True) is expected


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_half_precision_on_cuda_is_fp16_without_native_bf16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert autocast_dtype(torch.device("cuda"), mixed_precision=True) is expected


def test_check_passes_what_holds():
    assert check(True, "never seen") is None


def test_check_raises_what_does_not_hold():
    with pytest.raises(ValueError, match="must be positive"):
        check(False, "it must be positive")


# ------------------------------------------------------------------------------------------- files of killed writers

WRITER = """
import os, signal, sys
from utils import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_file_of_a_killed_writer_is_cleared_by_the_next_one(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "model.pth")], cwd=ROOT, check=False)
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".partial-") and partial.suffix == ".pth"
    assert not list(tmp_path.glob("model*")) and not list(tmp_path.glob("checkpoint_epoch_*.pth"))
    monkeypatch.setattr(utils, "_tidy_folders", set())  # as in a new process
    write_text(tmp_path / "other.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


def test_file_that_another_writer_is_at_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "_tidy_folders", set())
    elsewhere = tmp_path / ".partial-00000000-1-abcdefab-model.pth"  # another machine; no process of ours is its writer
    elsewhere.write_text("half")
    with utils.atomic_path(tmp_path / "model.pth") as ours:
        ours.write_text("whole")
        monkeypatch.setattr(utils, "_tidy_folders", set())
        write_text(tmp_path / "other.txt", "whole")  # meets a file whose process lives
        assert ours.exists() and elsewhere.exists()
    os.utime(elsewhere, (0, 0))  # nobody has touched it for years
    monkeypatch.setattr(utils, "_tidy_folders", set())
    write_text(tmp_path / "other.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "other.txt"]


def test_temporary_names_differ_between_writers_and_machines(tmp_path, monkeypatch):
    names = set()
    for node in ("a", "a", "b"):
        monkeypatch.setattr("platform.node", lambda node=node: node)
        with utils.atomic_path(tmp_path / "x.txt") as temporary:
            names.add(temporary.name)
            temporary.write_text("")
    assert len(names) == 3
    assert len({name.split("-")[1] for name in names}) == 2


def test_folder_lock_lets_one_at_a_time(tmp_path):
    code = f"""
import time
from pathlib import Path
from utils import folder_lock
for _ in range(20):
    with folder_lock({str(tmp_path)!r}):
        count = int(Path({str(tmp_path / "count")!r}).read_text())
        time.sleep(0.005)
        Path({str(tmp_path / "count")!r}).write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "count").read_text() == "40"


def test_lock_goes_although_a_forked_worker_lives(tmp_path):
    with utils.folder_lock(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        worker.start()
    try:
        with utils.folder_lock(tmp_path, "busy"):
            pass
        busy = utils.folder_lock(tmp_path, "busy")
        with utils.folder_lock(tmp_path), pytest.raises(FileExistsError, match="busy"), busy:  # and it does lock
            pass
    finally:
        worker.kill()


@pytest.mark.parametrize("name", ["1.2.raw", "1.2.ZRAW"])
def test_data_file_of_a_scan_is_answered_by_the_name_of_its_header(name):
    with pytest.raises(InputError, match=rf"{name} holds the voxels alone; name the \.mhd file beside it"):
        scan_name(name)


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"a\.json is damaged or no JSON"):
        utils.read_json(tmp_path / "a.json")


def test_damaged_array_is_named(processed_dir, tmp_path):
    uid = read_processed_list(processed_dir)[0]
    shutil.copytree(processed_dir, tmp_path / "data")
    (tmp_path / "data" / "images" / f"{uid}.npy").write_bytes(b"")
    with pytest.raises(InputError, match=rf"{uid}\.npy is damaged .*; run python preprocess.py again"):
        read_processed(tmp_path / "data", uid)


def test_appended_rows_are_those_of_a_whole_table(tmp_path):
    table = pd.DataFrame({"seriesuid": ["a", "b"], "probability": [0.25, 1 / 3]})
    write_csv(tmp_path / "a.csv", table[:1])
    utils.append_csv(tmp_path / "a.csv", table[1:])
    write_csv(tmp_path / "b.csv", table)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_half_a_row_that_a_killed_process_left_costs_no_other_row(tmp_path):
    table = pd.DataFrame({"seriesuid": ["a", "b"], "probability": [0.25, 0.5]})
    write_csv(tmp_path / "a.csv", table[:1])
    with open(tmp_path / "a.csv", "a") as file:
        file.write("c,0.")
    utils.append_csv(tmp_path / "a.csv", table[1:])
    assert pd.read_csv(tmp_path / "a.csv")["seriesuid"].tolist() == ["a", "b"]


def test_what_is_told_reaches_who_has_set_up_logging_for_warnings_alone():
    code = "import logging; logging.basicConfig(); import utils; utils.tell('half way')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "half way\n"


# ------------------------------------------------------------------------------------------------------------ threads


def write_groups(folder, lines, files):
    """Control groups as Linux shows them; returns their root, and the file of the process's groups is ``cgroup``."""
    for name, text in files.items():
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root" / name).write_text(f"{text}\n")
    (folder / "cgroup").write_text(lines)
    return folder / "root"


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/not/shown/in/a/container", {"cpu.max": "400000 100000"}, 4),
        (
            "3:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("2:cpuset:/a", {"cpuset/a/cpu.max": "100000 100000"}, math.inf),
        ("0::/", {"cpu.max": "what is this"}, math.inf),
    ],
)
def test_quota_of_a_container_is_read(tmp_path, line, files, cores):
    root = write_groups(tmp_path, f"4:memory:/m\n{line}\n", files)
    assert utils._core_quota(tmp_path / "cgroup", root) == cores
    assert utils._core_quota(tmp_path / "missing", root) == math.inf


@pytest.mark.parametrize(("quota", "cores"), [(math.inf, 8), (1.5, 2), (0.5, 1), (100, 8)])
def test_quota_limits_the_cores(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(utils, "_core_quota", lambda: quota)
    assert utils.count_cores() == cores


RESTARTED = """
import os, sys
import utils
utils._core_quota = lambda: {quota}
os.write(1, b"begin ")
if __name__ == "__main__":
    utils.set_up_torch()
print(os.getenv("OMP_WAIT_POLICY"), os.getenv("OMP_NUM_THREADS"), os.getenv("GOMP_SPINCOUNT"), sys.argv[1:])
print(os.getenv(utils.LARGE_PAGES))
"""


@pytest.mark.skipif(os.name != "posix", reason="scripts start anew on POSIX alone")
@pytest.mark.parametrize(
    ("quota", "given", "expected"),
    [
        ("float('inf')", {}, "begin begin PASSIVE None 2000 ['--a', 'b c']\n1"),
        ("1.0", {}, "begin begin PASSIVE 1 2000 ['--a', 'b c']\n1"),
        ("1.0", {"OMP_NUM_THREADS": "3"}, "begin begin PASSIVE 3 2000 ['--a', 'b c']\n1"),
        ("float('inf')", {"GOMP_SPINCOUNT": "9"}, "begin None None 9 ['--a', 'b c']\n1"),
        ("float('inf')", {"OMP_WAIT_POLICY": "ACTIVE"}, "begin ACTIVE None None ['--a', 'b c']\n1"),
    ],
)
def test_script_starts_anew_with_threads_that_sleep(tmp_path, quota, given, expected):
    (tmp_path / "script.py").write_text(RESTARTED.format(quota=quota))
    assert run_restarted([str(tmp_path / "script.py"), "--a", "b c"], given) == expected


@pytest.mark.parametrize("name", ["__main__", "script"])
def test_nothing_starts_anew_within_another_program(tmp_path, name):
    (tmp_path / "script.py").write_text(RESTARTED.format(quota="1.0"))
    code = f"import runpy; runpy.run_path({str(tmp_path / 'script.py')!r}, run_name={name!r})"  # as a notebook does
    pages = "1" if name == "__main__" else "None"
    assert run_restarted(["-c", code], {}) == f"begin None None None []\n{pages}"


@pytest.mark.parametrize("script", ["train", "validate", "infer"])
def test_scripts_start_anew_before_torch_is_loaded(script):
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    assert lines.index("    set_up_torch()") < lines.index("import torch")


def run_restarted(words: Sequence[str], environment: dict[str, str]) -> str:
    """What a Python command prints, with none of the settings of threads but the given ones."""
    removed = ("OMP_NUM_THREADS", utils.LARGE_PAGES, *utils.WAITING)
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    environment = kept | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


# ----------------------------------------------------------------------------------------------------- random streams


def test_streams_are_distinct_and_repeatable():
    keys = [(stream, seed, *rest) for stream in ("a", "b") for seed in (0, 1) for rest in ((), (0,), (0, 0), (1,))]
    first = {utils.generator_of(*key).random() for key in keys}
    assert len(first) == len(keys)
    assert first == {utils.generator_of(*key).random() for key in keys}


# ------------------------------------------------------------------------------------------------------ what is told


def test_progress_tells_a_line_a_minute_where_there_is_no_terminal(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO"), utils.Progress(8, "validation", "scan") as progress:
        for _ in range(8):
            now[0] += 25
            progress.advance("loss 0.5")
    assert caplog.messages == [
        "validation: 3 of 8 scans, about 2 min left, loss 0.5",
        "validation: 6 of 8 scans, about 50 s left, loss 0.5",
    ]


def test_what_is_told_without_logging_goes_to_stderr():
    code = "import utils; utils.tell('half way'); print('result')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("result\n", "half way\n")


def test_failure_is_noted_in_a_line_and_a_bug_with_its_traceback(caplog):
    failures = {}
    for name, error in (("a", InputError("the scan\nis 2-D")), ("b", IndexError("9")), ("c", MemoryError())):
        with utils.noting(failures, name):
            raise error
    assert {name: utils.reason_of(error) for name, error in failures.items()} == {
        "a": "the scan is 2-D",
        "b": "unexpected IndexError: 9",
        "c": "it does not fit into memory; end other programs, or use smaller sizes",
    }
    assert [record.exc_info is not None for record in caplog.records] == [False, True, False]


LEARNT = {"slice_mm": (1.0, 3.0), "pixel_mm": (0.6, 0.8), "noise_hu": (10.0, 30.0)}


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({"slice_mm": 3.0, "pixel_mm": 0.7, "noise_hu": 20.0}, ""),
        ({"slice_mm": 0.8, "pixel_mm": 1.1, "noise_hu": 40.0}, ""),  # within one and a half times
        ({"slice_mm": 5.0, "pixel_mm": 0.7}, "slices of 5 mm, where training scans have 1 to 3"),
        ({"slice_mm": 0.5, "pixel_mm": 0.7}, "slices of 0.5 mm, where training scans have 1 to 3"),
        ({"slice_mm": 2.0, "pixel_mm": 0.7, "noise_hu": 1.0}, ""),
        (
            {"slice_mm": 2.0, "pixel_mm": 2.0, "noise_hu": 99.0},
            "pixels of 2 mm, where training scans have 0.6 to 0.8; "
            "a noise of 99 HU, where training scans have 10 to 30",
        ),
    ],
)
def test_scan_outside_of_what_was_learnt_is_described(figures, text):
    assert utils.describe_unlike(figures, LEARNT) == text


def test_nothing_is_said_where_nothing_is_known():
    assert utils.describe_unlike({"slice_mm": 9.0}, {}) == ""


def test_ranges_are_those_of_all_scans():
    scans = [metadata_of(), replace(metadata_of(), noise_hu=20.0)]
    assert utils.ranges_of(scans) == {"slice_mm": (1.0, 1.0), "pixel_mm": (1.0, 1.0), "noise_hu": (20.0, 20.0)}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (86400, "24.0 h")]
)
def test_time_is_told_as_a_person_says_it(seconds, text):
    assert utils.describe_time(seconds) == text


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/", {}, math.inf),
        ("0::/", {"memory.max": "max", "memory.current": "5", "memory.stat": "anon 1"}, math.inf),
        ("0::/a", {"a/memory.max": "100", "a/memory.current": "60", "a/memory.stat": "anon 9\ninactive_file 20"}, 60),
        ("0::/a", {"a/memory.max": "100", "a/memory.current": "160", "a/memory.stat": "inactive_file 20"}, 0),
        ("0::/a/b", {"a/memory.max": "100", "a/memory.current": "60", "a/memory.stat": "anon 1"}, 40),
        (
            "7:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": "100",
                "memory/a/memory.usage_in_bytes": "30",
                "memory/a/memory.stat": "total_inactive_file 10",
            },
            80,
        ),
        ("0::/", {"memory.max": "what", "memory.current": "is", "memory.stat": "this one"}, math.inf),
    ],
)
def test_memory_of_a_container_is_read(tmp_path, line, files, left):
    root = write_groups(tmp_path, f"3:cpu:/m\n{line}\n", files)
    assert utils._memory_left(tmp_path / "cgroup", root) == left
    assert utils._memory_left(tmp_path / "missing", root) == math.inf


def test_container_limits_the_free_memory(monkeypatch):
    monkeypatch.setattr(utils, "_memory_left", lambda: 12345.0)
    assert utils.free_memory(torch.device("cpu")) == 12345


def test_array_of_a_scan_that_failed_is_let_go():
    class Array:
        pass

    def work():
        array = Array()
        held.append(weakref.ref(array))
        raise ValueError("disk full")

    held, failures = [], {}
    with utils.noting(failures, "a"):
        work()
    assert held[0]() is None and str(failures["a"]) == "disk full"
