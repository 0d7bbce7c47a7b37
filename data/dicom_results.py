"""Results as DICOM objects beside a DICOM series: a segmentation, and a measurement report (TID 1500).

Both belong to the study of the series and name its images, so that a PACS shows them with it. They bear the patient's
name and ID, as the series does. They need highdicom, which is optional.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from data.dicom import Stack
from data.measures import Measures
from model import EXTRAS
from utils import InputError, atomic_path, check

logger = logging.getLogger(__name__)

HIGHDICOM = "highdicom>=0.24"
NAME, MAKER = "LUNA16 lung nodule segmentation with a 3D U-Net", "research software, not a medical device"
SERIES_NUMBERS = {"segmentation": 9001, "report": 9002}
# What a series may lack that an object which refers to it must state, if only as empty.
PATIENT_AND_STUDY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
OWN_CODES = "99LUNAUNET"  # a coding scheme of this project, for what no public one names


@cache
def has_highdicom() -> bool:
    """Whether the optional library is there; it is told once where it is not."""
    try:
        import highdicom  # noqa: F401
    except ImportError:
        logger.warning("no DICOM segmentation and no DICOM report are written: pip install '%s'", HIGHDICOM)
        return False
    return True


def write_dicom_results(
    segmentation_path: Path,
    report_path: Path,
    stack: Stack,
    ranks: np.ndarray,
    measures: Sequence[Measures],
    provenance: Mapping[str, Any],
) -> None:
    """Writes the nodules of a scan as a DICOM segmentation, one segment a nodule, and their measures as a report.

    Args:
        segmentation_path: File of the segmentation.
        report_path: File of the report.
        stack: The images of the series.
        ranks: Whole numbers (z, y, x) on the scan's grid: 1 is the first nodule, 0 is background.
        measures: Of the nodules, in their order.
        provenance: Whose results these are.

    Raises:
        InputError: The headers of the series are not as such an object needs them, or no nodule has a voxel there.
    """
    import highdicom

    images, frames = _images_of(stack, ranks)
    numbers = [measure.nodule for measure in measures if (frames == measure.nodule).any()]
    check(bool(numbers), "no nodule has a voxel in the scan's own grid")
    missing = [name for name in ("StudyInstanceUID", "FrameOfReferenceUID") if not images[0].get(name)]
    check(not missing, f"the series states no {' and no '.join(missing)}")
    kept = [measure for measure in measures if measure.nodule in numbers]
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells each step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a patient's name, which no log should show
        try:
            segmentation = _segmentation(highdicom, images, frames, kept, provenance)
            report = _report(highdicom, images, segmentation, kept, provenance)
        except Exception as error:  # whatever highdicom and pydicom raise of headers that are not as DICOM wants them
            raise InputError(f"highdicom does not accept the headers of the series ({type(error).__name__})") from error
    for path, data in ((segmentation_path, segmentation), (report_path, report)):
        with atomic_path(path) as temporary:
            data.save_as(temporary)


def _images_of(stack: Stack, ranks: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Headers of the images of a series, and the labels (n, rows, columns) of each image or frame, in their order."""
    import pydicom

    labels = _on_slices(stack, ranks)
    paths = list(dict.fromkeys(image.path for image in stack.slices))
    images = [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in paths]
    for image in images:
        for name in PATIENT_AND_STUDY:
            if name not in image:
                setattr(image, name, "")
        if not image.get("LossyImageCompression"):
            image.LossyImageCompression = "00"
    if len(paths) == 1:  # frames of one file, whose numbers count from 1
        labels = labels[np.argsort([int(image.number) for image in stack.slices])]
    return images, labels


def _on_slices(stack: Stack, ranks: np.ndarray) -> np.ndarray:
    """Labels (z, y, x) of the scan's grid at the voxels of the slices, which lie askew where the gantry was tilted."""
    if stack.to_index is None:
        return ranks
    shape = (len(stack.slices), *stack.slices[0].size)
    to_world = np.linalg.inv(stack.to_index[:, :3])
    labels = np.zeros(shape, ranks.dtype)
    y, x = np.mgrid[: shape[1], : shape[2]]
    for z, plane in enumerate(labels):
        world = (np.stack([x, y, np.full_like(x, z)], axis=-1) - stack.to_index[:, 3]) @ to_world.T
        index = np.rint(stack.geometry.index(world)).astype(int)
        inside = ((index >= 0) & (index < ranks.shape)).all(axis=-1)
        plane[inside] = ranks[tuple(index[inside].T)]
    return labels


def _uid(kind: str, images: Sequence[Any], frames: np.ndarray, provenance: Mapping[str, Any]) -> str:
    """A UID that the same results have each time, and no others."""
    from pydicom.uid import generate_uid

    digest = hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()
    settings = [str(provenance["checkpoint_sha256"]), *map(str, _parameters(provenance).values())]
    return str(generate_uid(entropy_srcs=[kind, str(images[0].SeriesInstanceUID), digest, *settings]))


def _identity(kind: str, images: Sequence[Any], frames: np.ndarray, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an object of a kind in SERIES_NUMBERS, and its series, from others."""
    return {
        "series_instance_uid": _uid(f"series of {kind}", images, frames, provenance),
        "series_number": SERIES_NUMBERS[kind],
        "sop_instance_uid": _uid(kind, images, frames, provenance),
        "instance_number": 1,
        "manufacturer": MAKER,
    }


def _parameters(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what is found."""
    names = ("threshold", "min_score", "mirrors", *EXTRAS)
    return {name: provenance[name] for name in names if name in provenance}


def _segmentation(
    highdicom: Any,
    images: Sequence[Any],
    frames: np.ndarray,
    measures: Sequence[Measures],
    provenance: Mapping[str, Any],
) -> Any:
    from pydicom.sr.codedict import codes

    version, parameters = str(provenance["checkpoint_sha256"])[:16], _parameters(provenance)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        NAME, codes.DCM.ArtificialIntelligence, version, parameters={name: str(v) for name, v in parameters.items()}
    )
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=position,
            segment_label=f"Nodule {measure.nodule}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Nodule,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=_uid(f"nodule {measure.nodule}", images, frames, provenance),
            tracking_id=f"nodule {measure.nodule}",
            anatomic_regions=[codes.SCT.Lung],
        )
        for position, measure in enumerate(measures, start=1)
    ]
    labels = np.zeros(int(frames.max()) + 1, np.uint16)
    labels[[measure.nodule for measure in measures]] = np.arange(1, len(measures) + 1)
    return highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=labels[frames],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        **_identity("segmentation", images, frames, provenance),
        manufacturer_model_name=NAME,
        software_versions=version,
        device_serial_number="none",
        content_label="NODULES",
        content_description="Lung nodules found by a network; not a medical device",
        series_description="Lung nodules, found by a network",
    )


def _report(
    highdicom: Any,
    images: Sequence[Any],
    segmentation: Any,
    measures: Sequence[Measures],
    provenance: Mapping[str, Any],
) -> Any:
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    sr = highdicom.sr
    frames = segmentation.pixel_array
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_uid("device", images, np.zeros(0), provenance), name=NAME, manufacturer_name=MAKER
        ),
    )
    settings = [f"{name}: {value}" for name, value in _parameters(provenance).items()]
    algorithm = sr.AlgorithmIdentification(NAME, str(provenance["checkpoint_sha256"])[:16], settings)
    groups = []
    for position, measure in enumerate(measures, start=1):
        sides = {"left": codes.SCT.Left, "right": codes.SCT.Right}
        groups.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(
                    uid=segmentation.SegmentSequence[position - 1].TrackingUID, identifier=f"nodule {measure.nodule}"
                ),
                referenced_segment=sr.ReferencedSegment(
                    segmentation.SOPClassUID,
                    segmentation.SOPInstanceUID,
                    position,
                    source_series=sr.SourceSeriesForSegmentation(images[0].SeriesInstanceUID),
                ),
                algorithm_id=algorithm,
                finding_type=codes.SCT.Nodule,
                finding_sites=[sr.FindingSite(codes.SCT.Lung, laterality=sides.get(measure.side))],
                measurements=_measurements(sr, codes, Code, measure),
                qualitative_evaluations=[
                    sr.QualitativeEvaluation(
                        Code("DENSITY", OWN_CODES, "Density of nodule"),
                        Code(density.upper().replace(" ", "_"), OWN_CODES, density),
                    )
                    for density in [measure.density]
                    if density
                ],
            )
        )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=Code("169069000", "SCT", "CT of chest"),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    return sr.Comprehensive3DSR(
        evidence=[*images, segmentation],
        content=content,
        **_identity("report", images, frames, provenance),
        is_complete=True,
        is_verified=False,
        series_description="Lung nodules, measured by a network",
    )


def _measurements(sr: Any, codes: Any, code: Any, measure: Measures) -> list[Any]:
    """All numbers of a nodule that are known, with their units."""
    mm, own = codes.UCUM.Millimeter, OWN_CODES
    inner = code("INNER_ATTENUATION", own, "Attenuation more than 1 mm inside")
    rows = [
        (codes.SCT.Volume, measure.volume_mm3, codes.UCUM.CubicMillimeter, None),
        (
            code("EQUIVALENT_DIAMETER", own, "Diameter of the ball of equal volume"),
            measure.equivalent_diameter_mm,
            mm,
            None,
        ),
        (codes.SCT.LongAxis, measure.longest_axial_mm, mm, None),
        (codes.SCT.ShortAxis, measure.across_axial_mm, mm, None),
        (inner, measure.mean_hu, codes.UCUM.HounsfieldUnit, codes.SCT.Mean),
        (code("EDGE_DISTANCE", own, "Distance to the edge of the lungs"), measure.distance_to_lung_edge_mm, mm, None),
        (code("NODULE_SCORE", own, "Score of the network, 0 to 1"), measure.score, codes.UCUM.NoUnits, None),
    ]
    return [
        sr.Measurement(name, round(value, 4), unit, derivation=derivation)
        for name, value, unit, derivation in rows
        if np.isfinite(value)
    ]
