"""Nodule masks: which belong to which scan, and which nodules they show."""

import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import image_of
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data.masks import find_nodule_masks, read_marks, read_mask
from preprocess import LUNA16Preprocessor
from utils import InputError, UserError, read_metadata, read_processed

CT_UID = "1.2.826.0.1.3680043.8.498.1"
BINARY_SEG = "1.2.840.10008.5.1.4.1.1.66.4"
ORGAN, LESION = ("123037004", "Anatomical Structure"), ("49755003", "Morphologically Altered Structure")


def blocks(shape=(20, 24, 28), dtype=np.uint8, **labels) -> np.ndarray:
    """An array with cubes: ``_3=(z, y, x, edge)`` sets 3 there."""
    array = np.zeros(shape, dtype)
    for name, places in labels.items():
        for z, y, x, edge in [places] if isinstance(places[0], int) else places:
            array[z : z + edge, y : y + edge, x : x + edge] = int(name[1:])
    return array


def write(path: Path, array: np.ndarray, **geometry) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image_of(array, **geometry), str(path), useCompression=True)
    return path


def found_in(paths, labels=None) -> list[tuple[list[float], int]]:
    """Centre and voxels of each nodule."""
    return sorted((np.round(n.center_xyz, 3).tolist(), int(n.inside.sum())) for n in read_marks(paths, labels).nodules)


# ------------------------------------------------------------------------------------------------- one reader's mask


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_each_label_is_a_nodule_also_in_two_pieces(tmp_path, suffix):
    array = blocks(_1=(2, 2, 2, 4), _7=[(10, 10, 10, 3), (10, 10, 16, 3)])
    path = write(tmp_path / f"a{suffix}", array, spacing=(0.5, 1.0, 2.0), origin=(-10.0, 5.0, 3.0))
    assert found_in([path]) == [([-8.25, 8.5, 10.0], 64), ([-3.0, 16.0, 25.0], 54)]


def test_of_one_label_each_connected_region_is_a_nodule(tmp_path):
    array = blocks(_255=[(2, 2, 2, 4), (6, 6, 6, 2), (14, 14, 14, 3)])  # the second touches the first at a corner
    nodules = read_marks([write(tmp_path / "a.nii.gz", array)]).nodules
    assert sorted(int(nodule.inside.sum()) for nodule in nodules) == [27, 72]


def test_diameter_is_that_of_the_sphere_of_equal_volume(tmp_path):
    (nodule,) = read_marks([write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4)), spacing=(0.5, 1.0, 2.0))]).nodules
    assert np.isclose(nodule.diameter_mm**3 * np.pi / 6, 64)


def test_slip_of_the_brush_is_no_nodule_but_in_doubt(tmp_path):
    marks = read_marks([write(tmp_path / "a.mha", blocks(_1=[(2, 2, 2, 4), (15, 15, 15, 1)]))])
    assert len(marks.nodules) == 1
    assert marks.excluded == [(15.0, 15.0, 15.0, 2.0)]


def test_empty_mask_shows_nothing(tmp_path):
    assert read_marks([write(tmp_path / "a.mha", blocks())]).nodules == []


def test_chosen_labels_alone_are_nodules(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4), _2=(10, 10, 10, 5)))
    assert found_in([path], ["2"]) == [([12.0, 12.0, 12.0], 125)]
    assert found_in([path], ["9"]) == []


def test_whole_numbers_kept_as_floats_are_labels(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_3=(2, 2, 2, 4), dtype=np.float32))
    assert found_in([path]) == [([3.5, 3.5, 3.5], 64)]


@pytest.mark.parametrize("values", [np.linspace(-0.5, 1, 13440), np.arange(-1, 13439), np.arange(13440)])
def test_what_is_no_mask_is_refused(tmp_path, values):
    path = write(tmp_path / "a.mha", values.reshape(20, 24, 28).astype(np.float32))
    with pytest.raises(InputError, match=r"is no mask of labels.*labels are whole numbers from 1 on"):
        read_mask(path)


def test_label_that_is_too_large_for_a_nodule_is_refused(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4), _2=(4, 4, 4, 15)), spacing=(9.0, 9.0, 9.0))
    with pytest.raises(InputError, match=r"label 2 marks 2.5 litres, which is no nodule; name .* by nodule_labels"):
        read_marks([path])
    assert len(read_marks([path], ["1"]).nodules) == 1


# -------------------------------------------------------------------------------------------------- several readers


def test_a_voxel_is_nodule_where_more_than_half_of_the_readers_marked_it(tmp_path):
    arrays = [blocks(_1=(4, 4, 4, 6)), blocks(_9=(4, 4, 6, 6)), blocks(_1=[(4, 4, 8, 6), (14, 14, 20, 3)])]
    paths = [write(tmp_path / f"{n}.mha", array) for n, array in enumerate(arrays)]
    marks = read_marks(paths)
    (nodule,) = marks.nodules
    assert (nodule.center_xyz, int(nodule.inside.sum())) == ((8.5, 6.5, 6.5), 6 * 6 * 6)  # x from 6 to 11
    assert [(mark[:3], round(mark[3], 2)) for mark in marks.excluded] == [((21.0, 15.0, 15.0), 3.72)]  # one of three


def test_half_of_the_readers_are_not_enough(tmp_path):
    paths = [write(tmp_path / "1.mha", blocks(_1=(4, 4, 4, 6))), write(tmp_path / "2.mha", blocks())]
    marks = read_marks(paths)
    assert (marks.nodules, len(marks.doubtful)) == ([], 1)


def test_readers_may_use_other_grids(tmp_path):
    one = write(tmp_path / "1.mha", blocks(_1=(4, 4, 4, 8)))
    half = blocks(_1=(2, 2, 2, 4), shape=(10, 12, 14))  # the same cube on voxels of 2 mm
    two = write(tmp_path / "2.nii.gz", half, spacing=(2.0, 2.0, 2.0), origin=(0.5, 0.5, 0.5))
    turned = blocks(_1=(4, 4, 4, 8))[:, ::-1, ::-1]
    direction = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
    three = write(tmp_path / "3.mha", turned, origin=(27.0, 23.0, 0.0), direction=direction)
    away = write(tmp_path / "4.mha", blocks(_1=(4, 4, 4, 8)), origin=(500.0, 0.0, 0.0))
    assert found_in([one, two, three]) == [([7.5, 7.5, 7.5], 512)]
    assert found_in([one, two, three, away]) == [([7.5, 7.5, 7.5], 512)]
    assert found_in([one, two, away, away]) == []


# ----------------------------------------------------------------------------------------------------- 3D Slicer's


def test_layers_of_slicer_may_overlap(tmp_path):
    layers = np.stack([blocks(_1=(2, 2, 2, 6), _2=(12, 12, 12, 4)), blocks(_1=(4, 4, 4, 6))], axis=-1)
    image = sitk.GetImageFromArray(layers, isVector=True)
    for number, (label, layer, name) in enumerate([(1, 0, "GTV-1"), (2, 0, "Vessel"), (1, 1, "gtv 2")]):
        image.SetMetaData(f"Segment{number}_LabelValue", str(label))
        image.SetMetaData(f"Segment{number}_Layer", str(layer))
        image.SetMetaData(f"Segment{number}_Name", name)
    path = tmp_path / "a.seg.nrrd"
    sitk.WriteImage(image, str(path))
    assert found_in([path]) == [([4.5] * 3, 216), ([6.5] * 3, 216), ([13.5] * 3, 64)]
    assert found_in([path], ["GTV*"]) == [([4.5] * 3, 216), ([6.5] * 3, 216)]
    assert found_in([path], ["vessel"]) == [([13.5] * 3, 64)]


def test_segmentation_of_slicer_without_names_is_a_map_of_labels(tmp_path):
    path = write(tmp_path / "a.seg.nrrd", blocks(_1=(2, 2, 2, 4), _2=(10, 10, 10, 5)))
    assert len(read_marks([path]).nodules) == 2


def test_segmentation_of_slicer_that_cannot_be_read_is_refused(tmp_path):
    path = write(tmp_path / "a.seg.nrrd", blocks(_1=(2, 2, 2, 4)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read; save it again"):
        read_mask(path)


# ------------------------------------------------------------------------------------------------------------ DICOM


def sequence(**values) -> Sequence:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


def write_seg(path: Path, *segments: tuple[str, tuple[str, str], np.ndarray], kind="BINARY", series=CT_UID) -> Path:
    """A segmentation whose frames without a mark are left out, from the head down; slices of 2.5 mm."""
    data = Dataset()
    data.SOPClassUID = BINARY_SEG if kind != "LABELMAP" else f"{BINARY_SEG[:-1]}7"
    data.SOPInstanceUID = generate_uid()
    data.Modality, data.SegmentationType, data.MaximumFractionalValue = "SEG", kind, 200
    if series:
        data.ReferencedSeriesSequence = sequence(SeriesInstanceUID=series)
    described, frames, groups = [], [], []
    for number, (label, (code, meaning), array) in enumerate(segments, start=1):
        category = sequence(CodeValue=code, CodingSchemeDesignator="SCT", CodeMeaning=meaning)
        described += sequence(SegmentNumber=number, SegmentLabel=label, SegmentedPropertyCategoryCodeSequence=category)
        for z in reversed(range(len(array))):
            if not array[z].any():
                continue
            group = Dataset()
            group.PlanePositionSequence = sequence(ImagePositionPatient=[-30.0, 40.0, 2.5 * z])
            group.SegmentIdentificationSequence = sequence(ReferencedSegmentNumber=number)
            frames.append(array[z] * {"BINARY": 1, "FRACTIONAL": 150, "LABELMAP": number}[kind])
            groups.append(group)
    data.SegmentSequence, data.PerFrameFunctionalGroupsSequence = Sequence(described), Sequence(groups)
    shared = Dataset()
    shared.PlaneOrientationSequence = sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = sequence(PixelSpacing=[1.0, 0.5], SliceThickness=2.5)
    data.SharedFunctionalGroupsSequence = Sequence([shared])
    pixels = np.array(frames, np.uint8)
    data.NumberOfFrames, data.Rows, data.Columns = pixels.shape
    bits = 1 if kind == "BINARY" else 8
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.SamplesPerPixel, data.PixelRepresentation = bits - 1, 1, 0
    data.PhotometricInterpretation = "MONOCHROME2"
    packed = np.packbits(pixels.ravel(), bitorder="little") if bits == 1 else pixels
    data.PixelData = packed.tobytes() + b"\0" * (packed.size % 2)
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.TransferSyntaxUID = data.SOPClassUID, ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_dicom_segmentation_is_read(tmp_path, kind):
    nodule, other = blocks(_1=(5, 4, 6, 6)), blocks(_1=(14, 14, 14, 4))
    path = write_seg(tmp_path / "seg", ("a", LESION, nodule), ("b", LESION, other), kind=kind)
    # Columns of 0.5 mm, rows of 1 mm, slices of 2.5 mm.
    assert found_in([path]) == [([-25.75, 46.5, 18.75], 216), ([-22.25, 55.5, 38.75], 64)]


def test_organs_beside_a_lesion_are_no_nodules_unless_named(tmp_path):
    nodule, heart = blocks(_1=(5, 4, 6, 6)), blocks(_1=(14, 14, 14, 4))
    path = write_seg(tmp_path / "seg.dcm", ("Heart", ORGAN, heart), ("GTV-1", LESION, nodule))
    assert [voxels for _, voxels in found_in([path])] == [216]
    assert [voxels for _, voxels in found_in([path], ["heart"])] == [64]
    alone = write_seg(tmp_path / "alone.dcm", ("Nodule", ORGAN, heart))  # as 3D Slicer calls everything
    assert [voxels for _, voxels in found_in([alone])] == [64]


def test_slices_left_out_between_marked_ones_do_not_change_the_spacing(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=[(0, 4, 4, 1), (10, 4, 4, 1)])))
    assert read_mask(path).geometry.spacing == (0.5, 1.0, 2.5)
    assert read_mask(path).geometry.shape_zyx == (11, 24, 28)
    data = pydicom.dcmread(path)
    measures = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.SliceThickness, measures.SpacingBetweenSlices = 1.0, 2.5
    data.save_as(path)
    assert read_mask(path).geometry.spacing == (0.5, 1.0, 2.5)


def test_slices_thinner_than_their_distance_keep_it(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))))
    data = pydicom.dcmread(path)
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = 1.25
    data.save_as(path)
    assert read_mask(path).geometry.spacing == (0.5, 1.0, 2.5)


def test_frames_that_are_not_evenly_spaced_are_refused(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))))
    data = pydicom.dcmread(path)
    data.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0].ImagePositionPatient[2] += 1.2
    data.save_as(path)
    with pytest.raises(InputError, match="its frames are not evenly spaced"):
        read_mask(path)


def test_damaged_dicom_segmentation_is_refused(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))))
    data = pydicom.dcmread(path)
    data.PixelData = data.PixelData[:100]
    data.save_as(path)
    with pytest.raises(InputError, match="its frames cannot be read"):
        read_mask(path)


def test_dicom_segmentation_needs_pydicom(tmp_path, monkeypatch):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match="pip install 'pydicom"):
        read_mask(path)


REAL = Path(__file__).parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real segmentations are not part of the project")


@needs_real
def test_real_dicom_segmentations_agree_with_the_majority_of_nine():
    paths = sorted((REAL / "dicom" / "seg").glob("*.dcm"))
    (nodule,) = read_marks(paths).nodules
    np.testing.assert_allclose(nodule.center_xyz, (84.13, -107.67, 317.48), atol=0.05)
    assert abs(nodule.diameter_mm - 36.5) < 0.1


# ----------------------------------------------------------------------------------------------- which belong where

SCANS = {name: Path(f"{name}.mhd") for name in ("lung_1", "lung_10", "1.2.3", "1.2.3.4", "case_0000")}


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("lung_1.nii.gz", "lung_1"),
        ("lung_10.mha", "lung_10"),
        ("lung_1_reader2.mha", "lung_1"),
        ("reader2/lung_10.mha", "lung_10"),
        ("1.2.3.nii.gz", "1.2.3"),
        ("1.2.3.4-majority.nii.gz", "1.2.3.4"),
        ("1.2.3.seg.nrrd", "1.2.3"),
        ("case.nii.gz", "case_0000"),
    ],
)
def test_mask_belongs_to_the_scan_whose_name_it_begins_with(tmp_path, name, owner):
    path = write(tmp_path / name, blocks(_1=(2, 2, 2, 4)))
    assert find_nodule_masks(tmp_path, SCANS) == {owner: (path,)}


def test_mask_of_no_scan_is_left_out_and_told(tmp_path, caplog):
    for name in ("lung_1.mha", "lung_2.mha"):
        write(tmp_path / name, blocks(_1=(2, 2, 2, 4)))
    assert list(find_nodule_masks(tmp_path, SCANS)) == ["lung_1"]
    assert "1 masks in" in caplog.messages[0] and "lung_2.mha" in caplog.messages[0]
    assert "4 of 5 scans have no nodule mask in" in caplog.messages[1]


def test_folder_without_a_mask_of_any_scan_is_refused(tmp_path):
    write(tmp_path / "lung_2.mha", blocks(_1=(2, 2, 2, 4)))
    with pytest.raises(InputError, match="belongs to any of the 5 scans: a mask needs its scan's name"):
        find_nodule_masks(tmp_path, SCANS)
    with pytest.raises(FileNotFoundError, match="put the nodule masks there"):
        find_nodule_masks(tmp_path / "none", SCANS)


def test_dicom_segmentation_belongs_to_the_series_that_it_refers_to(tmp_path):
    path = write_seg(tmp_path / "somewhere" / "x", ("a", LESION, blocks(_1=(5, 4, 6, 6))), series="1.2.3")
    assert find_nodule_masks(tmp_path, SCANS) == {"1.2.3": (path,)}
    write_seg(tmp_path / "y.dcm", ("a", LESION, blocks(_1=(5, 4, 6, 6))), series="")
    with pytest.raises(InputError, match="does not say which series it was drawn on"):
        find_nodule_masks(tmp_path, SCANS)


# -------------------------------------------------------------------------------------------------- preprocessing


def prepare(folder: Path, **options) -> LUNA16Preprocessor:
    """A preprocessor of ``folder/scans`` with the masks in ``folder/masks``, on the scans' own grid."""
    given = {"annotations_path": None, "target_size": None, "mask_lungs": False, "num_processes": 1}
    given |= {"nodule_masks_dir": folder / "masks", "output_dir": folder / "processed"}
    return LUNA16Preprocessor(folder / "scans", **given | options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two scans of 30 mm, and masks of the first by three readers."""
    for name in "ab":
        rng = np.random.default_rng(ord(name))
        write(tmp_path / "scans" / f"{name}.mha", rng.normal(-800, 50, (30, 30, 30)).astype(np.int16))
    shape = (30, 30, 30)
    readers = [(_1 := [(6, 6, 6, 8)]), _1, [*_1, (20, 20, 20, 4)]]
    for number, places in enumerate(readers):
        write(tmp_path / "masks" / f"a_reader{number}.nii.gz", blocks(shape, _1=places))
    return tmp_path


def test_masks_alone_say_where_nodules_are(folder, caplog):
    summary = prepare(folder).process_all()
    assert summary.nodules == {"a": 1, "b": 0}
    assert any("1 of 2 scans have no nodule mask" in message for message in caplog.messages)
    scan = read_processed(folder / "processed", "a")
    (nodule,) = scan.metadata.nodules
    assert (nodule.center_xyz, nodule.mask_source, nodule.voxels) == ((9.5, 9.5, 9.5), "mask", 512)
    np.testing.assert_array_equal(scan.mask, blocks((30, 30, 30), _1=(6, 6, 6, 8)))
    assert [finding[:3] for finding in scan.metadata.excluded] == [(21.5, 21.5, 21.5)]  # one reader's
    assert prepare(folder).process_all().skipped == ["a", "b"]


def test_mask_on_a_finer_grid_covers_what_it_covers(folder):
    for path in (folder / "masks").iterdir():
        path.unlink()
    fine = blocks((60, 60, 60), _1=(12, 12, 12, 16))
    write(folder / "masks" / "a.nii.gz", fine, spacing=(0.5, 0.5, 0.5), origin=(-0.25, -0.25, -0.25))
    prepare(folder).process_all()
    mask = read_processed(folder / "processed", "a").mask
    np.testing.assert_array_equal(mask, blocks((30, 30, 30), _1=(6, 6, 6, 8)))


def test_annotation_keeps_its_place_and_takes_the_shape_of_its_mask(folder):
    table = folder / "annotations.csv"
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\na,10,9,9,9.5\na,24,6,6,5\n")
    prepare(folder, annotations_path=table).process_all()
    nodules = read_metadata(folder / "processed", "a").nodules
    found = [(nodule.center_xyz, nodule.diameter_mm, nodule.mask_source) for nodule in nodules]
    assert found == [((10.0, 9.0, 9.0), 9.5, "mask"), ((24.0, 6.0, 6.0), 5.0, "sphere")]
    assert nodules[0].voxels == 512


def test_changed_mask_is_prepared_again(folder):
    prepare(folder).process_all()
    write(folder / "masks" / "a_reader1.nii.gz", blocks((30, 30, 30), _1=(6, 6, 7, 8)))
    assert prepare(folder).process_all().processed == ["a"]
    assert read_metadata(folder / "processed", "a").nodules[0].voxels == 512  # two of three still agree
    assert prepare(folder, nodule_labels=[2]).process_all().nodules == {"a": 0, "b": 0}


def test_bad_mask_fails_its_scan_alone(folder):
    write(folder / "masks" / "b.nii.gz", np.linspace(0, 1, 27000).reshape(30, 30, 30).astype(np.float32))
    summary = prepare(folder).process_all()
    assert list(summary.failed) == ["b"] and "is no mask of labels" in summary.failed["b"]
    assert summary.nodules == {"a": 1}


def test_mask_beside_its_scan_is_told(folder, caplog):
    for path in (folder / "masks").iterdir():
        path.unlink()
    write(folder / "masks" / "a.nii.gz", blocks((30, 30, 30), _1=(6, 6, 6, 8)), origin=(300.0, 0.0, 0.0))
    prepare(folder).process_all()
    assert any("1 annotation(s) outside their scan: a at (309.5" in message for message in caplog.messages)


def test_scans_and_masks_need_folders_of_their_own(folder):
    with pytest.raises(InputError, match="must not lie in each other; name the folder of the scans alone"):
        prepare(folder, nodule_masks_dir=folder / "scans" / "labels")
    with pytest.raises(InputError, match=r"nodule_labels \[1\] would be ignored"):
        prepare(folder, nodule_masks_dir=None, nodule_labels=[1])


def test_segmentations_may_lie_beside_their_scans(folder):
    write(folder / "scans" / "b.seg.nrrd", blocks((30, 30, 30), _1=(6, 6, 6, 8)))
    assert prepare(folder, nodule_masks_dir=folder / "scans").process_all().nodules == {"a": 0, "b": 1}


def test_excluded_findings_are_noted(folder):
    table = folder / "excluded.csv"
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nb,10,9,8,-1\nc,1,2,3,4\n")
    prepare(folder, excluded_path=table).process_all()
    assert read_metadata(folder / "processed", "b").excluded == ((10.0, 9.0, 8.0, -1.0),)
    with pytest.raises(FileNotFoundError):
        prepare(folder, excluded_path=folder / "none.csv").process_all()
