"""Nodules as DICOM objects: read back by pydicom and by the reader of masks, and held against the scan's own mask."""

import builtins
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import HALF, Bright, Nothing, chest
from pydicom.uid import generate_uid
from test_dicom import multi_frame, save, slice_of, write_series

import data.dicom_results as dicom_results
from data.dicom import DicomReader
from data.dicom_results import _on_slices, has_highdicom, write_dicom_results
from data.masks import read_mask
from data.measures import Measures
from utils import Geometry, InputError, read_scan

pytest.importorskip("highdicom", reason="highdicom is optional")
FRAME = "1.2.77"
FACTS = {"checkpoint_sha256": "a" * 64, "threshold": 0.5, "min_score": 0.5, "mirrors": 0}


def write_chest_series(folder: Path, **changes) -> Path:
    """The chest with its ball as a DICOM series of a patient, whose files lie in no order."""
    image = chest((40, 56, 60))
    pixels = sitk.GetArrayFromImage(image) + 1000
    (dx, dy, _), origin = image.GetSpacing(), image.GetOrigin()
    for number, plane in enumerate(pixels):
        place = [*origin[:2], origin[2] + number * image.GetSpacing()[2]]
        known = {"ImagePositionPatient": place, "PixelSpacing": [dy, dx], "FrameOfReferenceUID": FRAME}
        save(slice_of(number, "1.2.3", pixels=plane, **known | changes), folder / f"{number * 7 % 40}.dcm")
    return folder


@pytest.fixture
def results(trained, tmp_path):
    """Folder of the results of the chest as a DICOM series."""
    write_chest_series(tmp_path / "ward" / "Mueller_Hans")
    trained(Bright(HALF)).infer_scans([tmp_path / "ward"])
    return tmp_path / "out"


def contents(item):
    """All content items of a report below one, as (name, item)."""
    for below in item.get("ContentSequence", []):
        names = below.get("ConceptNameCodeSequence")
        yield names[0].CodeMeaning if names else "", below
        yield from contents(below)


# -------------------------------------------------------------------------------------------------------- segmentation


def test_segmentation_marks_the_voxels_of_the_mask_and_names_their_images(results, tmp_path):
    mask = sitk.ReadImage(str(results / "predicted_masks" / "1.2.3.nii.gz"))
    array = sitk.GetArrayFromImage(mask)
    data = pydicom.dcmread(results / "predicted_masks" / "1.2.3.dcm")
    places = {}
    for path in (tmp_path / "ward" / "Mueller_Hans").iterdir():
        source = pydicom.dcmread(path)
        places[source.SOPInstanceUID] = source.ImagePositionPatient
    seen = 0
    for frame, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        place = group.PlanePositionSequence[0].ImagePositionPatient
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert places[source] == place
        z = round(mask.TransformPhysicalPointToContinuousIndex([float(v) for v in place])[2])
        np.testing.assert_array_equal(frame, array[z])
        seen += frame.sum()
    assert seen == array.sum() > 0


def test_segmentation_belongs_to_the_study_of_the_scan(results):
    data = pydicom.dcmread(results / "predicted_masks" / "1.2.3.dcm")
    assert (data.StudyInstanceUID, data.FrameOfReferenceUID, data.PatientID) == ("1.2", FRAME, "P1")
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3"
    assert data.SeriesInstanceUID != "1.2.3"
    (segment,) = data.SegmentSequence
    assert segment.SegmentLabel == "Nodule 1"
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Nodule"


def test_segmentation_can_be_trained_on(results):
    mask = read_mask(results / "predicted_masks" / "1.2.3.dcm")
    own = sitk.ReadImage(str(results / "predicted_masks" / "1.2.3.nii.gz"))
    (segment,) = mask.segments
    assert segment.inside.sum() == sitk.GetArrayFromImage(own).sum()
    there = mask.geometry.world(segment.lower + np.argwhere(segment.inside).mean(axis=0))
    here = Geometry.from_image(own).world(np.argwhere(sitk.GetArrayFromImage(own)).mean(axis=0))
    assert there == pytest.approx(here, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- report


def test_report_holds_the_measures_of_each_nodule_and_names_its_segment(results):
    report = pydicom.dcmread(results / "1.2.3_measures.dcm")
    (row,) = json.loads((results / "1.2.3_measures.json").read_text())
    items = list(contents(report))
    numbers = {name: item.MeasuredValueSequence[0] for name, item in items if item.ValueType == "NUM"}
    for name, key, unit in (
        ("Volume", "volume_mm3", "mm3"),
        ("Long axis", "longest_axial_mm", "mm"),
        ("Short axis", "across_axial_mm", "mm"),
        ("Attenuation more than 1 mm inside", "mean_hu", "[hnsf'U]"),
        ("Diameter of the ball of equal volume", "equivalent_diameter_mm", "mm"),
        ("Score of the network, 0 to 1", "score", "1"),
    ):
        assert float(numbers[name].NumericValue) == pytest.approx(row[key], abs=1e-3)
        assert numbers[name].MeasurementUnitsCodeSequence[0].CodeValue == unit
    meanings = {name: item.ConceptCodeSequence[0].CodeMeaning for name, item in items if item.ValueType == "CODE"}
    assert meanings["Laterality"].lower() == row["side"] == "right"
    assert meanings["Density of nodule"] == row["density"]
    segmentation = pydicom.dcmread(results / "predicted_masks" / "1.2.3.dcm")
    (referenced,) = [item.ReferencedSOPSequence[0] for name, item in items if name == "Referenced Segment"]
    assert referenced.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID
    assert referenced.ReferencedSegmentNumber == 1
    assert report.StudyInstanceUID == "1.2"
    assert report.VerificationFlag == "UNVERIFIED"
    texts = [item.TextValue for name, item in items if item.ValueType == "TEXT"]
    assert {"threshold: 0.5", "min_score: 0.0", "mirrors: 0"} <= set(texts)


def test_report_is_one_of_tid_1500(results):
    report = pydicom.dcmread(results / "1.2.3_measures.dcm")
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"


# ------------------------------------------------------------------------------------------------- when, and when not


def test_scan_without_a_nodule_has_no_dicom_results_and_loses_those_of_before(trained, tmp_path):
    series = write_chest_series(tmp_path / "ct")
    trained(Bright(HALF)).infer_scan(series)
    assert (tmp_path / "out" / "predicted_masks" / "1.2.3.dcm").is_file()
    trained(Nothing()).infer_scan(series)
    assert not list((tmp_path / "out").rglob("*.dcm"))


def test_scan_of_another_format_has_none(trained, tmp_path):
    sitk.WriteImage(chest((40, 56, 60)), str(tmp_path / "a.mha"))
    trained(Bright(HALF)).infer_scan(tmp_path / "a.mha")
    assert not list((tmp_path / "out").rglob("*.dcm"))


@pytest.mark.parametrize("name", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_series_that_lacks_what_they_need_is_told_and_searched_all_the_same(trained, tmp_path, caplog, name):
    trained(Bright(HALF)).infer_scan(write_chest_series(tmp_path / "ct", **{name: None}))
    assert f"no DICOM segmentation and no DICOM report: the series states no {name}" in caplog.text
    assert not list((tmp_path / "out").rglob("*.dcm"))
    assert (tmp_path / "out" / "1.2.3_nodules.json").is_file()


@pytest.mark.parametrize("changes", [{"PatientSex": "X"}, {"StudyDate": "2026-1-1"}, {"SliceThickness": None}])
def test_series_that_highdicom_does_not_accept_is_searched_all_the_same(trained, tmp_path, caplog, changes):
    inferencer = trained(Bright(HALF))
    found = inferencer.infer_scans([write_chest_series(tmp_path / "ct", **changes)])
    assert not inferencer.failed
    assert len(found) == 1
    assert (tmp_path / "out" / "reports" / "1.2.3.html").is_file()
    written = (tmp_path / "out" / "predicted_masks" / "1.2.3.dcm").is_file()
    assert written != ("no DICOM segmentation" in caplog.text)


def test_missing_highdicom_is_told_once_with_what_to_install(trained, tmp_path, caplog, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "highdicom":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    has_highdicom.cache_clear()
    inferencer = trained(Bright(HALF))
    for number in range(2):
        inferencer.infer_scan(write_chest_series(tmp_path / f"{number}", SeriesInstanceUID=f"1.2.{number}"))
    has_highdicom.cache_clear()
    assert caplog.text.count("pip install 'highdicom") == 1
    assert not list((tmp_path / "out").rglob("*.dcm"))
    assert (tmp_path / "out" / "1.2.1_nodules.json").is_file()


def test_name_of_the_patient_stands_in_the_dicom_objects_alone_which_is_told(results, caplog):
    told = "".join(p.read_text(errors="replace") for p in results.rglob("*") if p.is_file() and p.suffix != ".dcm")
    assert "Mueller" not in told + caplog.text
    assert pydicom.dcmread(results / "1.2.3_measures.dcm").PatientName == "Mueller^Hans"


def test_same_results_have_the_same_names_each_time_and_others_have_others(trained, tmp_path):
    series = write_chest_series(tmp_path / "ct")

    def uids(number, **arguments):
        folder = tmp_path / f"out{number}"
        trained(Bright(HALF), output_dir=folder, **arguments).infer_scan(series)
        files = sorted(folder.rglob("*.dcm"))
        return [pydicom.dcmread(path).SOPInstanceUID for path in files]

    first, again, other = uids(0), uids(1), uids(2, threshold=0.3)
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == 2


# ------------------------------------------------------------------------------------------- frames, and slices askew


def measures_of(*numbers: int) -> list[Measures]:
    return [Measures(n, 0, 0, 0, "left", "upper", 1, 2, 2, 2, 3, 4, "solid", 0.5) for n in numbers]


def test_frames_of_one_file_keep_their_order(tmp_path):
    path = save(multi_frame((2, 0, 3, 1), FrameOfReferenceUID=FRAME, InstanceNumber=1), tmp_path / "ct.dcm")
    ranks = np.zeros((4, 6, 5), np.uint16)
    ranks[1, 2, 3] = ranks[2, 2:4, 3] = 1
    stack = DicomReader().stack(path)
    write_dicom_results(tmp_path / "seg.dcm", tmp_path / "sr.dcm", stack, ranks, measures_of(1), FACTS)
    data = pydicom.dcmread(tmp_path / "seg.dcm")
    found = {}
    for frame, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        place = group.PlanePositionSequence[0].ImagePositionPatient
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        found[float(place[2])] = (int(frame.sum()), int(source.ReferencedFrameNumber))
    assert found == {-8.0: (1, 4), -6.0: (2, 1)}  # the frames at these places are the last and the first


def test_nodule_without_a_voxel_in_the_scan_is_left_out_and_the_others_keep_their_numbers(tmp_path):
    stack = DicomReader().stack(write_series(tmp_path / "ct", FrameOfReferenceUID=FRAME))
    ranks = np.zeros((4, 6, 5), np.uint16)
    ranks[1, 2, 3] = 2
    paths = tmp_path / "seg.dcm", tmp_path / "sr.dcm"
    write_dicom_results(*paths, stack, ranks, measures_of(1, 2), FACTS)
    assert [segment.SegmentLabel for segment in pydicom.dcmread(paths[0]).SegmentSequence] == ["Nodule 2"]
    with pytest.raises(InputError, match="no nodule has a voxel"):
        write_dicom_results(*paths, stack, ranks, measures_of(1), FACTS)


def test_labels_of_a_tilted_gantry_come_to_lie_on_its_slices(tmp_path):
    angle, step, spacing = np.deg2rad(20), 2.0, (0.8, 0.7)
    columns = [0.0, np.cos(angle), -np.sin(angle)]
    for number in range(12):
        pixels = np.zeros((16, 10), np.int16)
        changes = {"ImageOrientationPatient": [1, 0, 0, *columns], "GantryDetectorTilt": -20.0}
        save(slice_of(number, pixels=pixels, **changes), tmp_path / f"{number}.dcm")
    stack, image = DicomReader().stack(tmp_path), read_scan(tmp_path)
    geometry = Geometry.from_image(image)
    center = np.array([-20, 30, -10]) + 5 * step * np.eye(3)[2] + 8 * spacing[1] * np.array(columns)
    center[0] += 4 * spacing[0]
    index = np.stack(np.indices(geometry.shape_zyx), axis=-1)
    ranks = (np.linalg.norm(geometry.world(index) - center, axis=-1) <= 3).astype(np.uint16)
    labels = _on_slices(stack, ranks)
    assert labels.shape == (12, 16, 10)
    assert np.argwhere(labels).mean(axis=0) == pytest.approx([5, 8, 4], abs=0.3)
    axes = np.column_stack([[spacing[0], 0, 0], spacing[1] * np.array(columns), [0, 0, step]])
    volume = labels.sum() * abs(np.linalg.det(axes))
    assert volume == pytest.approx(ranks.sum() * geometry.voxel_volume_mm3, rel=0.15)


def test_uids_are_valid():
    assert dicom_results.OWN_CODES.startswith("99")  # as DICOM wants private coding schemes
    assert len(generate_uid(entropy_srcs=["a"])) <= 64
