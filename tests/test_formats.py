"""Scans are read with what ITK would let pass refused: MetaImage, NIfTI, NRRD, and readers from outside."""

from __future__ import annotations

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import write_stack

from utils import Geometry, read_scan, scan_name, scan_reader

FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)

HEADER = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-10 20 -30",
    "ElementSpacing": "0.5 0.75 2.5",
    "DimSize": "4 3 2",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "scan.raw",
}


def write_header(folder: Path, array: np.ndarray | None = None, **changes: str | None) -> Path:
    """scan.mhd and scan.raw of 4 x 3 x 2 voxels (x, y, z); a field that is changed to None is left out."""
    folder.mkdir(exist_ok=True)
    values = np.arange(24, dtype=np.int16) if array is None else array
    (folder / "scan.raw").write_bytes(values.tobytes())
    lines = [f"{name} = {value}" for name, value in (HEADER | changes).items() if value is not None]
    (folder / "scan.mhd").write_text("\n".join(lines) + "\n")
    return folder / "scan.mhd"


def flipped_scan() -> sitk.Image:
    """An anisotropic, flipped scan of 10 x 8 x 6 voxels (x, y, z)."""
    values = np.random.default_rng(0).integers(-1000, 400, (6, 8, 10)).astype(np.int16)
    return Geometry(values.shape, (10.0, -20.0, 30.0), (0.5, 0.75, 2.5), FLIPPED).image(values)


def saved(path: Path, compress: bool = False, image: sitk.Image | None = None) -> Path:
    sitk.WriteImage(flipped_scan() if image is None else image, str(path), useCompression=compress)
    return path


GOOD_FILES = [
    ("scan.mhd", False),
    ("scan.mhd", True),
    ("scan.mha", False),
    ("scan.mha", True),
    ("scan.nii", False),
    ("scan.nii.gz", True),
    ("scan.nrrd", False),
    ("scan.nrrd", True),
]


@pytest.mark.parametrize(("name", "compress"), GOOD_FILES)
def test_every_format_gives_the_same_voxels(tmp_path, name, compress):
    image = read_scan(saved(tmp_path / name, compress))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(flipped_scan()))


@pytest.mark.parametrize(("name", "compress"), GOOD_FILES)
def test_every_format_gives_the_same_positions(tmp_path, name, compress):
    image = read_scan(saved(tmp_path / name, compress))
    for index in ((0, 0, 0), (9, 7, 5)):
        expected = flipped_scan().TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), expected, rtol=0, atol=1e-4)


def test_compressed_mhd_lies_in_a_zraw_file(tmp_path):
    saved(tmp_path / "scan.mhd", compress=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.mhd", "scan.zraw"]


def test_hand_written_header_is_read(tmp_path):
    image = read_scan(write_header(tmp_path))
    assert (image.GetSize(), image.GetOrigin(), image.GetSpacing()) == ((4, 3, 2), (-10, 20, -30), (0.5, 0.75, 2.5))


def test_absent_scan_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_scan(tmp_path / "scan.mhd")


def test_unsupported_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be one of \.mhd.* not 'scan\.png'"):
        read_scan(tmp_path / "scan.png")


def test_file_that_is_no_header_is_refused(tmp_path):
    (tmp_path / "scan.mhd").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="no MetaImage header"):
        read_scan(tmp_path / "scan.mhd")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd"])
def test_text_file_with_an_image_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_text("this is no image\n")
    with pytest.raises(ValueError, match="no readable header"):
        read_scan(tmp_path / name)


@pytest.mark.parametrize("field", ["Offset", "ElementSpacing"])
def test_missing_field_is_refused(tmp_path, field):
    with pytest.raises(ValueError, match=f"has no {field}"):
        read_scan(write_header(tmp_path, **{field: None}))


@pytest.mark.parametrize("field", ["Offset", "ElementSpacing", "TransformMatrix"])
def test_field_with_nan_is_refused(tmp_path, field):
    values = HEADER[field].split()
    with pytest.raises(ValueError, match=f"{field} must be 3 finite|direction must be a rotation"):
        read_scan(write_header(tmp_path, **{field: " ".join(["nan", *values[1:]])}))


def test_field_with_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Offset must be 3 finite numbers, not 'left top front'"):
        read_scan(write_header(tmp_path, Offset="left top front"))


@pytest.mark.parametrize("offset", ["", "-10 20"])
def test_offset_of_fewer_than_three_numbers_is_refused(tmp_path, offset):
    with pytest.raises(ValueError, match="Offset"):
        read_scan(write_header(tmp_path, Offset=offset))


@pytest.mark.parametrize("spacing", ["0 0.75 2.5", "-0.5 0.75 2.5"])
def test_spacing_that_is_not_positive_is_refused(tmp_path, spacing):
    with pytest.raises(ValueError, match="spacing must be positive"):
        read_scan(write_header(tmp_path, ElementSpacing=spacing))


def test_absolute_data_file_is_refused(tmp_path):
    path = write_header(tmp_path, ElementDataFile=str(tmp_path / "scan.raw"))
    with pytest.raises(ValueError, match="ElementDataFile must be one file beside the header"):
        read_scan(path)


def test_data_file_in_a_parent_folder_is_refused(tmp_path):
    write_header(tmp_path)
    with pytest.raises(ValueError, match="ElementDataFile must be one file beside the header"):
        read_scan(write_header(tmp_path / "below", ElementDataFile="../scan.raw"))


def test_list_of_data_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ElementDataFile must be one file"):
        read_scan(write_header(tmp_path, ElementDataFile="slice%02d.raw 0 1 1"))


def test_mha_that_names_another_file_is_refused(tmp_path):
    path = write_header(tmp_path, ElementDataFile=str(tmp_path / "scan.raw")).rename(tmp_path / "scan.mha")
    with pytest.raises(ValueError, match="ElementDataFile"):
        read_scan(path)


def test_missing_data_file_is_named(tmp_path):
    path = write_header(tmp_path)
    (tmp_path / "scan.raw").unlink()
    with pytest.raises(FileNotFoundError, match=r"scan\.raw, which does not exist"):
        read_scan(path)


@pytest.mark.parametrize("voxels", [20, 30])
def test_raw_file_of_another_size_than_dimsize_is_refused(tmp_path, voxels):
    with pytest.raises(ValueError, match=f"needs 48 bytes of voxels but scan.raw holds {2 * voxels}"):
        read_scan(write_header(tmp_path, np.arange(voxels, dtype=np.int16)))


def test_dimsize_of_16_terabytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="claims 16,000,000,000,000 bytes"):
        read_scan(write_header(tmp_path, DimSize="20000 20000 20000"))


def test_unknown_element_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold real numbers|no readable header"):
        read_scan(write_header(tmp_path, ElementType="MET_STRING"))


def test_zraw_with_a_flipped_byte_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mhd", compress=True)
    data = bytearray((tmp_path / "scan.zraw").read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / "scan.zraw").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_scan(path)


def test_zraw_with_fewer_voxels_than_dimsize_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mhd", compress=True)
    path.write_text(path.read_text().replace("DimSize = 10 8 6", "DimSize = 10 8 7"))
    with pytest.raises(ValueError, match=r"scan\.zraw (holds 960|is cut off)"):
        read_scan(path)


def test_zraw_with_more_voxels_than_dimsize_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mhd", compress=True)
    path.write_text(path.read_text().replace("DimSize = 10 8 6", "DimSize = 10 8 5"))
    with pytest.raises(ValueError, match=r"scan\.zraw (holds 960|is cut off)"):
        read_scan(path)


def test_zraw_that_is_cut_off_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mhd", compress=True)
    (tmp_path / "scan.zraw").write_bytes((tmp_path / "scan.zraw").read_bytes()[:-20])
    with pytest.raises(ValueError, match="download it again"):
        read_scan(path)


def test_zraw_that_claims_16_terabytes_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mhd", compress=True)
    path.write_text(path.read_text().replace("DimSize = 10 8 6", "DimSize = 20000 20000 20000"))
    with pytest.raises(ValueError, match="claims 16,000,000,000,000 bytes"):
        read_scan(path)


def test_mha_with_a_flipped_byte_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mha", compress=True)
    data = bytearray(path.read_bytes())
    data[-200] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"scan\.mha"):
        read_scan(path)


@pytest.mark.parametrize("name", ["scan.mha", "scan.nii", "scan.nii.gz", "scan.nrrd"])
def test_file_that_is_cut_off_is_refused(tmp_path, name):
    path = saved(tmp_path / name, compress=name.endswith("gz"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="again"):
        read_scan(path)


@pytest.mark.parametrize("matrix", ["1 0.3 0 0 1 0 0 0 1", "2 0 0 0 1 0 0 0 1", "0 0 0 0 0 0 0 0 0"])
def test_direction_that_is_no_rotation_is_refused(tmp_path, matrix):
    with pytest.raises(ValueError, match="direction must be a rotation or flip"):
        read_scan(write_header(tmp_path, TransformMatrix=matrix))


def test_two_dimensional_image_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(np.arange(12, dtype=np.int16).reshape(3, 4)))
    with pytest.raises(ValueError, match="must be a 3-D scan"):
        read_scan(path)


def test_single_slice_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(np.arange(12, dtype=np.int16).reshape(1, 3, 4)))
    with pytest.raises(ValueError, match="must be a 3-D scan"):
        read_scan(path)


def test_four_dimensional_image_is_refused(tmp_path):
    values = np.arange(16, dtype=np.int16).reshape(2, 2, 2, 2)
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(values, isVector=False))
    with pytest.raises(ValueError, match="must be a 3-D scan"):
        read_scan(path)


def test_image_of_several_channels_is_refused(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 2, 2, 3)
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(values, isVector=True))
    with pytest.raises(ValueError, match=r"one value a voxel, not size \(2, 2, 2\) with 3 component"):
        read_scan(path)


def test_complex_numbers_are_refused(tmp_path):
    values = np.arange(8, dtype=np.complex64).reshape(2, 2, 2)
    path = saved(tmp_path / "scan.nrrd", image=sitk.Cast(sitk.GetImageFromArray(values), sitk.sitkComplexFloat32))
    with pytest.raises(ValueError, match=r"must (hold real numbers|be a 3-D scan with one value a voxel)"):
        read_scan(path)


@pytest.mark.parametrize("bad", [1, 8])
def test_voxels_that_are_nan_are_refused_and_counted(tmp_path, bad):
    values = np.arange(8, dtype=np.float32)
    values[:bad] = np.nan
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(values.reshape(2, 2, 2)))
    with pytest.raises(ValueError, match=f"{bad} voxels that are not finite"):
        read_scan(path)


def test_constant_image_is_refused(tmp_path):
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(np.full((2, 2, 2), 7, np.int16)))
    with pytest.raises(ValueError, match="holds one value, 7, everywhere"):
        read_scan(path)


@pytest.mark.parametrize("field", ["data file", "datafile"])
def test_nrrd_with_its_voxels_elsewhere_is_refused(tmp_path, field):
    path = saved(tmp_path / "scan.nrrd")
    header = path.read_bytes().split(b"\n\n")[0]
    path.write_bytes(header + f"\n{field}: scan.raw\n\n".encode())
    with pytest.raises(ValueError, match="in another file"):
        read_scan(path)


def test_nrrd_that_claims_16_terabytes_is_refused(tmp_path):
    path = saved(tmp_path / "scan.nrrd", compress=True)
    path.write_bytes(path.read_bytes().replace(b"sizes: 10 8 6", b"sizes: 20000 20000 20000"))
    with pytest.raises(ValueError, match="claims 16,000,000,000,000 bytes"):
        read_scan(path)


@pytest.mark.parametrize("name", ["1.2.3.mhd", "1.2.3.MHA", "1.2.3.nii", "1.2.3.nii.gz", "1.2.3.nrrd"])
def test_scan_name_keeps_the_dots_of_the_uid(name):
    assert scan_name(Path("folder") / name) == "1.2.3"


@pytest.mark.usefixtures("stack_reader")
def test_reader_from_outside_reads_a_folder(tmp_path):
    image = read_scan(write_stack(tmp_path / "1.2.3-stack", flipped_scan()))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(flipped_scan()))
    assert Geometry.from_image(image) == Geometry.from_image(flipped_scan())


@pytest.mark.usefixtures("stack_reader")
def test_reader_from_outside_names_its_scans(tmp_path):
    assert scan_name(tmp_path / "1.2.3-stack") == "1.2.3"


@pytest.mark.usefixtures("stack_reader")
def test_scan_of_a_reader_from_outside_is_checked_like_any_other(tmp_path):
    with pytest.raises(ValueError, match="spacing must be positive"):
        read_scan(write_stack(tmp_path / "a-stack", flipped_scan(), spacing=[0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="holds one value, 7, everywhere"):
        read_scan(write_stack(tmp_path / "b-stack", sitk.GetImageFromArray(np.full((2, 2, 2), 7, np.int16))))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_scan(tmp_path / "c-stack")


def test_folder_that_no_reader_takes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no scan in .*1\.2-stack: no \.mhd"):
        read_scan(write_stack(tmp_path / "1.2-stack", flipped_scan()))


def test_folder_with_the_name_of_a_scan_is_refused(tmp_path):
    (tmp_path / "scan.mhd").mkdir()
    with pytest.raises(FileNotFoundError, match="no scan in"):
        read_scan(tmp_path / "scan.mhd")


@pytest.mark.parametrize(("name", "compress"), GOOD_FILES)
def test_header_tells_geometry_and_bytes_of_the_voxels(tmp_path, name, compress):
    path = saved(tmp_path / name, compress)
    header = scan_reader(path).header(path)
    assert header.num_bytes == 2 * 10 * 8 * 6
    assert header.geometry == Geometry.from_image(sitk.ReadImage(str(path)))


@pytest.mark.parametrize(
    ("name", "compress", "files"),
    [
        ("scan.mhd", False, ["scan.mhd", "scan.raw"]),
        ("scan.mhd", True, ["scan.mhd", "scan.zraw"]),
        ("scan.mha", False, ["scan.mha"]),
        ("scan.nii.gz", True, ["scan.nii.gz"]),
        ("scan.nrrd", False, ["scan.nrrd"]),
    ],
)
def test_reader_knows_the_files_of_a_scan(tmp_path, name, compress, files):
    path = saved(tmp_path / name, compress)
    assert scan_reader(path).files(path) == tuple(tmp_path / file for file in files)


def fingerprint_of(path: Path) -> tuple[str, list[tuple[int, int]]]:
    return scan_reader(path).fingerprint(path)


@pytest.mark.parametrize(("name", "compress"), GOOD_FILES)
def test_fingerprint_is_that_of_the_same_scan_only(tmp_path, name, compress):
    paths = [tmp_path / folder / name for folder in ("a", "b", "c")]
    for path in paths:
        path.parent.mkdir()
    same = [saved(path, compress) for path in paths[:2]]
    other = saved(paths[2], compress, flipped_scan()[1:])
    for path in tmp_path.rglob("scan.*"):
        os.utime(path, (0, 0))
    assert fingerprint_of(same[0]) == fingerprint_of(same[1]) != fingerprint_of(other)
    os.utime(scan_reader(same[0]).files(same[0])[-1], (0, 1))
    assert fingerprint_of(same[0]) != fingerprint_of(same[1])


def test_fingerprint_of_a_large_file_is_short(tmp_path):
    path = saved(tmp_path / "scan.mha", image=sitk.GetImageFromArray(np.zeros((64, 64, 64), np.int16)))
    text, sizes = scan_reader(path).fingerprint(path)
    assert len(text) < 100_000 < sizes[0][0] == path.stat().st_size


def test_fingerprint_changes_with_the_size_of_the_voxel_file(tmp_path):
    path = write_header(tmp_path)
    before = fingerprint_of(path)
    (tmp_path / "scan.raw").write_bytes(b"")
    assert fingerprint_of(path) != before


def flipped_values() -> np.ndarray:
    return sitk.GetArrayFromImage(flipped_scan())


@pytest.mark.parametrize("name", ["SCAN.MHD", "SCAN.MHA", "SCAN.NII", "SCAN.NII.GZ", "SCAN.NRRD"])
def test_suffix_in_capitals_is_read(tmp_path, name):
    saved(tmp_path / name.lower()).rename(tmp_path / name)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(tmp_path / name)), flipped_values())


@pytest.mark.parametrize("name", ["scan one", "größe", "肺", "a$1^$b", "[x], #;"])
@pytest.mark.parametrize("suffix", [".mhd", ".nii.gz"])
def test_any_character_in_a_name_is_read(tmp_path, name, suffix):
    path = saved(tmp_path / f"{name}{suffix}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(path)), flipped_values())
    assert scan_name(path) == name


def test_header_in_latin_1_names_its_data_file(tmp_path):
    path = write_header(tmp_path, ElementDataFile="gr\xf6\xdfe.raw")
    path.write_bytes(path.read_text().encode("latin-1"))
    with pytest.raises(FileNotFoundError, match=r"größe\.raw, which does not exist"):
        read_scan(path)


@pytest.mark.parametrize("suffix", [".mhd", ".mha"])
def test_voxels_behind_the_header_are_read(tmp_path, suffix):
    path = write_header(tmp_path, ElementDataFile="LOCAL")
    path.write_bytes(path.read_bytes() + (tmp_path / "scan.raw").read_bytes())
    (tmp_path / "scan.raw").unlink()
    image = read_scan(path.rename(tmp_path / f"other{suffix}"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).ravel(), np.arange(24))


@pytest.mark.parametrize("size", ["100", "-1"])
def test_bytes_before_the_voxels_are_skipped(tmp_path, size):
    fields = {"HeaderSize": size, "ElementDataFile": None}
    path = write_header(tmp_path, **fields)
    path.write_text(path.read_text() + "ElementDataFile = scan.raw\n")
    (tmp_path / "scan.raw").write_bytes(b"x" * 100 + (tmp_path / "scan.raw").read_bytes())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(path)).ravel(), np.arange(24))


@pytest.mark.parametrize("size", ["99", "ten", "-2"])
def test_wrong_number_of_bytes_before_the_voxels_is_refused(tmp_path, size):
    path = write_header(tmp_path, HeaderSize=size, ElementDataFile=None)
    path.write_text(path.read_text() + "ElementDataFile = scan.raw\n")
    with pytest.raises(ValueError, match=r"HeaderSize must be|needs 48 bytes of voxels but scan\.raw holds"):
        read_scan(path)


def test_bytes_behind_the_voxels_are_told(tmp_path):
    path = write_header(tmp_path, np.arange(30, dtype=np.int16))
    with pytest.raises(ValueError, match="is the header another scan's"):
        read_scan(path)


# Places in a NIfTI-1 header.
SLOPE, QFORM_CODE, SFORM_CODE, PIXDIM_Z, SFORM = 112, 252, 254, 88, 280


def nifti(folder: Path, *changes: tuple[int, str, tuple[float, ...]], name: str = "scan.nii") -> Path:
    """The flipped scan as NIfTI with some bytes of its header set: place, format, values."""
    path = saved(folder / name)
    data = bytearray(path.read_bytes())
    for place, form, values in changes:
        struct.pack_into(form, data, place, *values)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (1.0, -1024.0, lambda stored: stored - 1024.0),  # as dcm2niix stores a DICOM series
        (2.5, 0.0, lambda stored: stored * 2.5),
        (0.0, -1024.0, lambda stored: stored),  # a slope of 0 means no scaling
        (math.nan, 0.0, lambda stored: stored),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_stored_values_are_scaled_as_the_standard_says(tmp_path, slope, intercept, expected, compress):
    path = nifti(tmp_path, (SLOPE, "<2f", (slope, intercept)))
    if compress:
        (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "scan.nii.gz"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(path)), expected(flipped_values().astype(float)))
    assert scan_reader(path).header(path).num_bytes == 2 * 10 * 8 * 6


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_scaled_values_of_any_type_are_read(tmp_path, kind):
    stored = (np.arange(48) % 40).astype(kind).reshape(2, 4, 6)
    path = saved(tmp_path / "scan.nii", image=sitk.GetImageFromArray(stored))
    data = bytearray(path.read_bytes())
    struct.pack_into("<2f", data, SLOPE, 2.0, -1024.0)
    path.write_bytes(data)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(path)), stored * 2.0 - 1024.0)


def test_gzip_of_several_members_is_read(tmp_path):
    data = saved(tmp_path / "scan.nii").read_bytes()
    members = [gzip.compress(data[start : start + 300]) for start in range(0, len(data), 300)]
    (tmp_path / "scan.nii.gz").write_bytes(b"".join(members))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(tmp_path / "scan.nii.gz")), flipped_values())


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damaged_member_of_a_gzip_is_refused(tmp_path, damage):
    data = saved(tmp_path / "scan.nii").read_bytes()
    members = [gzip.compress(data[start : start + 300]) for start in range(0, len(data), 300)]
    if damage == "flip":
        members[1] = members[1][:40] + bytes([members[1][40] ^ 0x10]) + members[1][41:]
    elif damage == "cut":
        members[-1] = members[-1][:-30]
    else:
        members.pop()
    (tmp_path / "scan.nii.gz").write_bytes(b"".join(members))
    with pytest.raises(ValueError, match="download it again"):
        read_scan(tmp_path / "scan.nii.gz")


def test_plain_file_that_is_named_as_compressed_is_read(tmp_path):
    path = saved(tmp_path / "scan.nii").rename(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(path)), flipped_values())


def test_compressed_file_that_is_named_as_plain_is_told(tmp_path):
    path = saved(tmp_path / "scan.nii.gz").rename(tmp_path / "scan.nii")
    with pytest.raises(ValueError, match=r"is compressed; name it \.nii\.gz"):
        read_scan(path)


def test_nifti_that_states_no_position_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not say where its voxels lie"):
        read_scan(nifti(tmp_path, (QFORM_CODE, "<2h", (0, 0))))


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 2), (1, 1)])
def test_one_stated_position_is_enough(tmp_path, codes):
    image = read_scan(nifti(tmp_path, (QFORM_CODE, "<2h", codes)))
    expected = flipped_scan()
    np.testing.assert_allclose(image.GetOrigin(), expected.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(image.GetDirection(), expected.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1)])
def test_two_positions_that_disagree_are_refused(tmp_path, codes):
    with pytest.raises(ValueError, match=r"qform and sform put the same voxel 30\.0 units apart"):
        x = struct.unpack_from("<f", saved(tmp_path / "scan.nii").read_bytes(), SFORM + 12)[0]
        read_scan(nifti(tmp_path, (QFORM_CODE, "<2h", codes), (SFORM + 12, "<f", (x + 30,))))


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan])
def test_nifti_without_a_voxel_size_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="pixdim must be three positive voxel sizes"):
        read_scan(nifti(tmp_path, (PIXDIM_Z, "<f", (size,))))


def test_voxel_size_that_the_sform_contradicts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"its sform has voxels of .* its pixdim"):
        read_scan(nifti(tmp_path, (QFORM_CODE, "<h", (0,)), (PIXDIM_Z, "<f", (5.0,))))


def test_sheared_sform_names_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="not at right angles; resample it"):
        read_scan(nifti(tmp_path, (QFORM_CODE, "<h", (0,)), (SFORM + 4, "<f", (0.02,))))


def bare_nrrd(path: Path, without: str) -> Path:
    """The flipped scan with a field of its header left out."""
    header, voxels = saved(path).read_bytes().split(b"\n\n", 1)
    lines = [line for line in header.split(b"\n") if not line.startswith(f"{without}:".encode())]
    path.write_bytes(b"\n".join(lines) + b"\n\n" + voxels)
    return path


@pytest.mark.parametrize("field", ["space", "space directions", "space origin"])
def test_nrrd_that_states_no_position_is_refused(tmp_path, field):
    with pytest.raises(ValueError, match=f"has no {field}: positions in mm would be a guess"):
        read_scan(bare_nrrd(tmp_path / "scan.nrrd", field))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_damage_in_a_compressed_nrrd_is_noticed(tmp_path, share):
    path = saved(tmp_path / "scan.nrrd", compress=True)
    data = bytearray(path.read_bytes())
    start = data.index(b"\n\n") + 2
    data[start + 10 + int((len(data) - start - 14) * share)] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"scan\.nrrd"):
        read_scan(path)


def changed_nrrd(path: Path, old: bytes, new: bytes) -> Path:
    """The flipped scan with other bytes in its header."""
    header, voxels = saved(path).read_bytes().split(b"\n\n", 1)
    assert old in header
    path.write_bytes(header.replace(old, new) + b"\n\n" + voxels)
    return path


def test_nrrd_whose_axes_point_nowhere_is_refused(tmp_path):
    path = changed_nrrd(tmp_path / "scan.nrrd", b"space: left-posterior-superior", b"space: scanner-xyz")
    with pytest.raises(ValueError, match="does not say where left and right are"):
        read_scan(path)


@pytest.mark.parametrize(("unit", "is_taken"), [(b"mm", True), (b"cm", False)])
def test_nrrd_measures_in_mm(tmp_path, unit, is_taken):
    units = b'space units: "%b" "%b" "%b"\nspace origin:' % (unit, unit, unit)
    path = changed_nrrd(tmp_path / "scan.nrrd", b"space origin:", units)
    if is_taken:
        read_scan(path)
    else:
        with pytest.raises(ValueError, match="measures in cm, not mm"):
            read_scan(path)
