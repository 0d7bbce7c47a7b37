"""The phantom data set: LUNA16's layout, known nodules, the same files every time."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from data import phantom
from data.phantom import UID_PREFIX, Maker, Phantom, as_table, is_nodule_free, main, make_phantom, write_phantoms
from preprocess import find_scans
from utils import ANNOTATION_COLUMNS

UIDS = [f"{UID_PREFIX}.0.{index}" for index in range(4)]
SMALL = (48, 48, 24)
LEFT, RIGHT, AIRWAY = 3, 4, 5


def scan_of(folder: Path, index: int) -> sitk.Image:
    return sitk.ReadImage(str(folder / "raw" / f"subset{index}" / f"{UIDS[index]}.mhd"))


def labels_of(folder: Path, index: int) -> sitk.Image:
    return sitk.ReadImage(str(folder / "seg-lungs-LUNA16" / f"{UIDS[index]}.mhd"))


def annotations_of(folder: Path, name: str = "annotations.csv") -> pd.DataFrame:
    return pd.read_csv(folder / name, dtype={"seriesuid": str})


def test_scan_i_lies_in_subset_i(phantom_dir):
    expected = {uid: phantom_dir / "raw" / f"subset{index}" / f"{uid}.mhd" for index, uid in enumerate(UIDS)}
    assert find_scans(phantom_dir / "raw") == expected


def test_scans_are_raw_and_lung_masks_compressed(phantom_dir):
    assert (phantom_dir / "raw" / "subset0" / f"{UIDS[0]}.raw").is_file()
    assert (phantom_dir / "seg-lungs-LUNA16" / f"{UIDS[0]}.zraw").is_file()


def test_series_list_names_every_scan(phantom_dir):
    assert (phantom_dir / "seriesuids.csv").read_text().split() == UIDS


@pytest.mark.parametrize("name", ["annotations.csv", "annotations_excluded.csv"])
def test_tables_have_luna16s_columns(phantom_dir, name):
    assert tuple(annotations_of(phantom_dir, name).columns) == ANNOTATION_COLUMNS


def test_scans_hold_16_bit_integers_of_the_asked_size(phantom_dir):
    scan = scan_of(phantom_dir, 0)
    assert (scan.GetSize(), scan.GetPixelID()) == ((64, 64, 32), sitk.sitkInt16)


def test_voxels_are_anisotropic(phantom_dir):
    x, y, z = scan_of(phantom_dir, 0).GetSpacing()
    assert x == y < z


@pytest.mark.parametrize(
    ("index", "matrix"), [(0, "1 0 0 0 1 0 0 0 1"), (2, "-1 0 0 0 -1 0 0 0 1"), (3, "1 0 0 0 1 0 0 0 1")]
)
def test_third_scan_is_stored_flipped(phantom_dir, index, matrix):
    header = (phantom_dir / "raw" / f"subset{index}" / f"{UIDS[index]}.mhd").read_text()
    assert f"TransformMatrix = {matrix}\n" in header


def test_second_scan_has_no_nodule_and_the_others_have(phantom_dir):
    assert set(annotations_of(phantom_dir)["seriesuid"]) == {UIDS[0], UIDS[2], UIDS[3]}


def test_nodules_have_the_asked_diameters(phantom_dir):
    assert annotations_of(phantom_dir)["diameter_mm"].between(12, 32.3).all()


def test_every_nodule_is_brighter_than_lung_at_its_world_position(phantom_dir):
    for row in annotations_of(phantom_dir).itertuples():
        index = UIDS.index(row.seriesuid)
        scan, labels = scan_of(phantom_dir, index), labels_of(phantom_dir, index)
        lung = np.median(sitk.GetArrayFromImage(scan)[np.isin(sitk.GetArrayFromImage(labels), (LEFT, RIGHT))])
        center = scan.TransformPhysicalPointToIndex((row.coordX, row.coordY, row.coordZ))
        assert scan[center] > lung + 150


def test_excluded_findings_are_too_small_or_without_diameter(phantom_dir):
    diameters = annotations_of(phantom_dir, "annotations_excluded.csv")["diameter_mm"]
    assert ((diameters == -1) | diameters.between(1.6, 2.95)).all()
    assert (diameters == -1).any()


@pytest.mark.parametrize("index", range(4))
def test_lung_masks_have_luna16s_labels(phantom_dir, index):
    assert set(np.unique(sitk.GetArrayFromImage(labels_of(phantom_dir, index)))) == {0, LEFT, RIGHT, AIRWAY}


@pytest.mark.parametrize("index", [0, 2])
def test_left_lung_lies_to_the_left_of_the_right_one_in_the_world(phantom_dir, index):
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(labels_of(phantom_dir, index))
    assert shape.GetCentroid(LEFT)[0] > shape.GetCentroid(AIRWAY)[0] > shape.GetCentroid(RIGHT)[0]


@pytest.mark.parametrize("index", [0, 2])
def test_lung_mask_lies_on_its_scan(phantom_dir, index):
    scan, labels = scan_of(phantom_dir, index), labels_of(phantom_dir, index)
    assert scan.IsSameImageGeometryAs(labels)
    lungs = np.isin(sitk.GetArrayFromImage(labels), (LEFT, RIGHT))
    assert np.median(sitk.GetArrayFromImage(scan)[lungs]) < -700


@pytest.mark.parametrize(("index", "padding"), [(0, -3024), (1, None), (2, -2048)])
def test_two_scans_of_three_are_padded_as_scanners_do(phantom_dir, index, padding):
    values = sitk.GetArrayFromImage(scan_of(phantom_dir, index))
    assert values[0, 0, 0] == padding if padding else values.min() >= -1024


def test_files_are_the_same_for_one_and_two_processes(phantom_dir, tmp_path):
    write_phantoms(tmp_path, num_scans=1, size_xyz=(64, 64, 32), min_diameter_mm=12, num_processes=1)
    made = list(tmp_path.rglob(f"{UIDS[0]}.*"))
    assert len(made) == 4
    assert all(path.read_bytes() == (phantom_dir / path.relative_to(tmp_path)).read_bytes() for path in made)


@pytest.fixture(scope="module")
def other_phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A phantom of another seed, made by the command line over an older one; its exit status and what it printed."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "raw" / "subset3").mkdir(parents=True)
    (folder / "raw" / "subset3" / f"{UIDS[3]}.mhd").touch()
    options = ["--num_scans", "1", "--seed", "1", "--size_xyz", "[64,64,32]", "--nodule_free", "1"]
    with redirect_stdout(io.StringIO()) as printed:
        status = main(["--output_dir", str(folder), *options, "--num_processes", "1", "--overwrite", "true"])
    return folder, status, printed.getvalue()


def test_older_phantom_is_replaced_where_that_is_allowed(other_phantom):
    assert list(find_scans(other_phantom[0] / "raw")) == [f"{UID_PREFIX}.1.0"]


def test_another_seed_gives_another_scan(other_phantom, phantom_dir):
    other = sitk.ReadImage(str(other_phantom[0] / "raw" / "subset0" / f"{UID_PREFIX}.1.0.mhd"))
    assert not np.array_equal(sitk.GetArrayFromImage(other), sitk.GetArrayFromImage(scan_of(phantom_dir, 0)))


def test_phantom_without_nodules_has_an_empty_table_of_annotations(other_phantom):
    table = annotations_of(other_phantom[0])
    assert (len(table), tuple(table.columns)) == (0, ANNOTATION_COLUMNS)


def test_command_line_reports_what_it_made(other_phantom):
    _, status, printed = other_phantom
    assert (status, printed.startswith("1 scans with 0 nodules in ")) == (0, True)


def test_older_phantom_is_kept_without_overwrite(phantom_dir):
    with pytest.raises(FileExistsError, match="already holds data"):
        write_phantoms(phantom_dir, num_scans=1, size_xyz=SMALL)


def test_phantom_that_is_replaced_has_no_tables_until_it_is_done(tmp_path):
    write_phantoms(tmp_path, num_scans=1, size_xyz=SMALL)
    assert all((tmp_path / name).is_file() for name in phantom.TABLES)
    phantom.clear(tmp_path, overwrite=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_scans_of_others_are_never_replaced(tmp_path):
    (tmp_path / "raw" / "subset0").mkdir(parents=True)
    (tmp_path / "raw" / "subset0" / "1.3.6.mhd").touch()
    with pytest.raises(FileExistsError, match="scans that are no phantoms"):
        write_phantoms(tmp_path, num_scans=1, size_xyz=SMALL, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_scans": 0}, "num_scans and num_processes must be at least 1, not 0"),
        ({"num_processes": 0}, "num_scans and num_processes must be at least 1, not 12 and 0"),
        ({"nodule_free": 1.1}, "nodule_free must lie between 0 and 1, not 1.1"),
        ({"nodule_free": -0.1}, "nodule_free must lie between 0 and 1"),
        ({"seed": -1}, "seed and index must be at least 0"),
        ({"size_xyz": (47, 48, 24)}, "size_xyz must be three numbers of at least 48, 48, 24"),
        ({"size_xyz": (48, 48, 23)}, "size_xyz must be three numbers of at least 48, 48, 24"),
        ({"size_xyz": (48, 48)}, "size_xyz must be three numbers"),
        ({"min_diameter_mm": 2.9}, "3 <= min <= max <= 40"),
        ({"max_diameter_mm": 41}, "3 <= min <= max <= 40"),
        ({"min_diameter_mm": 12, "max_diameter_mm": 10}, "3 <= min <= max <= 40"),
    ],
)
def test_impossible_value_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_phantoms(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_negative_index_is_refused():
    with pytest.raises(ValueError, match="seed and index must be at least 0, not 0 and -1"):
        make_phantom(-1)


@pytest.mark.parametrize(("fraction", "free"), [(0, 0), (0.33, 3), (0.5, 5), (1, 10)])
def test_share_of_nodule_free_scans_is_kept(fraction, free):
    assert sum(is_nodule_free(index, fraction) for index in range(10)) == free


def test_command_line_ends_with_status_1_where_data_are_in_the_way(phantom_dir):
    assert main(["--output_dir", str(phantom_dir)]) == 1


def digest(phantom: Phantom) -> str:
    """Hash of the voxels, geometry and tables of a phantom."""
    found = hashlib.sha256()
    for image in (phantom.image, phantom.lungs):
        found.update(sitk.GetArrayViewFromImage(image).tobytes())
        found.update(repr((image.GetOrigin(), image.GetSpacing(), image.GetDirection())).encode())
    table = as_table([(phantom.seriesuid, phantom.nodules + phantom.excluded)])
    found.update(table.to_csv(index=False).encode())
    return found.hexdigest()


# Of the phantoms that the figures of the README were measured on.
DIGESTS = {
    "0, 0, (96, 96, 48)": "80b119c72a959cef7650c1fd32d4f97d4104ffb69833d2c62a9871dd85441322",
    "2, 1, (96, 96, 48)": "6e77f1dc95e01b142bfcb0061a75c5ac4836c3ffcd1391fd1b51c4a50b35767a",
    "4, 8, (64, 64, 40), 0.33, 10": "4a5259fcdeb19d8f0b31a99955e2c7ec2736c6b0c2dd9b5760237b8a855ddef9",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the hashes are of numpy's plain code for x86")
def test_phantoms_are_those_of_old_bit_for_bit():
    """In a process in which numpy uses no vector instructions, whose last bit differs between processors."""
    code = "import sys; from test_phantom import DIGESTS, digest, make_phantom\n"
    code += "for arguments in DIGESTS: print(digest(eval(f'make_phantom({arguments})')))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    plain = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(DIGESTS.values())


def test_each_maker_has_a_look_of_its_own():
    phantoms = [make_phantom(0, 0, SMALL, min_diameter_mm=10, makers=[number]) for number in (0, 1, 0)]
    assert digest(phantoms[0]) == digest(phantoms[2]) != digest(phantoms[1])
    spacings = [phantom.image.GetSpacing()[2] for phantom in phantoms[:2]]
    assert spacings == pytest.approx([Maker.draw(number).slice_mm for number in (0, 1)], rel=0.1)
    nodules = [phantom.nodules[0] for phantom in phantoms[:2]]
    means = [
        float(sitk.GetArrayFromImage(p.image)[p.image.TransformPhysicalPointToIndex(n.center_xyz)[::-1]])
        for p, n in zip(phantoms, nodules, strict=False)
    ]
    assert all(abs(hu) < 250 for hu in means)  # the nodules are where the table says


def test_scans_get_one_of_the_makers_at_random():
    slices = {make_phantom(index, 0, SMALL, 1, 10, makers=(0, 1)).image.GetSize()[2] for index in range(6)}
    assert len(slices) == 2


def test_maker_of_a_negative_number_is_refused(tmp_path, caplog):
    assert main(["--output_dir", str(tmp_path), "--makers", "[0,-1]"]) == 1
    assert "the numbers of makers must be at least 0" in caplog.text
