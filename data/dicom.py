"""DICOM series as scans: finds them, puts their slices in order by position, and refuses what is no whole volume.

The address of a series is the path of its folder with 'dicom:' and its SeriesInstanceUID behind, as in
``ward/dicom:1.2.840.1``. A folder stands for its series where it holds one alone, and so does one file of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import (
    VOXEL_BYTES,
    Geometry,
    InputError,
    ScanHeader,
    ScanReader,
    UserError,
    check,
    is_readable_name,
    last_line,
    walk,
)

logger = logging.getLogger(__name__)

MARK = "dicom:"  # before the UID in the address of a series
DIRECTORY = "1.2.840.10008.1.3.10"  # class of the table of contents of a medium
OTHER_OBJECTS = {  # beginnings of classes, of which none is a slice
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.11": "presentation state",
    "1.2.840.10008.5.1.4.1.1.66": "segmentation",
    "1.2.840.10008.5.1.4.1.1.88": "report",
    "1.2.840.10008.5.1.4.1.1.104": "document",
    "1.2.840.10008.5.1.4.1.1.481": "radiotherapy",
}
UNREADABLE = "unreadable file"
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes
SUFFIXES = (".dcm", ".ima", ".dicom")
FIRST_ELEMENT = re.compile(rb"[\x02\x08]\0.\0([A-Z]{2}|..\0\0)", re.DOTALL)  # of a file without a preamble
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
SCOUTS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "REF_SURVIEW"}  # as ImageType says it
MEASURES = {"PERFUSION", "RCBF", "RCBV", "RMTT", "TTP", "MTT", "CBF", "CBV"}  # likewise
HU = ("", "HU", "HOUNSFIELD", "US")  # as RescaleType says it; US is 'unspecified', as many scanners say of HU
MIN_SLICES = 2
MAX_SHIFT_MM = 0.1  # a slice may lie so far from its place in an even stack, or ...
MAX_SHIFT_STEPS = 0.05  # ... this share of a step, if that is more
GAP_STEPS = 1.5  # a step so many times the usual one is a gap
OUTSIDE_HU = -1024.0  # where nothing was measured
PYDICOM = "pydicom>=3.0.2"


@dataclass(frozen=True)
class Slice:
    """One image of a series.

    Args:
        path: Its file.
        series: SeriesInstanceUID.
        patient: Short hash of PatientID; '' where there is none.
        description: SeriesDescription.
        number: InstanceNumber, or '' where there is none.
        acquisition: AcquisitionNumber, or ''.
        size: Rows and columns.
        spacing: Distance of its columns and of its rows in mm; empty where it is not stated.
        position: Centre of its first voxel (x, y, z) in mm; empty where it is not stated.
        orientation: Direction of its rows, then of its columns; empty where it is not stated.
        location: SliceLocation, mm along the table; empty where it is not stated.
        scale: RescaleSlope and RescaleIntercept; empty where neither is stated.
        padding: Lowest and highest stored value of voxels that were not measured; empty without such voxels.
        pixel: ITK's type of the scaled voxels.
        frames: Images in its file.
        stored_bytes: What its voxels take in a file that is not compressed.
        kind: Why it is no slice of a CT, such as 'scout'; empty for one that is.
    """

    path: Path
    series: str
    patient: str
    description: str
    number: str
    acquisition: str
    size: tuple[int, int]
    spacing: tuple[float, ...]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    location: tuple[float, ...]
    scale: tuple[float, ...]
    padding: tuple[float, ...]
    pixel: int
    frames: int
    stored_bytes: int
    kind: str

    def __str__(self) -> str:
        number = f" {self.number}" if self.number else ""
        return f"image{number} at {self.position[2]:g} mm" if self.position else f"image{number} without a position"

    @property
    def to_hu(self) -> tuple[float, float]:
        """Factor and summand that make HU of stored values."""
        return (self.scale[0], self.scale[1]) if self.scale else (1.0, 0.0)

    @property
    def unmeasured(self) -> tuple[float, ...]:
        """Lowest and highest HU of the voxels that were not measured."""
        factor, summand = self.to_hu
        return tuple(sorted(factor * value + summand for value in self.padding))


@dataclass(frozen=True)
class Stack:
    """Slices in the order of their places.

    Args:
        slices: From the first to the last along the normal of the images.
        geometry: Where the voxels of the scan lie.
        to_index: (3, 4) matrix from mm to the voxel (x, y, z) of the slices, where they are askew; None where the
            slices are the scan.
    """

    slices: tuple[Slice, ...]
    geometry: Geometry
    to_index: np.ndarray | None = None


class DicomReader(ScanReader):
    """A series of CT images, or one multi-frame image.

    ITK only warns of a missing slice, moves the scan at one that is there twice, and takes a tilted gantry for upright.
    An object of this class reads one scan: what it has found out of the files is not found out again.
    """

    suffixes = SUFFIXES

    def __init__(self) -> None:
        self._found: dict[Path, list[Slice]] = {}

    def accepts(self, path: Path) -> bool:
        """A folder with DICOM in it, a DICOM file of any name, or the address of a series."""
        if path.is_dir():
            return any(file.is_file() and _meta(file, *_state(file)) for file in walk(path))
        if path.is_file():
            return super().accepts(path) or _meta(path, *_state(path)) is not None
        return super().accepts(path) or path.name.startswith(MARK) or UID.fullmatch(path.name) is not None

    def advice(self, path: Path) -> str:
        """Of a folder without a CT: what is there instead."""
        left_out = Index.of(walk(path)).left_out() if path.is_dir() else ""
        return f"{path} holds no CT, but {left_out}" if left_out else ""

    def name(self, path: Path) -> str:
        """The SeriesInstanceUID."""
        return _address(path)[1] or self._series(path)[0].series

    def patient(self, path: Path) -> str:
        """A hash of PatientID."""
        with suppress(InputError):  # told when the series is read
            return self._series(path)[0].patient
        return ""

    def expand(self, path: Path) -> list[Path]:
        """A folder, and the table of contents of a medium, stand for all series there."""
        folder = path.parent if _is_directory(path) else path
        return self.search(walk(folder)) if folder.is_dir() else [path]

    def search(self, paths: Iterable[Path]) -> list[Path]:
        """The addresses of the series of CT images among files; what is left out is told."""
        index = Index.of(paths)
        if left_out := index.left_out():
            logger.info("left out of the DICOM files: %s", left_out)
        addresses = {_common_folder(images) / (MARK + images[0].series) for images in index.series()}
        return sorted(addresses)

    def stack(self, path: Path) -> Stack:
        """The images of the series in the order of their places.

        Raises:
            InputError: They are no even stack.
        """
        return _stack_of(str(path), self._series(path))

    def files(self, path: Path) -> tuple[Path, ...]:
        """The files of the series."""
        return tuple(image.path for image in self._series(path))

    def read_header(self, path: Path) -> ScanHeader:
        """Where the voxels lie, after the slices are found to be one even stack."""
        stack = self.stack(path)
        pixel = _pixel_of(stack.slices) if stack.to_index is None else sitk.sitkFloat32
        return ScanHeader(stack.geometry, VOXEL_BYTES[pixel])

    def check_voxels(self, path: Path, expected: int) -> None:
        """Files that are not compressed must hold all rows of their images."""
        super().check_voxels(path, expected)
        for image in self._series(path):
            held, wanted = image.path.stat().st_size, image.stored_bytes
            is_whole = held >= wanted or _syntax(image.path) not in UNCOMPRESSED
            check(is_whole, f"{path}: {image} is cut off ({held:,} of {wanted:,} bytes); copy or download it again")

    def read_image(self, path: Path) -> sitk.Image:
        """The voxels in HU, on the scan's grid; one askew is brought to an upright grid."""
        stack = self.stack(path)
        if any(not image.scale for image in stack.slices):
            logger.warning("%s states no RescaleIntercept: its stored values are taken for HU", self.name(path))
        image = _without_padding(_read_voxels(path, stack.slices), stack.slices)
        if stack.to_index is not None:
            return _upright(image, stack)
        image.SetOrigin(stack.geometry.origin)
        image.SetSpacing(stack.geometry.spacing)
        image.SetDirection(stack.geometry.direction)
        return image

    def _series(self, path: Path) -> list[Slice]:
        """The images of the one series that a path means.

        Raises:
            FileNotFoundError: Nothing is there.
            InputError: There is no such series, or there are several, or a file of it cannot be read.
        """
        if path not in self._found:
            self._found[path] = _series_at(path)
        return self._found[path]


def _address(path: Path) -> tuple[Path, str]:
    """The folder that a path means, and the UID of the series; '' for the only one in it.

    Raises:
        FileNotFoundError: Nothing is there.
        InputError: A file is no image of a CT.
    """
    if path.name.startswith(MARK):
        return path.parent, path.name.removeprefix(MARK)
    if path.is_dir():
        return path, ""
    if _is_directory(path):
        return path.parent, ""
    if path.is_file():
        check(_meta(path, *_state(path)) is not None, f"{path} is no DICOM file; copy or download it again")
        image = _read(path, *_state(path))
        if isinstance(image, Slice) and not image.kind:
            return path.parent, image.series
        raise InputError(f"{path} is no image of a CT ({image.kind if isinstance(image, Slice) else image})")
    if UID.fullmatch(path.name) and path.parent.is_dir():
        return path.parent, path.name
    raise FileNotFoundError(f"scan {path} does not exist")


def _series_at(path: Path) -> list[Slice]:
    """The images of the one series that a path means; raises what ``DicomReader._series`` says."""
    folder, wanted = _address(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"scan {path} does not exist")
    index = Index.of(walk(folder))
    series = [images for images in index.series() if wanted in ("", images[0].series)]
    what = f"CT series {wanted}".strip()
    check(bool(series), f"{folder} holds no {what}: {index.left_out() or 'no other object of DICOM either'}")
    patients = Counter(images[0].series for images in series)
    shared = next((uid for uid, count in patients.items() if count > 1), None)
    check(
        shared is None,
        f"{folder} holds images of several patients that have one SeriesInstanceUID, {shared}; put those of "
        "each into a folder of their own",
    )
    check(len(series) == 1, f"{path} holds {len(series)} series; choose one: {_sum_up(series)}")
    (images,) = series
    folders = {image.path.parent for image in images}
    broken = next((file for file in index.unreadable if file.parent in folders), None)
    check(
        broken is None,
        f"{path}: {broken} beside its images cannot be read, and may be one of them; copy or download it again, or "
        "remove it",
    )
    return images


# ------------------------------------------------------------------------------------------------------------- files


@cache  # some hundred bytes a file
def _meta(path: Path, size: int, time: int) -> tuple[str, str] | None:
    """Class of the object and transfer syntax, as the start of its file states them ('' where it does not).

    None for a file that is no DICOM: without the mark behind the preamble, and without a name and a first element as
    files without a preamble have them. A file is read again once its size or time stamp has changed.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(2048)
    except OSError:
        return None
    is_bare = path.suffix.lower() in ("", *SUFFIXES) and FIRST_ELEMENT.match(head)
    if head[128:132] != b"DICM" and not is_bare:
        return None
    found = [re.search(rb"\x02\0%b\0UI..([0-9.]+)" % element, head, re.DOTALL) for element in (b"\x02", b"\x10")]
    of_class, syntax = (match.group(1).decode() if match else "" for match in found)
    return of_class, syntax


def _state(path: Path) -> tuple[int, int]:
    """Size and time stamp."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _is_directory(path: Path) -> bool:
    """Whether a file is the table of contents of a DICOM medium, often named DICOMDIR."""
    return path.is_file() and (_meta(path, *_state(path)) or ("", ""))[0] == DIRECTORY


def class_of(path: Path) -> str | None:
    """SOP class UID of a DICOM file, '' where its start does not state it; None for any other file."""
    return (_meta(path, *_state(path)) or (None, ""))[0]


def _syntax(path: Path) -> str:
    return (_meta(path, *_state(path)) or ("", ""))[1]


@dataclass(frozen=True)
class Index:
    """The DICOM among some files.

    Args:
        images: All images, also those that are no slices of a CT.
        others: What kinds of other objects there are.
        unreadable: Files that cannot be read.
    """

    images: list[Slice]
    others: list[str]
    unreadable: list[Path]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Index:
        """Reads the headers of the files."""
        index = cls([], [], [])
        for path in paths:
            if not path.is_file():
                continue
            image = _read(path, *_state(path))
            if isinstance(image, Slice):
                index.images.append(image)
            elif image == UNREADABLE:
                index.unreadable.append(path)
            elif image:
                index.others.append(image)
        return index

    def series(self) -> list[list[Slice]]:
        """The slices of CTs, those of one series and patient together."""
        groups: dict[tuple[str, str], list[Slice]] = defaultdict(list)
        for image in self.images:
            if not image.kind:
                groups[image.series, image.patient].append(image)
        return [images for _, images in sorted(groups.items())]

    def left_out(self) -> str:
        """How many objects of which kind are no slices of a CT; '' for none."""
        kinds = [
            *self.others,
            *(image.kind for image in self.images if image.kind),
            *(UNREADABLE for _ in self.unreadable),
        ]
        return ", ".join(f"{number} x {kind}" for kind, number in sorted(Counter(kinds).items()))


@cache  # about 1 KB a file
def _read(path: Path, size: int, time: int) -> Slice | str:
    """The header of an image, or what else a file is: '' for no DICOM and for a table of contents.

    A file is read again once its size or time stamp has changed.
    """
    meta = _meta(path, size, time)
    if meta is None:
        is_meant = path.suffix.lower() in SUFFIXES or not os.access(path, os.R_OK)
        return UNREADABLE if is_meant else ""
    if meta[0] == DIRECTORY:
        return ""
    kind = _kind_of(meta[0])
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    try:
        check(is_readable_name(path), "ITK ends the process at such a name")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except (RuntimeError, InputError):
        return kind or UNREADABLE

    def text(tag: str) -> str:
        """An element as text; what is no UTF-8 is most often Latin-1."""
        value = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
        return os.fsencode(value).decode("utf-8" if is_readable_name(value) else "latin-1").strip().strip("\0").strip()

    def numbers(tag: str, count: int) -> tuple[float, ...]:
        return _finite(text(tag).split("\\"), count)

    kind = kind or _kind_of(text("0008|0016"))
    kind = kind or _kind_of_image(text("0008|0060"), text("0008|0008"), text("0028|1054"))
    if not kind and (reader.GetNumberOfComponents() > 1 or reader.GetPixelID() not in VOXEL_BYTES):
        kind = "colour image"
    if not kind and text("0028|0004") == "MONOCHROME1":
        kind = "inverted image (MONOCHROME1)"
    columns, rows, *frames = reader.GetSize()
    (bits,) = numbers("0028|0100", 1) or (16.0,)
    slope, intercept = numbers("0028|1053", 1), numbers("0028|1052", 1)
    spacing = numbers("0028|0030", 2)
    padding = (*numbers("0028|0120", 1), *numbers("0028|0121", 1))
    patient = text("0010|0020")
    unnamed = f"of folder {hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:8]}"
    scale = (slope[0] if slope and slope[0] else 1.0, intercept[0] if intercept else 0.0)
    return Slice(
        path=path,
        series=(text("0020|000e") or unnamed).replace("/", "_"),
        patient=hashlib.sha256(patient.encode()).hexdigest()[:5] if patient else "",  # too short to be guessed back
        description=text("0008|103e"),
        number=text("0020|0013"),
        acquisition=text("0020|0012"),
        size=(rows, columns),
        spacing=spacing[::-1] if min(spacing, default=0) > 0 else (),
        position=numbers("0020|0032", 3),
        orientation=numbers("0020|0037", 6),
        location=numbers("0020|1041", 1),
        scale=scale if slope or intercept else (),
        padding=_as_stored(padding, int(bits), text("0028|0103") == "1"),
        pixel=reader.GetPixelID(),
        frames=max(frames, default=1),
        stored_bytes=rows * columns * max(frames, default=1) * int(bits) // 8,
        kind=kind,
    )


def _finite(values: Sequence[Any], count: int) -> tuple[float, ...]:
    """So many finite numbers; empty for anything else."""
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return ()
    return found if len(found) == count and all(map(math.isfinite, found)) else ()


def _kind_of(of_class: str) -> str:
    """What an object is by its class; '' for a CT image and for one that does not say."""
    for start, kind in OTHER_OBJECTS.items():
        if of_class == start or of_class.startswith(f"{start}."):
            return kind
    return ""


def _kind_of_image(modality: str, image_type: str, unit: str) -> str:
    """What an image is by its header, where it is no CT in HU."""
    if modality.upper() != "CT":
        return modality or "image without modality"
    words = set(image_type.upper().split("\\"))
    if words & SCOUTS:
        return "scout"
    if words & MEASURES or unit.upper() not in HU:
        return f"map of another measure ({unit or image_type})"
    return ""


def _as_stored(padding: tuple[float, ...], bits: int, is_signed: bool) -> tuple[float, ...]:
    """Padding as the numbers that the voxels hold; writers take its sign for another than the voxels' at times."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if is_signed else (0, 2**bits)
    stored = [value + 2**bits * ((value < low) - (value >= high)) for value in padding]
    return (min(stored), max(stored)) if stored else ()


def _common_folder(images: Sequence[Slice]) -> Path:
    """The innermost folder in which all files of a series lie."""
    first, *others = sorted({image.path.parent for image in images})
    return next(folder for folder in (first, *first.parents) if all(other.is_relative_to(folder) for other in others))


def _sum_up(series: Sequence[Sequence[Slice]]) -> str:
    """What series there are, in words."""
    words = [(images[0].series, f"{len(images)} images", images[0].description) for images in series]
    return "; ".join(f"{uid} ({', '.join(filter(None, what))})" for uid, *what in words)


# ------------------------------------------------------------------------------------------------------------ stacks


def _stack_of(name: str, images: Sequence[Slice]) -> Stack:
    """Puts slices in order.

    Raises:
        InputError: They are no even stack of parallel images of one size, with the reason and the slice.
    """
    if images[0].frames > 1:
        check(len(images) == 1, f"{name} holds {len(images)} multi-frame images; put each into a folder of its own")
        images = _frames_of(images[0])
    check(len(images) >= MIN_SLICES, f"{name} has one image; a scan has several")
    for image in images:
        missing = [what for what in ("position", "orientation", "spacing") if not getattr(image, what)]
        check(not missing, f"{name}: {image} states no {' and no '.join(missing)}; export the series again")
    _check_alike(name, images)
    first = images[0]
    rows, columns = np.reshape(first.orientation, (2, 3))
    check(
        np.allclose(np.linalg.norm([rows, columns], axis=1), 1, atol=1e-3) and abs(rows @ columns) < 1e-3,
        f"{name}: the rows and columns of {first} are not at right angles",
    )
    normal = np.cross(rows, columns)
    normal /= np.linalg.norm(normal)
    images = sorted(images, key=lambda image: float(normal @ image.position))
    places = np.array([image.position for image in images])
    _check_acquisitions(name, images)
    _check_steps(name, images, places @ normal)
    _check_locations(name, images)
    step = (places[-1] - places[0]) / (len(images) - 1)
    shifts = np.linalg.norm(places - places[0] - np.outer(np.arange(len(images)), step), axis=1)
    allowed = max(MAX_SHIFT_MM, MAX_SHIFT_STEPS * float(normal @ step))
    worst = int(shifts.argmax())
    check(
        shifts[worst] <= allowed,
        f"{name}: {images[worst]} lies {shifts[worst]:.2f} mm beside its place in an even stack of steps of "
        f"{normal @ step:.3f} mm; resample the series by a program that knows uneven steps",
    )
    shape_zyx, (dx, dy), origin = (len(images), *first.size), first.spacing, places[0]
    aside = step - (normal @ step) * normal
    if np.linalg.norm(aside) * (len(images) - 1) <= allowed:
        direction = np.column_stack([rows, np.cross(normal, rows), normal])
        return Stack(tuple(images), _geometry(shape_zyx, origin, (dx, dy, float(normal @ step)), direction))
    return _askew(tuple(images), shape_zyx, origin, np.column_stack([dx * rows, dy * columns, step]))


def _check_alike(name: str, images: Sequence[Slice]) -> None:
    """Raises InputError where images of one series differ in size, spacing or direction."""
    first = images[0]
    for what in ("size", "spacing", "orientation"):
        values = np.array([getattr(image, what) for image in images])
        apart = np.abs(values - values[0]).max(axis=1)
        other = images[int(apart.argmax())]
        check(
            bool(apart.max() <= 1e-3),
            f"{name}: {other} has another {what} than {first} ({getattr(other, what)}, not {getattr(first, what)}); "
            "these are several scans in one series",
        )


def _check_acquisitions(name: str, images: Sequence[Slice]) -> None:
    """Raises InputError where several acquisitions of one region are laid into each other."""
    changes = [
        image.acquisition
        for image, before in zip(images, [None, *images], strict=False)
        if before is None or image.acquisition != before.acquisition
    ]
    again = next((number for number, count in Counter(changes).items() if number and count > 1), None)
    check(
        again is None,
        f"{name} holds several acquisitions of the same region (acquisition {again} is one); export each as a series",
    )


def _check_steps(name: str, images: Sequence[Slice], heights: np.ndarray) -> None:
    """Raises InputError where an image is there twice, or one is missing."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    pairs = list(zip(itertools.pairwise(images), steps, strict=True))
    for (image, following), step in pairs:
        check(
            step > max(0.01, 0.1 * usual),
            f"{name}: {image} and {following} lie at the same place ({image.path.name} and {following.path.name}); is "
            "one a copy? remove it",
        )
    for (image, following), step in pairs:
        check(
            step < GAP_STEPS * usual,
            f"{name}: {round(step / usual) - 1 or 'some'} image(s) missing between {image} and {following}: a step of "
            f"{step:g} mm where others are {usual:g} mm; copy or export the series again",
        )


def _check_locations(name: str, images: Sequence[Slice]) -> None:
    """Raises InputError where the locations on the table are uneven, though the positions are not."""
    locations = np.array([image.location[0] for image in images if image.location])
    order = np.arange(len(locations))
    if len(locations) < len(images) or len(locations) < 3 or np.ptp(locations) < 0.01:
        return  # some programs write one number into all
    slope, start = np.polyfit(order, locations, 1)
    apart = np.abs(locations - start - slope * order)
    if np.abs(np.corrcoef(order, locations)[0, 1]) < 0.9:  # no locations, but something else
        return
    worst = int(apart.argmax())
    check(
        apart[worst] <= 0.5 * abs(slope) + MAX_SHIFT_MM,
        f"{name}: uneven steps: by its SliceLocation, {images[worst]} lies {apart[worst]:.1f} mm beside its place in "
        f"an even stack of steps of {abs(slope):.2f} mm, by its position it does not; one of the two is wrong; ask "
        "where the series comes from, or export it again",
    )


def _geometry(size: Sequence[int], origin: np.ndarray, spacing: Sequence[float], direction: np.ndarray) -> Geometry:
    x, y, z = map(float, origin)
    dx, dy, dz = map(float, spacing)
    return Geometry((size[0], size[1], size[2]), (x, y, z), (dx, dy, dz), tuple(direction.ravel().tolist()))


def _askew(images: tuple[Slice, ...], shape_zyx: tuple[int, int, int], origin: np.ndarray, axes: np.ndarray) -> Stack:
    """The stack of a tilted gantry, whose slices step sideways, with an upright grid around it.

    Args:
        images: In order.
        shape_zyx: Number of voxels.
        origin: Centre of the first voxel.
        axes: (3, 3), whose columns are the steps from voxel to voxel along x, y and z.
    """
    spacing = np.array([*images[0].spacing, np.linalg.norm(axes[:, 2])])
    up = axes[:, 2] / spacing[2]
    across = axes[:, 0] - (axes[:, 0] @ up) * up
    across /= np.linalg.norm(across)
    direction = np.column_stack([across, np.cross(up, across), up])
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape_zyx[::-1]) - 1)
    places = (corners @ axes.T) @ direction  # mm along the axes of the upright grid, from the origin
    low, high = places.min(axis=0), places.max(axis=0)
    grid_size = np.ceil((high - low) / spacing - 1e-6).astype(int) + 1
    inverse = np.linalg.inv(axes)
    to_index = np.column_stack([inverse, -inverse @ origin])
    return Stack(
        images, _geometry(grid_size[::-1].tolist(), origin + direction @ low, spacing.tolist(), direction), to_index
    )


# ------------------------------------------------------------------------------------------------------------ voxels


def _pixel_of(images: Sequence[Slice]) -> int:
    """ITK's type of the scan's voxels: that of its images, or float where they are scaled differently."""
    if len({(image.pixel, image.scale) for image in images}) == 1:
        return images[0].pixel
    return sitk.sitkFloat32


def _read_voxels(path: Path, images: Sequence[Slice]) -> sitk.Image:
    """The scaled voxels of the images in their order; what ITK cannot decode, pydicom may.

    Raises:
        InputError: Neither can read them.
        UserError: pydicom is missing.
    """
    if images[0].frames > 1:
        return _read_by_pydicom(images)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(image.path) for image in images])
    reader.SetImageIO("GDCMImageIO")
    reader.SetOutputPixelType(_pixel_of(images))
    try:
        return reader.Execute()
    except RuntimeError as error:
        reason = last_line(error)
        if importlib.util.find_spec("pydicom") is None:
            raise InputError(f"{path} cannot be read ({reason}); copy it again, or pip install '{PYDICOM}'") from error
        return _read_by_pydicom(images)


def _read_by_pydicom(images: Sequence[Slice]) -> sitk.Image:
    """The images, or the frames of one, in their order and scaled."""
    pydicom = import_pydicom()
    array = np.empty((len(images), *images[0].size), np.float32)
    try:
        stored = pydicom.dcmread(images[0].path).pixel_array if images[0].frames > 1 else None
        for number, image in enumerate(images):
            pixels = pydicom.dcmread(image.path).pixel_array if stored is None else stored[int(image.number) - 1]
            factor, summand = image.to_hu
            array[number] = pixels * factor + summand
    except (RuntimeError, AttributeError, ValueError) as error:
        raise InputError(f"{images[0].path} cannot be read; copy or download it again ({error})") from error
    pixel = _pixel_of(images)
    return sitk.GetImageFromArray(array if pixel == sitk.sitkFloat32 else array.astype(np.int32))


def _without_padding(image: sitk.Image, images: Sequence[Slice]) -> sitk.Image:
    """Air instead of voxels that were not measured, where their value could be taken for tissue."""
    padded = [number for number, one in enumerate(images) if one.unmeasured and one.unmeasured[1] > -1000]
    if not padded:
        return image
    array = sitk.GetArrayFromImage(sitk.Cast(image, sitk.sitkFloat32))
    for number in padded:
        low, high = images[number].unmeasured
        array[number][(array[number] >= low) & (array[number] <= high)] = OUTSIDE_HU
    return sitk.GetImageFromArray(array)


def _upright(image: sitk.Image, stack: Stack) -> sitk.Image:
    """The scan on its upright grid, sampled where each slice truly was."""
    assert stack.to_index is not None
    image.SetOrigin((0.0, 0.0, 0.0))
    image.SetSpacing((1.0, 1.0, 1.0))
    image.SetDirection(np.eye(3).ravel().tolist())
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(stack.to_index[:, :3].ravel().tolist())
    transform.SetTranslation(stack.to_index[:, 3].tolist())
    grid = stack.geometry
    size_xyz = [int(size) for size in grid.shape_zyx[::-1]]
    where = (size_xyz, transform, sitk.sitkLinear, grid.origin, grid.spacing, grid.direction)
    return sitk.Resample(image, *where, OUTSIDE_HU, sitk.sitkFloat32)


# ------------------------------------------------------------------------------------------------------- multi-frame


def import_pydicom() -> Any:
    """The optional library.

    Raises:
        UserError: It is missing.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"this DICOM file needs pydicom: pip install '{PYDICOM}'") from error
    return pydicom


class FrameGroups:
    """What a multi-frame file says of each of its frames, or of all of them.

    Args:
        path: The file.
        reading: Arguments of pydicom's ``dcmread``.

    Raises:
        UserError: pydicom is missing.
        InputError: It says nothing of the places of its frames.
    """

    def __init__(self, path: Path, **reading: Any) -> None:
        self.path, self.data = path, import_pydicom().dcmread(path, **reading)
        self.shared = (self.data.get("SharedFunctionalGroupsSequence") or [{}])[0]
        self.groups = self.data.get("PerFrameFunctionalGroupsSequence") or []
        count = int(self.data.get("NumberOfFrames") or 1)
        check(len(self.groups) == count, f"{path} says nothing of the places of its {count} frames")

    def optional(self, group: Any, sequence: str, name: str) -> Any:
        """An attribute of a frame, or of all of them; None where it is not stated."""
        items = group.get(sequence) or self.shared.get(sequence)
        return items[0].get(name) if items else None


def _frames_of(image: Slice) -> list[Slice]:
    """The frames of a multi-frame image, each as a slice whose ``number`` counts from 1."""
    frames = FrameGroups(image.path, stop_before_pixels=True)

    def value(group: Any, sequence: str, name: str, default: Any = ()) -> Any:
        found = frames.optional(group, sequence, name)
        return default if found is None else found

    slices = []
    for number, group in enumerate(frames.groups, start=1):
        frame_type = value(group, "CTImageFrameTypeSequence", "FrameType", ["ORIGINAL"])
        unit = value(group, "PixelValueTransformationSequence", "RescaleType", "HU")
        kind = _kind_of_image("CT", "\\".join(frame_type), unit)
        check(not kind, f"{image.path}: frame {number} is a {kind}, no CT in HU")
        rescale = ("RescaleSlope", "RescaleIntercept")
        scale = [value(group, "PixelValueTransformationSequence", name, None) for name in rescale]
        slices.append(
            replace(
                image,
                number=f"{number}",
                spacing=_finite(value(group, "PixelMeasuresSequence", "PixelSpacing"), 2)[::-1],
                position=_finite(value(group, "PlanePositionSequence", "ImagePositionPatient"), 3),
                orientation=_finite(value(group, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
                scale=_finite(scale, 2),
                pixel=sitk.sitkFloat32,
            )
        )
    return slices
