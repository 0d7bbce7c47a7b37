"""Nodule masks of any data set: which of them belong to which scan, and which nodules they show.

A mask is a volume of labels in any format that ``read_scan`` takes, on the scan's grid or another one; a DICOM
segmentation (SEG); or a segmentation of 3D Slicer (``.seg.nrrd``).
"""

from __future__ import annotations

import fnmatch
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.dicom import class_of, import_pydicom
from data.formats import SEGMENTATION, NrrdReader
from utils import (
    Box,
    Geometry,
    InputError,
    Vector,
    check,
    is_zip,
    last_line,
    read_scan,
    resample,
    scan_reader,
    unpack,
    walk,
)

logger = logging.getLogger(__name__)

SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # bits or fractions; a map of labels
CONTOURS_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"  # RT structure set
LESION_CATEGORIES = ("49755003", "M-01000")  # 'morphologically altered structure', by SNOMED CT and by SRT
MOST_LABELS = 1000  # of a mask; a picture has more
MIN_EQUAL_GAPS = 2  # between the slices of a segmentation, for them to be its usual ones
LEAST_DIAMETER_MM = 2.0  # of a marked region that is a nodule; a smaller one is a slip of the brush
MOST_DIAMETER_MM = 150.0  # 1.8 litres


@dataclass(frozen=True)
class Segment:
    """What one label of a mask marks.

    Args:
        number: The label.
        name: Its name, '' where the mask gives none.
        is_lesion: Whether the mask calls it an altered structure, as a nodule, a mass or a tumour.
        lower: First voxel (z, y, x) of the box of ``inside`` in the mask's grid.
        inside: bool (z, y, x) of the smallest box around it.
    """

    number: int
    name: str
    is_lesion: bool
    lower: tuple[int, int, int]
    inside: np.ndarray

    @classmethod
    def of(cls, number: int, inside: np.ndarray, name: str = "", is_lesion: bool = False) -> Segment | None:
        """What is not 0 in an array (z, y, x) of the mask's grid; None where all of it is 0."""
        box = Box.around(inside)
        return None if box is None else cls(number, name, is_lesion, box.lower, inside[box.slices] != 0)

    @property
    def box(self) -> Box:
        """Its box in the mask's grid."""
        return Box.of_size(self.lower, self.inside.shape)

    def is_one_of(self, labels: Sequence[str]) -> bool:
        """Whether some label is its number or, as a pattern such as 'gtv*' and in any case, its name."""
        words = [str(label).strip().lower() for label in labels]
        return str(self.number) in words or any(fnmatch.fnmatchcase(self.name.strip().lower(), word) for word in words)


@dataclass(frozen=True)
class Mask:
    """One reader's mask.

    Args:
        geometry: Of its grid.
        segments: What its labels mark; labels without a voxel are left out.
    """

    geometry: Geometry
    segments: list[Segment]

    def chosen(self, labels: Sequence[str] | None) -> Mask:
        """With some labels alone; None takes those that are called lesions or, where none is, all."""
        lesions = [segment for segment in self.segments if segment.is_lesion]
        if labels is not None:
            return Mask(self.geometry, [segment for segment in self.segments if segment.is_one_of(labels)])
        return Mask(self.geometry, lesions or self.segments)


@dataclass(frozen=True)
class MarkedNodule:
    """A region that readers marked.

    Args:
        inside: bool (z, y, x) of a small box.
        geometry: Of that box.
    """

    inside: np.ndarray
    geometry: Geometry

    @property
    def center_xyz(self) -> Vector:
        """World position of the mean of its voxels, in mm."""
        x, y, z = self.geometry.world(np.argwhere(self.inside).mean(axis=0)).tolist()
        return x, y, z

    @property
    def diameter_mm(self) -> float:
        """Of the sphere of equal volume."""
        return 2 * (3 * self.inside.sum() * self.geometry.voxel_volume_mm3 / (4 * math.pi)) ** (1 / 3)

    def is_at(self, center_xyz: Vector, reach_mm: float) -> bool:
        """Whether a position lies in it, or within ``reach_mm`` of its middle."""
        index = np.rint(self.geometry.index(center_xyz)).astype(int)
        is_in_box = bool(((index >= 0) & (index < self.inside.shape)).all())
        apart = float(np.linalg.norm(np.subtract(center_xyz, self.center_xyz)))
        return (is_in_box and bool(self.inside[tuple(index)])) or apart < reach_mm


@dataclass(frozen=True)
class Marks:
    """What the masks of a scan show.

    Args:
        nodules: What more than half of the readers marked.
        doubtful: What fewer marked, and regions too small for a nodule: neither nodules nor background.
    """

    nodules: list[MarkedNodule]
    doubtful: list[MarkedNodule]

    @property
    def excluded(self) -> list[tuple[float, float, float, float]]:
        """Centre (x, y, z) and diameter in mm of the doubtful ones."""
        return [(*mark.center_xyz, max(mark.diameter_mm, LEAST_DIAMETER_MM)) for mark in self.doubtful]


# ------------------------------------------------------------------------------------------------- which belong where


def find_nodule_masks(folder: Path, scans: Mapping[str, Path]) -> dict[str, tuple[Path, ...]]:
    """The masks in a folder, wherever they lie in it, of each scan.

    A mask belongs to the scan whose name its own is, or begins with before another character than a letter or digit
    (``lung_001.nii.gz``, ``lung_001_reader2.nii.gz``, ``reader2/lung_001.nii.gz``); nnU-Net's ``_0000`` behind the name
    of a scan counts as nothing. A DICOM segmentation belongs to the series that it refers to. Several are those of
    several readers.

    Args:
        folder: Folder or .zip of masks. It may be that of the scans, where all masks are DICOM or .seg.nrrd.
        scans: {name: path} of the scans.

    Returns:
        {name: paths}, for the scans that have a mask.

    Raises:
        FileNotFoundError: The folder is missing.
        InputError: It holds no mask of any of the scans.
    """
    if not (folder.is_dir() or is_zip(folder)):
        raise FileNotFoundError(f"{folder} is not a folder; put the nodule masks there (see data/README.md)")
    owners = _owners(scans)
    found: dict[str, list[Path]] = {}
    strangers: list[Path] = []
    own_files = {path.absolute() for path in scans.values()}
    contours = 0
    for path in _walk_all(folder):
        name = mask_name(path)
        contours += class_of(path) == CONTOURS_CLASS
        if name is None or path.absolute() in own_files:
            continue
        owner = _owner(name, owners)
        if owner is None:
            strangers.append(path)
        else:
            found.setdefault(owner, []).append(path)
    if contours:
        logger.warning(
            "%d RT structure sets in %s are not read; convert them to DICOM segmentations or .nii.gz, e.g. by 3D "
            "Slicer or plastimatch",
            contours,
            folder,
        )
    check(
        bool(found),
        f"no mask in {folder} belongs to any of the {len(scans)} scans: a mask needs its scan's name, such as "
        f"{next(iter(scans), 'scan')}.nii.gz or {next(iter(scans), 'scan')}_reader1.nii.gz"
        + (f", not {strangers[0].name}" if strangers else ""),
    )
    if strangers:
        logger.warning(
            "%d masks in %s belong to no scan and are left out, such as %s", len(strangers), folder, strangers[0].name
        )
    if without := sorted(set(scans) - set(found)):
        logger.warning(
            "%d of %d scans have no nodule mask in %s, such as %s: they count as scans whose nodules are those of the "
            "table of annotations, or none",
            len(without),
            len(scans),
            folder,
            without[0],
        )
    return {name: tuple(sorted(paths)) for name, paths in found.items()}


def _walk_all(folder: Path) -> Iterator[Path]:
    """The files in a folder, and in the archives in it."""
    for path in walk(unpack(folder) if is_zip(folder) else folder):
        if is_zip(path):
            yield from _walk_all(path)
        elif path.is_file():
            yield path


def mask_name(path: Path) -> str | None:
    """Name of the scan that a mask is for, or one that begins with it; None for a file that is no mask.

    Raises:
        InputError: A DICOM segmentation refers to no series.
    """
    if class_of(path) in SEG_CLASSES:
        return _referred_series(path)
    if class_of(path) is not None:
        return None
    try:
        name = scan_reader(path).name(path)
    except (InputError, FileNotFoundError):
        return None
    return re.sub(r"\.seg$", "", name, flags=re.IGNORECASE)


def _referred_series(path: Path) -> str:
    """UID of the series that a DICOM segmentation was drawn on."""
    data = import_pydicom().dcmread(path, specific_tags=["ReferencedSeriesSequence"], stop_before_pixels=True)
    series = data.get("ReferencedSeriesSequence") or []
    check(bool(series), f"{path} does not say which series it was drawn on (no ReferencedSeriesSequence)")
    return str(series[0].SeriesInstanceUID)


def _owners(scans: Iterable[str]) -> dict[str, str]:
    """{beginning of the names of masks: scan}."""
    return {name.removesuffix("_0000"): name for name in scans} | {name: name for name in scans}


def _owner(name: str, owners: Mapping[str, str]) -> str | None:
    """The scan with the longest name that a mask's name is or begins with."""
    starts = [match.start() for match in re.finditer(r"[^A-Za-z0-9]", name)]
    return next((owners[name[:end]] for end in [len(name), *reversed(starts)] if name[:end] in owners), None)


# ------------------------------------------------------------------------------------------------------------ reading


def read_marks(paths: Sequence[Path], labels: Sequence[str] | None = None) -> Marks:
    """The nodules that the masks of one scan show.

    Of one mask each label is a nodule or, where it has one label, each connected region. Of several readers' masks a
    voxel is nodule where more than half of the readers marked it, and each connected region of these is one; what has
    no such voxel is in doubt.

    Args:
        paths: A mask a reader.
        labels: Numbers, and names or patterns of names such as 'gtv*', of the labels that are nodules. None takes
            those that a DICOM segmentation calls lesions, or else all.

    Raises:
        FileNotFoundError: A file is missing.
        InputError: A file is no mask, or marks what is too large for a nodule.
    """
    masks = [read_mask(path).chosen(labels) for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        _check_sizes(path, mask)
    masks = [mask for mask in masks if mask.segments] if len(masks) == 1 else masks
    if not any(mask.segments for mask in masks):
        return Marks([], [])
    geometry = masks[0].geometry
    if len(masks) == 1 and len(masks[0].segments) > 1:
        return _sort_out([MarkedNodule(part.inside, geometry.cropped(part.box)) for part in masks[0].segments])
    lower, votes = _count_votes(masks)
    agreed = votes > len(masks) / 2
    local = geometry.cropped(Box.of_size(lower, votes.shape))
    marks = _sort_out(_regions(agreed, local))
    disputed = [region for region in _regions(votes > 0, local) if not _overlaps(region, agreed, local)]
    return Marks(marks.nodules, marks.doubtful + disputed)


def _check_sizes(path: Path, mask: Mask) -> None:
    """Refuses what is too large for a nodule."""
    for segment in mask.segments:
        ml = segment.inside.sum() * mask.geometry.voxel_volume_mm3 / 1000
        named = f"{segment.number}" + f" ({segment.name})" * bool(segment.name)
        check(
            ml <= math.pi / 6 * MOST_DIAMETER_MM**3 / 1000,
            f"{path}: label {named} marks {ml / 1000:.1f} litres, which is no nodule; name those that are nodules by "
            "nodule_labels, e.g. '[1]' or '[gtv*]'",
        )


def _sort_out(regions: list[MarkedNodule]) -> Marks:
    """Regions of a nodule's size, and smaller ones."""
    large = [region for region in regions if region.diameter_mm >= LEAST_DIAMETER_MM]
    return Marks(large, [region for region in regions if region.diameter_mm < LEAST_DIAMETER_MM])


def _regions(inside: np.ndarray, geometry: Geometry) -> list[MarkedNodule]:
    """The connected regions of an array (z, y, x)."""
    numbers = cc3d.connected_components(inside, connectivity=26)
    boxes = cc3d.statistics(numbers)["bounding_boxes"][1:]
    return [
        MarkedNodule(numbers[slices] == number, geometry.cropped(Box(*_ends(slices))))
        for number, slices in enumerate(boxes, start=1)
        if (numbers[slices] == number).any()
    ]


def _ends(slices: tuple[slice, slice, slice]) -> tuple[Any, Any]:
    """First voxel of a box, and one past its last."""
    return tuple(int(part.start) for part in slices), tuple(int(part.stop) for part in slices)


def _overlaps(region: MarkedNodule, inside: np.ndarray, geometry: Geometry) -> bool:
    """Whether a region holds a voxel that is set in an array whose voxels lie on the same grid."""
    lower = np.rint(geometry.index(region.geometry.origin)).astype(int)
    return bool((inside[Box.of_size(lower, region.inside.shape).slices] & region.inside).any())


def _count_votes(masks: Sequence[Mask]) -> tuple[np.ndarray, np.ndarray]:
    """First voxel of a box in the grid of the first mask, and in it the number of readers who marked each voxel."""
    grid = masks[0].geometry
    marked = [[_on_grid(segment, mask.geometry, grid) for segment in mask.segments] for mask in masks]
    boxes = [segment.box for segments in marked for segment in segments if segment is not None]
    if not boxes:
        return np.zeros(3, int), np.zeros((1, 1, 1), np.uint8)
    lower, upper = np.min([box.lower for box in boxes], axis=0), np.max([box.upper for box in boxes], axis=0)
    votes = np.zeros(upper - lower, np.uint8)
    for segments in marked:
        own = np.zeros(votes.shape, bool)
        for segment in filter(None, segments):
            own[Box.of_size(segment.lower - lower, segment.inside.shape).slices] |= segment.inside
        votes += own
    return lower, votes


def _on_grid(segment: Segment, geometry: Geometry, grid: Geometry) -> Segment | None:
    """A segment of a mask on another grid; None where nothing of it lies there."""
    if _is_same(geometry, grid):
        return segment
    local = geometry.cropped(segment.box)
    corners = grid.index(local.world(list(np.ndindex(2, 2, 2)) * (np.asarray(local.shape_zyx) - 1)))
    lower = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, grid.shape_zyx)
    upper = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 2, 0, grid.shape_zyx)
    if (upper <= lower).any():
        return None
    box = Box.of_size(lower, upper - lower)
    image = local.image(segment.inside.astype(np.uint8))
    inside = sitk.GetArrayFromImage(resample(image, grid.cropped(box), linear=False, pixel_type=sitk.sitkUInt8))
    moved = Segment.of(segment.number, inside, segment.name, segment.is_lesion)
    if moved is None:
        return None
    z, y, x = (int(a + b) for a, b in zip(box.lower, moved.lower, strict=True))
    return Segment(moved.number, moved.name, moved.is_lesion, (z, y, x), moved.inside)


def _is_same(one: Geometry, other: Geometry) -> bool:
    """Whether two grids have the same voxels."""
    corners = np.array([[0, 0, 0], np.asarray(one.shape_zyx) - 1])
    return one.shape_zyx == other.shape_zyx and np.allclose(one.world(corners), other.world(corners), atol=0.01)


def read_mask(path: Path) -> Mask:
    """Reads one mask with all its labels.

    Raises:
        FileNotFoundError: The file is missing.
        InputError: It is no mask: its values are no labels, or it does not say where its voxels lie.
    """
    if class_of(path) in SEG_CLASSES:
        return _read_dicom(path)
    if path.name.lower().endswith(SEGMENTATION):
        return _read_slicer(path)
    image = read_scan(path, constant=True)
    return Mask(Geometry.from_image(image), list(_split_labels(path, sitk.GetArrayViewFromImage(image))))


def _split_labels(path: Path, labels: np.ndarray) -> Iterator[Segment]:
    """A segment for each label of an array (z, y, x)."""
    box = Box.around(labels)
    if box is None:
        return
    inside = labels[box.slices]
    numbers = np.unique(inside[inside != 0])
    is_whole = labels.dtype.kind in "iu" or bool((numbers == np.rint(numbers)).all())
    check(
        is_whole and len(numbers) <= MOST_LABELS and numbers[0] > 0,
        f"{path} is no mask of labels: it holds {len(numbers)} values from {numbers[0]:g} to {numbers[-1]:g} beside 0; "
        "labels are whole numbers from 1 on",
    )
    for number in numbers.tolist():
        segment = Segment.of(int(number), inside == number)
        assert segment is not None
        lower = tuple(int(a + b) for a, b in zip(box.lower, segment.lower, strict=True))
        yield Segment(segment.number, "", False, lower, segment.inside)  # type: ignore[arg-type]


def _read_slicer(path: Path) -> Mask:
    """A segmentation of 3D Slicer, whose overlapping segments lie in several layers."""
    NrrdReader().check_place(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO")
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read; save it again ({last_line(error)})") from error
    check(image.GetDimension() == 3, f"{path} must hold a volume of labels or layers of them; save it again")
    geometry, values = Geometry.from_image(image), sitk.GetArrayViewFromImage(image)
    layers = values if values.ndim == 4 else values[..., None]
    fields = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    numbers = sorted(int(match[1]) for key in fields if (match := re.fullmatch(r"Segment(\d+)_LabelValue", key)))
    if not numbers:
        check(layers.shape[-1] == 1, f"{path} does not say what its {layers.shape[-1]} layers are; save it again")
        return Mask(geometry, list(_split_labels(path, layers[..., 0])))
    segments = []
    for number in numbers:
        label, layer = int(fields[f"Segment{number}_LabelValue"]), int(fields.get(f"Segment{number}_Layer", 0))
        name = fields.get(f"Segment{number}_Name", "")
        segments.append(Segment.of(label, layers[..., layer] == label, name))
    return Mask(geometry, [segment for segment in segments if segment is not None])


def _read_dicom(path: Path) -> Mask:
    """A DICOM segmentation: a frame holds one slice of one segment, or of a map of labels."""
    file = _DicomSegmentation(path)
    frames, (geometry, index_z) = file.frames(), file.places()
    kind, most = file.data.SegmentationType, float(file.data.get("MaximumFractionalValue", 1))
    segments = []
    for described in file.data.SegmentSequence:
        number, volume = int(described.SegmentNumber), np.zeros(geometry.shape_zyx, bool)
        for frame, group, z in zip(frames, file.groups, index_z, strict=True):
            if kind == "LABELMAP":
                volume[z] |= frame == number
            elif int(file.value(group, "SegmentIdentificationSequence", "ReferencedSegmentNumber")) == number:
                volume[z] |= frame > (most / 2 if kind == "FRACTIONAL" else 0)
        category = described.get("SegmentedPropertyCategoryCodeSequence") or [{}]
        is_lesion = str(category[0].get("CodeValue", "")) in LESION_CATEGORIES
        segments.append(Segment.of(number, volume, str(described.get("SegmentLabel", "")), is_lesion))
    return Mask(geometry, [segment for segment in segments if segment is not None])


class _DicomSegmentation:
    """The file of a DICOM segmentation.

    Args:
        path: It.

    Raises:
        UserError: pydicom is missing.
        InputError: It says nothing of the places of its frames.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, import_pydicom().dcmread(path)
        self.shared = (self.data.get("SharedFunctionalGroupsSequence") or [{}])[0]
        self.groups = self.data.get("PerFrameFunctionalGroupsSequence") or []
        count = int(self.data.get("NumberOfFrames") or 1)
        check(len(self.groups) == count, f"{path} says nothing of the places of its {count} frames")

    def frames(self) -> np.ndarray:
        """The frames (n, rows, columns) as they are stored."""
        try:
            frames = self.data.pixel_array
        except Exception as error:  # whatever pydicom and its decoders raise
            raise InputError(f"{self.path}: its frames cannot be read ({' '.join(str(error).split())})") from error
        return frames.reshape(len(self.groups), *frames.shape[-2:])

    def value(self, group: Any, sequence: str, name: str) -> Any:
        """An attribute of a frame, or of all of them."""
        found = self.optional(group, sequence, name)
        check(found is not None, f"{self.path} does not state the {name} of its frames")
        return found

    def optional(self, group: Any, sequence: str, name: str) -> Any:
        """The same; None where it is not stated."""
        items = group.get(sequence) or self.shared.get(sequence)
        return items[0].get(name) if items else None

    def places(self) -> tuple[Geometry, np.ndarray]:
        """The grid from the lowest to the highest frame along their normal, and (n,) the slice of each frame."""
        orientation = [
            self.value(group, "PlaneOrientationSequence", "ImageOrientationPatient") for group in self.groups
        ]
        cosines = np.array(orientation, float)
        check(np.allclose(cosines, cosines[0], atol=1e-3), f"{self.path}: its frames lie in several directions")
        row, column = cosines[0].reshape(2, 3)
        normal = np.cross(row, column)
        places = [self.value(group, "PlanePositionSequence", "ImagePositionPatient") for group in self.groups]
        positions = np.array(places, float)
        heights = positions @ normal
        step = self._step(np.unique(np.round(heights, 3)))
        index_z = np.rint((heights - heights.min()) / step).astype(int)
        check(
            np.allclose(heights.min() + index_z * step, heights, atol=0.1 * step),
            f"{self.path}: its frames are not evenly spaced; save it on the grid of its series",
        )
        shape = int(index_z.max()) + 1, int(self.data.Rows), int(self.data.Columns)
        spacing_y, spacing_x = map(float, self.value(self.groups[0], "PixelMeasuresSequence", "PixelSpacing"))
        x, y, z = positions[heights.argmin()].tolist()
        direction = np.stack([row, column, normal], axis=1).ravel().tolist()
        return Geometry(shape, (x, y, z), (spacing_x, spacing_y, step), tuple(direction)), index_z

    def _step(self, heights: np.ndarray) -> float:
        """Distance of the slices in mm; those without a mark may have been left out.

        Args:
            heights: Different heights of frames along their normal, rising.
        """
        stated, thickness = (
            abs(float(self.optional(self.groups[0], "PixelMeasuresSequence", name) or 0))
            for name in ("SpacingBetweenSlices", "SliceThickness")
        )
        if stated:
            return stated
        gaps = np.diff(heights)
        check(len(gaps) > 0 or thickness > 0, f"{self.path} has one slice and does not say how thick it is")
        if len(gaps) == 0:
            return thickness
        smallest = float(gaps.min())
        is_common = np.isclose(gaps, smallest, rtol=0.02).sum() >= MIN_EQUAL_GAPS
        is_multiple = thickness > 0 and abs(smallest / thickness - round(smallest / thickness)) < 0.1
        return thickness if is_multiple and smallest > thickness and not is_common else smallest
