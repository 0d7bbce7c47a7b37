"""Nodule masks of any data set: which of them belong to which scan, and which nodules they show.

A mask is a volume of labels in any format that ``read_scan`` takes, on the scan's grid or another one; a DICOM
segmentation (SEG); or a segmentation of 3D Slicer (``.seg.nrrd``).
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.dicom import FrameGroups, class_of, import_pydicom
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
    sphere_diameter,
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
APART_MM = 5.0  # parts of one label whose boxes lie so far from each other are several nodules
MOST_PARTS = 200  # of one label; of more, each is a nodule
SAME_NODULE_MM = 3.0  # an annotation this near to what a mask marks is of that nodule
MOST_BALLS = 30  # that a finding in doubt is covered with ...
ENOUGH_COVERED = 0.8  # ... up to this share of it
MOST_SHIFT = 0.75  # voxel edges, by which a mask may lie beside its scan
MOST_RIM_MM = 3.0  # how far readers may differ about where a nodule ends
ON_EDGE = 0.01  # voxel edges, by which a voxel's centre may lie outside of a region and still count as in it
MAX_ROUNDING = 1e-3  # of labels that were stored as scaled numbers
MIN_LEVELS = 3  # labels, from which on they may be levels of a picture
MOST_NESTED = 0.5  # of the labels that may lie within another one, and of the voxels that may touch one
USUAL_STEP_MM = 5.0  # slices are seldom further apart


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

    def moved(self, offset_zyx: npt.ArrayLike) -> Segment:
        """The same so many voxels further."""
        z, y, x = (int(size) for size in np.add(self.lower, offset_zyx))
        return replace(self, lower=(z, y, x))

    def is_one_of(self, labels: Sequence[str]) -> bool:
        """Whether some label is its number or, as a pattern such as 'gtv*' and in any case, its name."""
        words, name = [label.strip().lower() for label in labels], self.name.strip().lower()
        return str(self.number) in words or name in words or any(fnmatch.fnmatchcase(name, word) for word in words)

    def __str__(self) -> str:
        return f"{self.number}" + f" ({self.name})" * bool(self.name)


@dataclass(frozen=True)
class Mask:
    """One reader's mask.

    Args:
        geometry: Of its grid.
        segments: What its labels mark; labels without a voxel are left out.
    """

    geometry: Geometry
    segments: list[Segment]

    def chosen(self, labels: Sequence[str] | None, has_lesions: bool) -> Mask:
        """With some labels alone; None takes all or, where ``has_lesions``, those that are called lesions."""
        if labels is not None:
            return Mask(self.geometry, [segment for segment in self.segments if segment.is_one_of(labels)])
        return Mask(self.geometry, [segment for segment in self.segments if segment.is_lesion or not has_lesions])


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
        """World position of the mean of its voxels, in mm; where that is none of them, of the nearest one."""
        voxels = np.argwhere(self.inside)
        middle = voxels.mean(axis=0)
        if not self.inside[tuple(np.rint(middle).astype(int))]:
            apart = (voxels - middle) * self.geometry.spacing_zyx
            middle = voxels[np.square(apart).sum(axis=1).argmin()]
        x, y, z = self.geometry.world(middle).tolist()
        return x, y, z

    @property
    def diameter_mm(self) -> float:
        """Of the sphere of equal volume."""
        return sphere_diameter(float(self.inside.sum()) * self.geometry.voxel_volume_mm3)

    def distance_mm(self, position_xyz: Vector) -> float:
        """Of a position from its nearest voxel."""
        voxels = self.geometry.world(np.argwhere(self.inside))
        return float(np.linalg.norm(voxels - position_xyz, axis=1).min())

    def balls(self) -> list[tuple[float, float, float, float]]:
        """Centres (x, y, z) and diameters in mm of balls that cover it: one where it is round, or else those in it."""
        voxels = np.argwhere(self.inside)
        places = self.geometry.world(voxels)
        whole = (*self.center_xyz, max(self.diameter_mm, LEAST_DIAMETER_MM))
        if (np.linalg.norm(places - whole[:3], axis=1) <= whole[3] / 2).mean() >= ENOUGH_COVERED:
            return [whole]
        depth_mm = ndimage.distance_transform_edt(np.pad(self.inside, 1), sampling=self.geometry.spacing_zyx)
        depths, least = depth_mm[tuple(voxels.T + 1)], (1 - ENOUGH_COVERED) * len(voxels)
        balls: list[tuple[float, float, float, float]] = []
        while len(places) > least and len(balls) < MOST_BALLS:
            deepest = depths.argmax()
            center, radius = places[deepest], max(float(depths[deepest]), LEAST_DIAMETER_MM / 2)
            balls.append((*center.tolist(), 2 * radius))
            left = np.linalg.norm(places - center, axis=1) > radius
            places, depths = places[left], depths[left]
        return balls


@dataclass(frozen=True)
class Marks:
    """What the masks of a scan show.

    Args:
        nodules: What more than half of the readers marked.
        doubtful: What fewer marked, and regions too small for a nodule: neither nodules nor background.
        note: What is to be said of the masks.
    """

    nodules: list[MarkedNodule]
    doubtful: list[MarkedNodule]
    note: str = ""

    @property
    def excluded(self) -> list[tuple[float, float, float, float]]:
        """Centres (x, y, z) and diameters in mm of balls that fill the doubtful ones."""
        return [ball for mark in self.doubtful for ball in mark.balls()]

    def assign(self, centers_xyz: Sequence[Vector]) -> list[MarkedNodule | None]:
        """The nodule of each annotated position: the one that it lies in, or the nearest within SAME_NODULE_MM.

        No nodule is that of two positions; the nearest pairs come first.
        """
        pairs = [
            (distance, position, nodule)
            for position, center in enumerate(centers_xyz)
            for nodule, mark in enumerate(self.nodules)
            if (distance := mark.distance_mm(center)) < SAME_NODULE_MM
        ]
        found: dict[int, int] = {}
        for _, position, nodule in sorted(pairs):
            if position not in found and nodule not in found.values():
                found[position] = nodule
        return [self.nodules[found[position]] if position in found else None for position in range(len(centers_xyz))]


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
    unread: Counter[str] = Counter()
    own_files = {path.resolve() for path in scans.values()}
    for path in _walk_all(folder):
        if path.resolve() in own_files:
            continue
        owner, reason = _owner_of(path, owners)
        if reason:
            unread[reason] += 1
        elif owner is not None and owner in scans:
            found.setdefault(owner, []).append(path)
        elif owner is not None:
            strangers.append(path)
    for reason, count in unread.items():
        logger.warning("%d file(s) in %s left out: %s", count, folder, reason)
    example = next(iter(scans), "scan")
    check(
        bool(found),
        f"no mask in {folder} belongs to any of the {len(scans)} scans: a mask needs its scan's name, such as "
        f"{example}.nii.gz or {example}_reader1.nii.gz" + (f", not {strangers[0].name}" if strangers else ""),
    )
    _tell_belongings(folder, found, strangers, sorted(set(scans) - set(found)))
    return {name: tuple(sorted(paths)) for name, paths in found.items()}


def _tell_belongings(folder: Path, found: Mapping[str, list[Path]], strangers: list[Path], without: list[str]) -> None:
    """Says which masks belong to no scan, which scans have none, and which have several."""
    if strangers:
        logger.warning(
            "%d masks in %s belong to no scan and are left out, such as %s", len(strangers), folder, strangers[0].name
        )
    if without:
        logger.warning(
            "%d of %d scans have no nodule mask in %s, such as %s: they count as scans whose nodules are those of the "
            "table of annotations, or none",
            len(without),
            len(without) + len(found),
            folder,
            without[0],
        )
    numbers = [len(paths) for paths in found.values()]
    if max(numbers) > 1:
        most = max(found, key=lambda name: len(found[name]))
        is_even = min(numbers) == max(numbers)
        names = ", ".join(path.name for path in found[most][:3]) + ", ..." * (len(found[most]) > 3)
        logger.log(
            logging.INFO if is_even else logging.WARNING,
            "%s, as of several readers: %s has %s",
            f"each scan has {numbers[0]} masks" if is_even else f"scans have {min(numbers)} to {max(numbers)} masks",
            most,
            names,
        )


def _walk_all(folder: Path) -> Iterator[Path]:
    """The files in a folder, and in the archives in it."""
    for path in walk(unpack(folder) if is_zip(folder) else folder):
        if is_zip(path):
            yield from _walk_all(path)
        elif path.is_file():
            yield path


def mask_fingerprint(path: Path) -> Any:
    """What differs between masks and is read in no time; see ``ScanReader.fingerprint``."""
    if class_of(path) is None and not path.name.lower().endswith(SEGMENTATION):
        return scan_reader(path).fingerprint(path)
    return path.name, path.stat().st_size, path.stat().st_mtime_ns


def _owner_of(path: Path, owners: Mapping[str, str]) -> tuple[str | None, str]:
    """(scan, reason): whose mask a file is, another name for a mask of no scan, None for a file that is no mask.

    The reason says why a mask is left out; '' where it is not.
    """
    kind = class_of(path)
    if kind in SEG_CLASSES:
        data = import_pydicom().dcmread(path, specific_tags=["ReferencedSeriesSequence"], stop_before_pixels=True)
        series = data.get("ReferencedSeriesSequence") or []
        reason = "a DICOM segmentation that does not say which series it was drawn on; save it as .nii.gz"
        uid = series[0].get("SeriesInstanceUID") if series else None
        return (str(uid), "") if uid else (None, reason)
    if kind == CONTOURS_CLASS:
        return None, "RT structure sets are not read; convert them to DICOM segmentations or .nii.gz, e.g. by 3D Slicer"
    if kind is not None:
        return None, ""
    try:
        name = re.sub(r"\.seg$", "", scan_reader(path).name(path), flags=re.IGNORECASE)
    except (InputError, FileNotFoundError):
        return None, ""
    # A mask begins with its scan's name; a UID does not end before a number.
    ends = [match.start() for match in re.finditer(r"_|\.(?!\d)|[^\w.]", name)]
    return next((owners[name[:end]] for end in [len(name), *reversed(ends)] if name[:end] in owners), name), ""


def _owners(scans: Iterable[str]) -> dict[str, str]:
    """{beginning of the names of masks: scan}."""
    return {name.removesuffix("_0000"): name for name in scans} | {name: name for name in scans}


# ------------------------------------------------------------------------------------------------------------ reading


def read_marks(paths: Sequence[Path], labels: Sequence[str] | None, scan: Geometry) -> Marks:
    """The nodules that the masks of one scan show.

    Of one mask each label is a nodule, and so are parts of it whose boxes lie APART_MM or more from each other; of a
    mask with one label each connected region is a nodule. Several masks are those of several readers: a voxel is nodule
    where more than half of the masks mark it, and each connected region is one. Masks that share no voxel are of
    different nodules.

    Args:
        paths: The masks.
        labels: Numbers, and names or patterns of names such as 'gtv*', of the labels that are nodules. None takes
            those that a DICOM segmentation calls lesions, or else all.
        scan: Grid of the scan.

    Raises:
        FileNotFoundError: A file is missing.
        InputError: A file is no mask, or marks what is too large for a nodule.
    """
    whole = [read_mask(path) for path in paths]
    has_lesions = any(segment.is_lesion for mask in whole for segment in mask.segments)
    masks = [mask.chosen(labels, has_lesions) for mask in whole]
    for path, mask in zip(paths, masks, strict=True):
        _check_sizes(path, mask)
    notes = [_note_on_labels(whole, masks) if labels is not None else "", _note_on_places(whole, scan)]
    # A mask of other labels alone is no reader, an empty one is.
    readers = [own for mask, own in zip(whole, masks, strict=True) if own.segments or not mask.segments]
    if not any(mask.segments for mask in readers):
        return Marks([], [], "; ".join(filter(None, notes)))
    votes, grid = _count_votes(readers)
    share_nothing = votes.max() == 1 and all(mask.segments for mask in readers)
    if len(readers) > 1 and share_nothing:
        notes.append(f"its {len(readers)} masks share no voxel, so they are taken for masks of different nodules")
    if share_nothing:
        regions = [region for mask in readers for region in _nodules_of(mask)]
        nodules = [region for region in regions if region.diameter_mm >= LEAST_DIAMETER_MM]
        doubtful = [region for region in regions if region.diameter_mm < LEAST_DIAMETER_MM]
    else:
        nodules, doubtful = _settle(votes, len(readers) / 2, grid)
        if doubtful and not nodules:
            notes.append(f"its {len(readers)} masks agree on no place, so that nothing they mark is a nodule")
    return Marks(nodules, doubtful, "; ".join(filter(None, notes)))


def _nodules_of(mask: Mask) -> list[MarkedNodule]:
    """The regions that are nodules where there is no other mask."""
    apart_mm = APART_MM if len(mask.segments) > 1 else 0.0
    return [part for segment in mask.segments for part in _parts(segment, mask.geometry, apart_mm)]


def _note_on_labels(whole: Sequence[Mask], chosen: Sequence[Mask]) -> str:
    """Which labels masks hold that have none of those asked for."""
    others = [mask.segments for mask, own in zip(whole, chosen, strict=True) if mask.segments and not own.segments]
    named = ", ".join(sorted({str(segment) for segments in others for segment in segments})[:5])
    return f"{len(others)} of its {len(whole)} masks hold none of nodule_labels, but {named}" if others else ""


def _note_on_places(masks: Sequence[Mask], scan: Geometry) -> str:
    """Whether a mask of as many voxels as its scan lies elsewhere; another order of the axes is no other place."""
    ends = np.array(scan.bounds())
    for mask in masks:
        apart = float(np.abs(np.array(mask.geometry.bounds()) - ends).max())
        if sorted(mask.geometry.shape_zyx) == sorted(scan.shape_zyx) and apart > MOST_SHIFT * max(scan.spacing):
            return f"a mask has as many voxels as its scan and lies {apart:.1f} mm away; does its header belong to it?"
    return ""


def _check_sizes(path: Path, mask: Mask) -> None:
    """Refuses what is too large for a nodule."""
    for segment in mask.segments:
        ml = segment.inside.sum() * mask.geometry.voxel_volume_mm3 / 1000
        check(
            ml <= math.pi / 6 * MOST_DIAMETER_MM**3 / 1000,
            f"{path}: label {segment} marks {ml / 1000:.1f} litres, which is no nodule; name those that are nodules by "
            "nodule_labels, e.g. '[1]' or '[gtv*]'",
        )


def _parts(segment: Segment, geometry: Geometry, apart_mm: float) -> list[MarkedNodule]:
    """The connected regions of a segment; those whose boxes lie less than ``apart_mm`` from each other are one."""
    local = geometry.cropped(segment.box)
    numbers, boxes = _label(segment.inside)
    if not apart_mm or len(boxes) > MOST_PARTS:
        return _regions(segment.inside, local)
    group = np.arange(len(boxes))
    for one, other in itertools.combinations(range(len(boxes)), 2):
        if _gap_mm(boxes[one], boxes[other], geometry) < apart_mm:
            group[group == group[other]] = group[one]
    parts = []
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        box = _around([boxes[member] for member in members])
        parts.append(MarkedNodule(np.isin(numbers[box.slices], members + 1), local.cropped(box)))
    return parts


def _gap_mm(one: Box, other: Box, geometry: Geometry) -> float:
    """Widest distance along an axis between two boxes of voxels; 0 where they overlap."""
    gap = np.maximum(np.subtract(one.lower, other.upper), np.subtract(other.lower, one.upper))
    return float((np.maximum(gap, 0) * geometry.spacing_zyx).max())


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box around some boxes."""
    lower, upper = np.min([box.lower for box in boxes], axis=0), np.max([box.upper for box in boxes], axis=0)
    return Box.between(lower, upper)


def _label(inside: np.ndarray) -> tuple[np.ndarray, list[Box]]:
    """Numbers from 1 on of the connected regions of an array (z, y, x), and the box of each."""
    numbers = cc3d.connected_components(inside, connectivity=26)
    slices = cc3d.statistics(numbers)["bounding_boxes"][1:] if inside.any() else []
    corners = [([part.start for part in box], [part.stop - part.start for part in box]) for box in slices]
    return numbers, [Box.of_size(lower, shape) for lower, shape in corners]


def _regions(inside: np.ndarray, geometry: Geometry) -> list[MarkedNodule]:
    """The connected regions of an array (z, y, x) that lies on a grid."""
    numbers, boxes = _label(inside)
    return [
        MarkedNodule(numbers[box.slices] == number, geometry.cropped(box)) for number, box in enumerate(boxes, start=1)
    ]


def _count_votes(masks: Sequence[Mask]) -> tuple[np.ndarray, Geometry]:
    """Number of masks that mark each voxel (z, y, x) of a grid around all that they mark, and that grid.

    It has the voxels of the finest mask, so that no mask loses what it marks.
    """
    finest = min((mask.geometry for mask in masks if mask.segments), key=lambda grid: grid.voxel_volume_mm3)
    corners = [
        finest.index(mask.geometry.cropped(segment.box).corners()) for mask in masks for segment in mask.segments
    ]
    lower = np.ceil(np.min(corners, axis=(0, 1)) - ON_EDGE).astype(int)
    upper = np.floor(np.max(corners, axis=(0, 1)) + ON_EDGE).astype(int) + 1
    grid = finest.cropped(Box.between(lower, upper))
    votes = np.zeros(grid.shape_zyx, np.uint8)
    for mask in masks:
        own = np.zeros(votes.shape, bool)
        for segment in mask.segments:
            part = _on_grid(segment, mask.geometry, grid)
            if part is not None:
                own[part.box.slices] |= part.inside
        votes += own
    return votes, grid


def _settle(votes: np.ndarray, needed: float, grid: Geometry) -> tuple[list[MarkedNodule], list[MarkedNodule]]:
    """What is nodule, marked by more masks than ``needed``, and what is in doubt.

    Args:
        votes: Number of masks that mark each voxel (z, y, x).
        needed: See above.
        grid: Where the voxels lie.
    """
    nodules, doubtful = [], []
    numbers, boxes = _label(votes > 0)
    for number, box in enumerate(boxes, start=1):
        marked, local = numbers[box.slices] == number, grid.cropped(box)
        agreed = marked & (votes[box.slices] > needed)
        sure = [region for region in _regions(agreed, local) if region.diameter_mm >= LEAST_DIAMETER_MM]
        nodules += sure
        if not sure:
            doubtful.append(MarkedNodule(marked, local))
        elif (agreed != marked).any():
            kept = np.zeros(marked.shape, bool)
            for region in sure:
                lower = np.rint(local.index(region.geometry.origin)).astype(int)
                kept[Box.of_size(lower, region.inside.shape).slices] |= region.inside
            beyond_mm = ndimage.distance_transform_edt(~kept, sampling=local.spacing_zyx)
            # Readers differ by some mm about where a nodule ends.
            beyond = _regions(marked & (beyond_mm > MOST_RIM_MM), local)
            doubtful += [region for region in beyond if region.diameter_mm >= LEAST_DIAMETER_MM]
    return nodules, doubtful


def _on_grid(segment: Segment, geometry: Geometry, grid: Geometry) -> Segment | None:
    """A segment of a mask on another grid; None where nothing of it lies there."""
    local = geometry.cropped(segment.box)
    corners = grid.index(local.corners())
    lower = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, grid.shape_zyx)
    upper = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, grid.shape_zyx)
    if (upper <= lower).any():
        return None
    box = Box.between(lower, upper)
    image = local.image(segment.inside.astype(np.uint8))
    inside = sitk.GetArrayFromImage(resample(image, grid.cropped(box), linear=False, pixel_type=sitk.sitkUInt8))
    moved = Segment.of(segment.number, inside, segment.name, segment.is_lesion)
    return None if moved is None else moved.moved(box.lower)


def read_mask(path: Path) -> Mask:
    """Reads one mask with all its labels.

    Raises:
        FileNotFoundError: The file is missing.
        InputError: It is no mask: its values are no labels, or it does not say where its voxels lie.
    """
    if class_of(path) in SEG_CLASSES:
        try:
            return _read_dicom(path)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path} lacks what a DICOM segmentation must hold ({error}); save it again") from error
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
    rounded = inside if labels.dtype.kind in "iu" else np.rint(inside)
    numbers = np.unique(rounded[rounded != 0])
    is_whole = rounded is inside or np.allclose(rounded, inside, rtol=0, atol=MAX_ROUNDING)
    check(
        bool(is_whole and 0 < len(numbers) <= MOST_LABELS and numbers[0] > 0),
        f"{path} is no mask of labels: it holds values from {inside.min():g} to {inside.max():g}; labels are whole "
        "numbers from 1 on, and background is 0",
    )
    check(bool((labels == 0).any()), f"{path} is no mask of labels: none of its voxels is 0, which must be background")
    _check_levels(path, rounded, numbers)
    inside = rounded
    for number in numbers.tolist():
        segment = Segment.of(int(number), inside == number)
        assert segment is not None
        yield segment.moved(box.lower)


def _check_levels(path: Path, labels: np.ndarray, numbers: np.ndarray) -> None:
    """Refuses a picture or a map of probabilities or votes, whose values lie in each other like shells."""
    if len(numbers) < MIN_LEVELS:
        return
    spans = ndimage.find_objects(np.searchsorted(numbers, labels, side="right") * (labels != 0))
    lower, upper = (
        np.array([[getattr(part, end) for part in span] for span in spans if span]) for end in ("start", "stop")
    )
    holds = ((lower[:, None] <= lower[None]) & (upper[:, None] >= upper[None])).all(axis=2)
    nested = (holds.sum(axis=0) > 1).mean()  # each holds itself
    padded, touches = np.pad(labels, 1), np.zeros(labels.shape, bool)
    for axis, step in itertools.product(range(3), (-1, 1)):
        beside = np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        touches |= (beside != 0) & (beside != labels) & (labels != 0)
    share = touches.sum() / (labels != 0).sum()
    check(
        min(nested, share) < MOST_NESTED,
        f"{path} is no mask of labels: its {len(numbers)} values lie in each other like the levels of a picture or of "
        "probabilities; threshold it, or resample masks by the nearest neighbour",
    )


def _read_slicer(path: Path) -> Mask:
    """A segmentation of 3D Slicer, whose overlapping segments lie in several layers."""
    own = NrrdReader()
    own.check_place(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO")
    try:
        reader.ReadImageInformation()
        voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
        bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(reader.GetPixelID()))
        own.check_voxels(path, voxels * int(bits[1] if bits else 8) // 8)
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
    segments, described = [], set()
    for number in numbers:
        texts = fields[f"Segment{number}_LabelValue"], fields.get(f"Segment{number}_Layer", "0")
        label, layer = (int(text) if text.isdigit() else -1 for text in texts)
        check(
            label > 0 and 0 <= layer < layers.shape[-1],
            f"{path}: segment {number} has the label {texts[0]!r} in layer {texts[1]!r} of {layers.shape[-1]}; save it "
            "again",
        )
        if (label, layer) not in described:
            segments.append(Segment.of(label, layers[..., layer] == label, fields.get(f"Segment{number}_Name", "")))
        described.add((label, layer))
    for layer in range(layers.shape[-1]):
        others = [
            segment for segment in _split_labels(path, layers[..., layer]) if (segment.number, layer) not in described
        ]
        segments += others
    return Mask(geometry, [segment for segment in segments if segment is not None])


def _read_dicom(path: Path) -> Mask:
    """A DICOM segmentation: a frame holds one slice of one segment, or of a map of labels."""
    file = _DicomSegmentation(path)
    frames, (geometry, index_z) = file.frames(), file.places()
    kind, most = file.data.SegmentationType, float(file.data.get("MaximumFractionalValue", 1))
    half = most / 2 if kind == "FRACTIONAL" else 0
    segments = []
    for described in file.data.SegmentSequence:
        if int(described.SegmentNumber) == 0:  # the background of a map of labels
            continue
        number, highest, volume = int(described.SegmentNumber), 0, np.zeros(geometry.shape_zyx, bool)
        for frame, group, z in zip(frames, file.groups, index_z, strict=True):
            if kind == "LABELMAP":
                volume[z] |= frame == number
            elif int(file.value(group, "SegmentIdentificationSequence", "ReferencedSegmentNumber")) == number:
                highest = max(highest, int(frame.max()))
                volume[z] |= frame > half
        check(
            bool(volume.any()) or not highest,
            f"{path}: segment {number} nowhere exceeds half of its scale (at most {highest} of {most:g}); save it as a "
            "binary segmentation",
        )
        category = described.get("SegmentedPropertyCategoryCodeSequence") or [{}]
        is_lesion = str(category[0].get("CodeValue", "")) in LESION_CATEGORIES
        segments.append(Segment.of(number, volume, str(described.get("SegmentLabel", "")), is_lesion))
    return Mask(geometry, [segment for segment in segments if segment is not None])


class _DicomSegmentation(FrameGroups):
    """The file of a DICOM segmentation."""

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
        across = positions - np.outer(heights, normal)
        check(np.allclose(across, across[0], atol=0.1), f"{self.path}: its frames step sideways; save it as .nii.gz")
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
        return thickness if is_multiple and smallest > max(thickness, USUAL_STEP_MM) and not is_common else smallest
