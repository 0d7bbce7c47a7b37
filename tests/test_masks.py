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

import preprocess
from data.masks import find_nodule_masks, read_marks, read_mask
from preprocess import Case, LUNA16Preprocessor
from utils import Geometry, InputError, UserError, read_metadata, read_processed

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


SCAN = Geometry((20, 24, 28), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def marks_in(*paths, labels=None, scan=SCAN):
    return read_marks(paths, labels, scan)


def found_in(paths, labels=None) -> list[tuple[list[float], int]]:
    """Centre and voxels of each nodule."""
    nodules = marks_in(*paths, labels=labels).nodules
    return sorted((np.round(nodule.center_xyz, 3).tolist(), int(nodule.inside.sum())) for nodule in nodules)


# ------------------------------------------------------------------------------------------------- one reader's mask


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_each_label_is_a_nodule_also_in_two_pieces(tmp_path, suffix):
    array = blocks(_1=(2, 2, 2, 4), _7=[(10, 10, 10, 3), (10, 10, 16, 3)])
    path = write(tmp_path / f"a{suffix}", array, spacing=(0.5, 1.0, 2.0), origin=(-10.0, 5.0, 3.0))
    assert found_in([path]) == [([-8.25, 8.5, 10.0], 64), ([-4.0, 16.0, 25.0], 54)]  # the voxel nearest to (-3, 16, 25)


def test_of_one_label_each_connected_region_is_a_nodule(tmp_path):
    array = blocks(_255=[(2, 2, 2, 4), (6, 6, 6, 2), (14, 14, 14, 3)])  # the second touches the first at a corner
    nodules = marks_in(write(tmp_path / "a.nii.gz", array)).nodules
    assert sorted(int(nodule.inside.sum()) for nodule in nodules) == [27, 72]


def test_parts_of_a_label_that_lie_far_apart_are_nodules_of_their_own(tmp_path):
    near, far = (2, 2, 9, 3), (14, 14, 20, 3)  # 4 and 15 voxels from the first
    path = write(tmp_path / "a.mha", blocks(_1=[(2, 2, 2, 3), near, far], _2=(14, 2, 2, 1)))
    assert [voxels for _, voxels in found_in([path])] == [54, 27]  # and a slip of the brush
    wide = write(tmp_path / "b.mha", blocks(_1=[(2, 2, 2, 3), near], _2=(14, 2, 2, 4)), spacing=(2.0, 1.0, 1.0))
    assert sorted(voxels for _, voxels in found_in([wide])) == [27, 27, 64]


def test_nodule_that_is_hollow_in_its_middle_has_a_voxel_of_its_own_for_a_centre(tmp_path):
    array = blocks(_1=(4, 4, 4, 9))
    array[5:12, 5:12, 5:13] = 0  # open to one side
    (nodule,) = marks_in(write(tmp_path / "a.mha", array)).nodules
    x, y, z = (int(c) for c in nodule.center_xyz)
    assert array[z, y, x] == 1


def test_diameter_is_that_of_the_sphere_of_equal_volume(tmp_path):
    (nodule,) = marks_in(write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4)), spacing=(0.5, 1.0, 2.0))).nodules
    assert np.isclose(nodule.diameter_mm**3 * np.pi / 6, 64)


def test_slip_of_the_brush_is_no_nodule_but_in_doubt(tmp_path):
    marks = marks_in(write(tmp_path / "a.mha", blocks(_1=[(2, 2, 2, 4), (15, 15, 15, 1)])))
    assert len(marks.nodules) == 1
    assert marks.excluded == [(15.0, 15.0, 15.0, 2.0)]


def test_empty_mask_shows_nothing(tmp_path):
    assert marks_in(write(tmp_path / "a.mha", blocks())).nodules == []


def test_chosen_labels_alone_are_nodules(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4), _2=(10, 10, 10, 5)))
    assert found_in([path], ["2"]) == [([12.0, 12.0, 12.0], 125)]
    assert found_in([path], ["9"]) == []


def test_whole_numbers_kept_as_floats_are_labels(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_3=(2, 2, 2, 4), dtype=np.float32))
    assert found_in([path]) == [([3.5, 3.5, 3.5], 64)]


def test_labels_that_were_stored_as_scaled_numbers_are_read(tmp_path):
    array = blocks(_3=(2, 2, 2, 4), dtype=np.float32) * np.float32(1.0001)
    assert found_in([write(tmp_path / "a.mha", array)]) == [([3.5, 3.5, 3.5], 64)]


DISTANCE = np.linalg.norm(np.indices((20, 24, 28)).reshape(3, -1).T - (10, 12, 14), axis=1).reshape(20, 24, 28)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.linspace(-0.5, 1, 13440).reshape(20, 24, 28), "labels are whole numbers from 1 on"),
        (np.arange(-1, 13439).reshape(20, 24, 28), "labels are whole numbers from 1 on"),
        (np.arange(13440).reshape(20, 24, 28), "labels are whole numbers from 1 on"),
        (1 + blocks(_1=(4, 4, 4, 6)), "none of its voxels is 0, which must be background"),
        ((100 * np.exp(-(DISTANCE**2) / 30)).round(), "like the levels of a picture or of probabilities"),
        (np.clip(255 * (6 - DISTANCE) / 2, 0, 255).round(), "like the levels of a picture or of probabilities"),
        (np.clip(4 - DISTANCE // 2, 0, 3), "like the levels of a picture or of probabilities"),  # votes of readers
    ],
)
def test_what_is_no_mask_is_refused(tmp_path, values, reason):
    path = write(tmp_path / "a.mha", values.astype(np.float32))
    with pytest.raises(InputError, match=f"is no mask of labels: .*{reason}"):
        read_mask(path)


def test_nodules_that_touch_are_no_levels_of_a_picture(tmp_path):
    array = blocks(_1=(2, 2, 2, 3), _2=(2, 2, 5, 3), _3=(2, 5, 2, 3), _4=(2, 5, 5, 3), _5=(5, 2, 2, 3))
    assert len(marks_in(write(tmp_path / "a.mha", array)).nodules) == 5


def test_labels_that_were_asked_for_and_are_not_there_are_told(tmp_path):
    marks = marks_in(write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4), _5=(12, 2, 2, 4))), labels=["9", "gtv*"])
    assert (marks.nodules, marks.note) == ([], "1 of its 1 masks hold none of nodule_labels, but 1, 5")


def test_mask_that_lost_its_place_is_told(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4)), origin=(3.0, 4.0, 0.0))
    assert "a mask has as many voxels as its scan and lies 4.0 mm away" in marks_in(path).note


def test_label_that_is_too_large_for_a_nodule_is_refused(tmp_path):
    path = write(tmp_path / "a.mha", blocks(_1=(2, 2, 2, 4), _2=(4, 4, 4, 15)), spacing=(9.0, 9.0, 9.0))
    with pytest.raises(InputError, match=r"label 2 marks 2.5 litres, which is no nodule; name .* by nodule_labels"):
        marks_in(path)
    assert len(marks_in(path, labels=["1"]).nodules) == 1


# -------------------------------------------------------------------------------------------------- several readers


def test_a_voxel_is_nodule_where_more_than_half_of_the_readers_marked_it(tmp_path):
    arrays = [blocks(_1=(4, 4, 4, 6)), blocks(_9=(4, 4, 6, 6)), blocks(_1=[(4, 4, 8, 6), (14, 14, 20, 3)])]
    paths = [write(tmp_path / f"{n}.mha", array) for n, array in enumerate(arrays)]
    marks = marks_in(*paths)
    (nodule,) = marks.nodules
    assert (nodule.center_xyz, int(nodule.inside.sum())) == ((8.5, 6.5, 6.5), 6 * 6 * 6)  # x from 6 to 11
    assert [(mark[:3], round(mark[3], 2)) for mark in marks.excluded] == [((21.0, 15.0, 15.0), 3.72)]  # one of three


def test_grid_of_one_reader_does_not_limit_the_others(tmp_path):
    array = blocks(_1=(4, 4, 4, 6))
    cropped = write(tmp_path / "1.mha", array[2:12, 2:12, 2:12], origin=(2.0, 2.0, 2.0))
    others = [write(tmp_path / f"{n}.mha", blocks(_1=[(4, 4, 4, 6), (12, 14, 18, 5)])) for n in (2, 3)]
    expected = [([6.5, 6.5, 6.5], 216), ([20.0, 16.0, 14.0], 125)]
    assert found_in([cropped, *others]) == found_in([*others, cropped]) == expected


def test_mask_without_the_chosen_labels_is_no_reader(tmp_path):
    nodule = write(tmp_path / "1.mha", blocks(_1=(2, 2, 2, 4)))
    lobes = write(tmp_path / "2.mha", blocks(_7=(2, 2, 2, 12)))
    marks = marks_in(nodule, lobes, labels=["1"])
    assert len(marks.nodules) == 1 and marks.note.startswith("1 of its 2 masks hold none of nodule_labels, but 7")


def test_masks_that_share_no_voxel_are_those_of_different_nodules(tmp_path):
    places = [(2, 2, 2, 4), (6, 6, 6, 4), (12, 2, 2, 4), (2, 12, 12, 4), (12, 12, 20, 4)]  # the first two touch
    paths = [write(tmp_path / f"{n}.mha", blocks(_1=place)) for n, place in enumerate(places)]
    marks = marks_in(*paths)
    assert (len(marks.nodules), marks.doubtful) == (5, [])
    assert marks.note == "its 5 masks share no voxel, so they are taken for masks of different nodules"


def test_what_readers_hardly_share_is_in_doubt(tmp_path):
    both = (12, 12, 20, 5)
    paths = [write(tmp_path / f"{n}.mha", blocks(_1=[(n, n, n, 5), both])) for n in (2, 6)]  # a voxel of 125
    marks = marks_in(*paths)
    assert [int(region.inside.sum()) for region in marks.nodules] == [125]
    assert [int(region.inside.sum()) for region in marks.doubtful] == [249]


def test_readers_who_agree_on_nothing_are_told(tmp_path):
    paths = [write(tmp_path / f"{n}.mha", blocks()) for n in range(2)]
    marks = marks_in(*paths, write(tmp_path / "2.mha", blocks(_1=(4, 4, 4, 6))))
    assert (marks.nodules, len(marks.doubtful)) == ([], 1)
    assert marks.note == "its 3 masks agree on no place, so that nothing they mark is a nodule"


def ball(center: tuple[int, int, int], radius: float) -> np.ndarray:
    """A ball around a voxel (z, y, x) of an array of 40 voxels along each edge."""
    places = np.indices((40, 40, 40)).reshape(3, -1).T
    return (np.linalg.norm(places - center, axis=1) <= radius).reshape(40, 40, 40).astype(np.uint8)


def covered(findings) -> np.ndarray:
    """Voxels that excluded findings cover."""
    parts = [ball((z, y, x), diameter / 2) for x, y, z, diameter in findings]
    return np.any(parts, axis=0) if parts else np.zeros((40, 40, 40), bool)


def test_rim_that_one_of_three_drew_further_out_is_background_up_to_3_mm(tmp_path):
    nodule = ball((20, 20, 20), 6)
    paths = [write(tmp_path / f"{n}.mha", nodule) for n in (1, 2)]
    assert marks_in(*paths, write(tmp_path / "3.mha", ball((20, 20, 20), 8.9))).doubtful == []
    marks = marks_in(*paths, write(tmp_path / "4.mha", nodule | ball((20, 20, 29), 5)))
    assert [int(found.inside.sum()) for found in marks.nodules] == [int(nodule.sum())]
    assert covered(marks.excluded).any() and not (covered(marks.excluded) & (nodule > 0)).any()


def test_long_finding_in_doubt_is_covered_with_balls(tmp_path):
    bar, nodule = np.zeros((40, 40, 40), np.uint8), ball((30, 30, 30), 4)
    bar[10:15, 10:15, 2:38] = 1
    found = covered(marks_in(write(tmp_path / "1.mha", nodule), write(tmp_path / "2.mha", bar | nodule)).excluded)
    assert (found & (bar > 0)).sum() > 0.7 * bar.sum() and (found & (bar == 0)).sum() < 0.2 * bar.sum()


def test_half_of_the_readers_are_not_enough(tmp_path):
    paths = [write(tmp_path / "1.mha", blocks(_1=(4, 4, 4, 6))), write(tmp_path / "2.mha", blocks())]
    marks = marks_in(*paths)
    assert (marks.nodules, len(marks.doubtful)) == ([], 1)  # the second one marked nothing


def test_thin_masks_of_a_thick_scan_lose_no_nodule(tmp_path):
    thick = Geometry((4, 24, 28), (0.0, 0.0, 0.0), (1.0, 1.0, 5.0))
    paths = [write(tmp_path / f"{n}.mha", blocks(_1=(7, 4, 4, 2))) for n in (1, 2)]  # between two slices
    assert [int(nodule.inside.sum()) for nodule in marks_in(*paths, scan=thick).nodules] == [8]


def test_readers_may_use_other_grids(tmp_path):
    array = blocks(_1=(4, 4, 4, 8))
    one = write(tmp_path / "1.mha", array)
    half = blocks(_1=(2, 2, 2, 4), shape=(10, 12, 14))  # the same cube on voxels of 2 mm
    two = write(tmp_path / "2.nii.gz", half, spacing=(2.0, 2.0, 2.0), origin=(0.5, 0.5, 0.5))
    turned = blocks(_1=(4, 4, 4, 8))[:, ::-1, ::-1]
    direction = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
    three = write(tmp_path / "3.mha", turned, origin=(27.0, 23.0, 0.0), direction=direction)
    away = write(tmp_path / "4.mha", blocks(_1=(4, 4, 4, 8)), origin=(500.0, 0.0, 0.0))
    assert found_in([one, two, three]) == [([7.5, 7.5, 7.5], 512)]
    assert found_in([one, two, three, away]) == [([7.5, 7.5, 7.5], 512)]
    assert found_in([one, two, away, away]) == []
    assert "lies 500.0 mm away; does its header belong to it?" in marks_in(one, two, three, away).note
    assert marks_in(one, three).note == ""  # another order of the voxels is no other place


def test_coarse_masks_lose_nothing_beside_a_fine_one(tmp_path):
    fine = write(tmp_path / "1.mha", blocks(_1=(12, 14, 20, 2)))
    half = blocks(_1=(1, 1, 1, 1), shape=(5, 6, 7))  # one voxel of 4 mm around 5.5 mm, from 4 to 7
    coarse = [write(tmp_path / f"{n}.mha", half, spacing=(4.0, 4.0, 4.0), origin=(1.5, 1.5, 1.5)) for n in (2, 3)]
    assert found_in([fine, *coarse]) == [([5.5, 5.5, 5.5], 64)]


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


def test_label_that_no_segment_of_slicer_describes_is_a_nodule_too(tmp_path):
    image = sitk.GetImageFromArray(blocks(_1=(2, 2, 2, 4), _2=(10, 10, 10, 5)))
    for number in range(2):  # one segment, twice
        image.SetMetaData(f"Segment{number}_LabelValue", "1")
    sitk.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    assert [segment.number for segment in read_mask(tmp_path / "a.seg.nrrd").segments] == [1, 2]


def test_segmentation_of_slicer_without_names_is_a_map_of_labels(tmp_path):
    path = write(tmp_path / "a.seg.nrrd", blocks(_1=(2, 2, 2, 4), _2=(10, 10, 10, 5)))
    assert len(marks_in(path).nodules) == 2


DAMAGES = [lambda data: data[:-20], lambda data: data[:-4], lambda data: data[:-30] + b"x" + data[-29:]]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_segmentation_of_slicer_is_refused(tmp_path, damage):
    array = blocks(_1=(2, 2, 2, 4)) + (np.random.default_rng(0).random((20, 24, 28)) < 0.01)
    path = write(tmp_path / "a.seg.nrrd", array.astype(np.uint8))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"is damaged|is cut off|cannot be read"):
        read_mask(path)


@pytest.mark.parametrize(("field", "text"), [("Layer", "5"), ("Layer", "x"), ("LabelValue", "x"), ("LabelValue", "0")])
def test_segment_of_slicer_that_is_not_there_is_refused(tmp_path, field, text):
    image = sitk.GetImageFromArray(blocks(_1=(2, 2, 2, 4)))
    for name, value in ({"LabelValue": "1", "Layer": "0"} | {field: text}).items():
        image.SetMetaData(f"Segment0_{name}", value)
    sitk.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    with pytest.raises(InputError, match=r"segment 0 has the label .* in layer .* of 1; save it again"):
        read_mask(tmp_path / "a.seg.nrrd")


# ------------------------------------------------------------------------------------------------------------ DICOM


def sequence(**values) -> Sequence:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])


def write_seg(
    path: Path, *segments: tuple[str, tuple[str, str], np.ndarray], kind="BINARY", series=CT_UID, certainty=150
) -> Path:
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
            frames.append(array[z] * {"BINARY": 1, "FRACTIONAL": certainty, "LABELMAP": number}[kind])
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


def test_fractional_segmentation_below_half_is_refused(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))), kind="FRACTIONAL", certainty=90)
    with pytest.raises(InputError, match=r"segment 1 nowhere exceeds half of its scale \(at most 90 of 200\)"):
        read_mask(path)


def test_organs_beside_a_lesion_are_no_nodules_unless_named(tmp_path):
    nodule, heart = blocks(_1=(5, 4, 6, 6)), blocks(_1=(14, 14, 14, 4))
    path = write_seg(tmp_path / "seg.dcm", ("Heart", ORGAN, heart), ("GTV-1", LESION, nodule))
    assert [voxels for _, voxels in found_in([path])] == [216]
    assert [voxels for _, voxels in found_in([path], ["heart"])] == [64]
    others = write_seg(tmp_path / "organs.dcm", ("Lung", ORGAN, blocks(_1=(2, 2, 2, 14))))
    assert [voxels for _, voxels in found_in([path, others])] == [216]
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


def test_frames_that_step_sideways_are_refused(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))))
    data = pydicom.dcmread(path)
    for number, group in enumerate(data.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence[0].ImagePositionPatient[1] += 0.7 * number  # a tilted gantry
    data.save_as(path)
    with pytest.raises(InputError, match="its frames step sideways"):
        read_mask(path)


def test_background_of_a_map_of_labels_is_no_nodule(tmp_path):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))), kind="LABELMAP")
    data = pydicom.dcmread(path)
    data.SegmentSequence.insert(0, sequence(SegmentNumber=0, SegmentLabel="Background")[0])
    data.save_as(path)
    assert [voxels for _, voxels in found_in([path])] == [216]


@pytest.mark.parametrize("name", ["SegmentSequence", "SegmentationType", "Rows"])
def test_dicom_segmentation_that_lacks_something_is_refused(tmp_path, name):
    path = write_seg(tmp_path / "seg", ("a", LESION, blocks(_1=(5, 4, 6, 6))))
    data = pydicom.dcmread(path)
    delattr(data, name)
    data.save_as(path)
    with pytest.raises(InputError, match=r"lacks what a DICOM segmentation must hold|its frames cannot be read"):
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
    (nodule,) = marks_in(*paths, scan=read_mask(paths[0]).geometry).nodules
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
        ("lung_1é.mha", None),
        ("1.2.3.40.mha", None),
        ("case.nii.gz", "case_0000"),
    ],
)
def test_mask_belongs_to_the_scan_whose_name_it_begins_with(tmp_path, name, owner):
    path = write(tmp_path / name, blocks(_1=(2, 2, 2, 4)))
    write(tmp_path / "1.2.3.4.mha", blocks(_1=(2, 2, 2, 4))) if owner is None else None
    assert find_nodule_masks(tmp_path, SCANS).get(owner) == (None if owner is None else (path,))


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


def test_dicom_segmentation_belongs_to_the_series_that_it_refers_to(tmp_path, caplog):
    path = write_seg(tmp_path / "somewhere" / "x", ("a", LESION, blocks(_1=(5, 4, 6, 6))), series="1.2.3")
    assert find_nodule_masks(tmp_path, SCANS) == {"1.2.3": (path,)}
    write_seg(tmp_path / "another", ("a", LESION, blocks(_1=(5, 4, 6, 6))), series="1.2.3-9")
    assert find_nodule_masks(tmp_path, SCANS) == {"1.2.3": (path,)}
    write_seg(tmp_path / "y.dcm", ("a", LESION, blocks(_1=(5, 4, 6, 6))), series="")
    assert find_nodule_masks(tmp_path, SCANS) == {"1.2.3": (path,)}
    assert "1 file(s) in" in caplog.text and "does not say which series it was drawn on; save it as" in caplog.text


def test_scans_with_more_masks_than_others_are_told(tmp_path, caplog):
    for name in ("lung_1.mha", "lung_1_followup.mha", "lung_10.mha"):
        write(tmp_path / name, blocks(_1=(2, 2, 2, 4)))
    find_nodule_masks(tmp_path, SCANS)
    assert "scans have 1 to 2 masks, as of several readers: lung_1 has lung_1.mha, lung_1_followup.mha" in caplog.text


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


def test_annotation_takes_the_mask_that_it_lies_in(folder):
    for path in (folder / "masks").iterdir():
        path.unlink()
    write(folder / "masks" / "a.mha", blocks((30, 30, 30), _1=(3, 12, 12, 4), _2=(10, 8, 8, 14)))
    table = folder / "annotations.csv"
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\na,15,15,17,30\na,13.5,13.5,4.5,5\n")
    prepare(folder, annotations_path=table).process_all()
    nodules = read_metadata(folder / "processed", "a").nodules
    assert [(nodule.voxels, nodule.mask_source) for nodule in nodules] == [(2744, "mask"), (64, "mask")]


def test_labels_that_are_nowhere_are_told(folder, caplog):
    prepare(folder, nodule_labels=["gtv*"]).process_all()
    assert "nodule masks to look at: a: 3 of its 3 masks hold none of nodule_labels, but 1" in caplog.text
    with pytest.raises(InputError, match="nodule_labels must name a label"):
        prepare(folder, nodule_labels=[])


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


def test_masks_of_a_data_set_from_outside_are_not_replaced(folder, monkeypatch):
    case = Case("a", folder / "scans" / "a.mha", nodule_masks=(folder / "masks" / "a_reader0.nii.gz",))
    monkeypatch.setitem(preprocess.DATA_SETS, "mine", lambda *paths: [case])
    with pytest.raises(InputError, match="data set mine names nodule masks itself; leave out nodule_masks_dir"):
        prepare(folder, data_set="mine").process_all()
    assert prepare(folder, data_set="mine", nodule_masks_dir=None).process_all().nodules == {"a": 1}


def test_excluded_findings_are_noted(folder, caplog):
    table = folder / "excluded.csv"
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nb,10,9,8,-1\nc,1,2,3,4\n")
    prepare(folder, excluded_path=table).process_all()
    assert read_metadata(folder / "processed", "b").excluded == ((10.0, 9.0, 8.0, -1.0),)
    with pytest.raises(FileNotFoundError):
        prepare(folder, excluded_path=folder / "none.csv").process_all()
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nc,1,2,3,4\n")
    prepare(folder, excluded_path=table).process_all()
    assert f"none of the 1 findings of {table} lies in these scans" in caplog.text
    table.write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\na,1,2,3,-7\n")
    with pytest.raises(InputError, match="diameter_mm must be positive, or -1 where it is unknown"):
        prepare(folder, excluded_path=table).process_all()
