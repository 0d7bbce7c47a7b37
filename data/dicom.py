"""DICOM series as scans: finds them, puts their slices in order by position, and refuses what is no whole volume.

The address of a series is the path of its folder with its SeriesInstanceUID behind: ``read_scan("ward/1.2.840.1")``.
Where a folder holds one series alone, or one file of it is named, the address may be that folder or file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import UID, VOXEL_BYTES, Geometry, InputError, ScanHeader, ScanReader, UserError, check, is_of_macos

logger = logging.getLogger(__name__)

CT = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")  # classes of objects
DIRECTORY = "1.2.840.10008.1.3.10"
OTHER_OBJECTS = {  # beginnings of classes, of which none is a slice
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
    "1.2.840.10008.5.1.4.1.1.11": "presentation state",
    "1.2.840.10008.5.1.4.1.1.66": "segmentation",
    "1.2.840.10008.5.1.4.1.1.88": "report",
    "1.2.840.10008.5.1.4.1.1.104": "document",
    "1.2.840.10008.5.1.4.1.1.481": "radiotherapy",
}
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
SCOUTS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "REF_SURVIEW"}  # as ImageType says it
MEASURES = {"PERFUSION", "RCBF", "RCBV", "RMTT", "TTP", "MTT", "CBF", "CBV"}  # likewise
MIN_SLICES = 2
MAX_SHIFT_MM = 0.1  # a slice may lie so far from its place in an even stack, or ...
MAX_SHIFT_STEPS = 0.05  # ... this share of a step, if that is more
GAP_STEPS = 1.5  # a step so many times the usual one is a gap
OUTSIDE_HU = -1024.0  # where nothing was measured
BROKEN = "unreadable file"
PYDICOM = "pydicom>=3.0.2"
SUFFIXES = (".dcm", ".ima", ".dicom")
FIRST_ELEMENT = re.compile(rb"[\x02\x08]\0.\0([A-Z]{2}|..\0\0)", re.DOTALL)  # of a file without a preamble


@dataclass(frozen=True)
class Slice:
    """One image of a series.

    Args:
        path: Its file.
        series: SeriesInstanceUID.
        patient: Hash of PatientID; '' where there is none.
        description: SeriesDescription.
        number: InstanceNumber, or '' where there is none.
        size: Rows and columns.
        spacing: Distance of its columns and of its rows in mm; empty where it is not stated.
        position: Centre of its first voxel (x, y, z) in mm; empty where it is not stated.
        orientation: Direction of its rows, then of its columns; empty where it is not stated.
        scale: RescaleSlope and RescaleIntercept.
        padding: Lowest and highest value of voxels that were not measured, after scaling; empty without such voxels.
        pixel: ITK's type of the scaled voxels.
        frames: Images in its file.
        stored_bytes: What its voxels take in a file that is not compressed.
        location: SliceLocation, mm along the table; empty where it is not stated.
        kind: Why it is no slice of a CT, such as 'scout'; empty for one that is.
    """

    path: Path
    series: str
    patient: str
    description: str
    number: str
    size: tuple[int, int]
    spacing: tuple[float, ...]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    scale: tuple[float, ...]
    padding: tuple[float, ...] = ()
    pixel: int = sitk.sitkInt16
    frames: int = 1
    stored_bytes: int = 0
    location: tuple[float, ...] = ()
    kind: str = ""

    def __str__(self) -> str:
        place = f" at {self.position[2]:g} mm" if self.position else ""
        return f"image {self.number or self.path.name}{place}"


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
    """

    suffixes = SUFFIXES

    def accepts(self, path: Path) -> bool:
        """A folder with DICOM in it, a DICOM file of any name, or the address of a series."""
        if path.is_dir():
            return any(_is_dicom(file) for file in _files(path))
        if path.is_file():
            return super().accepts(path) or _is_dicom(path)
        return super().accepts(path) or UID.fullmatch(path.name) is not None

    def advice(self, path: Path) -> str:
        """Of a folder without a CT: what is there instead."""
        left_out = Index.of(path).left_out() if path.is_dir() else ""
        return f"{path} holds no CT, but {left_out}" if left_out else ""

    def name(self, path: Path) -> str:
        """The SeriesInstanceUID."""
        if not path.exists() and UID.fullmatch(path.name):
            return path.name
        return self._series(path)[0].series

    def patient(self, path: Path) -> str:
        """A hash of PatientID."""
        with suppress(InputError):  # told when the series is read
            return self._series(path)[0].patient
        return ""

    def find(self, path: Path) -> list[Path]:
        """The addresses of the series of CT images at a path; what is left out is told."""
        if not path.is_dir() and not is_directory_file(path):
            return [_common_folder(series := self._series(path)) / series[0].series]
        index = Index.of(path if path.is_dir() else path.parent)
        if left_out := index.left_out():
            logger.info("left out of the DICOM files: %s", left_out)
        return [_common_folder(slices) / uid for uid, slices in index.series().items()]

    def files(self, path: Path) -> tuple[Path, ...]:
        """The files of the series."""
        return tuple(image.path for image in self._series(path))

    def read_header(self, path: Path) -> ScanHeader:
        """Where the voxels lie, after the slices are found to be one even stack."""
        stack = self._stack(path)
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
        stack = self._stack(path)
        try:
            image = _read_by_itk(stack.slices) if stack.slices[0].frames == 1 else _read_by_pydicom(stack.slices)
        except RuntimeError as error:
            image = self._read_otherwise(path, stack, error)
        image = _without_padding(image, stack.slices)
        if stack.to_index is not None:
            return _upright(image, stack)
        image.SetOrigin(stack.geometry.origin)
        image.SetSpacing(stack.geometry.spacing)
        image.SetDirection(stack.geometry.direction)
        return image

    def _read_otherwise(self, path: Path, stack: Stack, error: RuntimeError) -> sitk.Image:
        """What ITK cannot decode, read by pydicom where it is installed."""
        if isinstance(error, UserError):
            raise error
        reason = str(error).strip().split("\n")[-1].strip()
        if importlib.util.find_spec("pydicom") is None:
            raise InputError(f"{path} cannot be read ({reason}); copy it again, or pip install '{PYDICOM}'") from error
        try:
            return _read_by_pydicom(stack.slices)
        except (RuntimeError, AttributeError, ValueError) as second:
            raise InputError(f"{path} cannot be read; copy or download it again ({reason}; {second})") from second

    def _series(self, path: Path) -> list[Slice]:
        """The images of the one series that a path means.

        Raises:
            FileNotFoundError: Nothing is there.
            InputError: There is no such series, or there are several, or a file of it cannot be read.
        """
        folder, wanted = path if path.is_dir() else path.parent, ""
        if path.is_file() and not is_directory_file(path):
            check(_is_dicom(path), f"{path} is no DICOM file; copy or download it again")
            image = _read(path, *_state(path))
            check(isinstance(image, Slice), f"{path} is no image of a CT, or cannot be read ({image or 'a directory'})")
            wanted = image.series if isinstance(image, Slice) else ""
        elif not path.exists():
            wanted = path.name
        if not folder.is_dir() or (wanted and not UID.fullmatch(wanted)):
            raise FileNotFoundError(f"scan {path} does not exist")
        index = Index.of(folder)
        series = {uid: images for uid, images in index.series().items() if wanted in ("", uid)}
        check(bool(series), f"{folder} holds no CT series {wanted}: {index.left_out() or 'no DICOM at all'}")
        check(len(series) == 1, f"{path} holds {len(series)} series; choose one: {_sum_up(series)}")
        (images,) = series.values()
        folders = {image.path.parent for image in images}
        broken = next((file for file in index.broken if file.parent in folders), None)
        check(
            broken is None,
            f"{path}: {broken} beside its images cannot be read, and may be one of them; copy or download it again, or "
            "remove it",
        )
        return images

    def _stack(self, path: Path) -> Stack:
        return _stack_of(str(path), self._series(path))


def is_directory_file(path: Path) -> bool:
    """Whether a file is the table of contents of a DICOM medium, often named DICOMDIR."""
    return path.is_file() and (_meta(path, *_state(path)) or ("", ""))[0] == DIRECTORY


def _syntax(path: Path) -> str:
    return (_meta(path, *_state(path)) or ("", ""))[1]


# ------------------------------------------------------------------------------------------------------------- files


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder that may be DICOM, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not is_of_macos(path):
            yield path


def _is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, of whatever kind."""
    return _meta(path, *_state(path)) is not None


@lru_cache(maxsize=50_000)
def _meta(path: Path, size: int, time: int) -> tuple[str, str] | None:
    """Class of the object and transfer syntax, as the start of its file states them ('' where it does not).

    None for a file that is no DICOM: without the mark behind the preamble, and without a name and a first element as
    files without a preamble have them. A file is read again once its size or time stamp has changed.
    """
    with open(path, "rb") as file:
        head = file.read(2048)
    is_bare = path.suffix.lower() in ("", *SUFFIXES) and FIRST_ELEMENT.match(head)
    if head[128:132] != b"DICM" and not is_bare:
        return None
    found = [re.search(rb"\x02\0%b\0UI..([0-9.]+)" % element, head, re.DOTALL) for element in (b"\x02", b"\x10")]
    of_class, syntax = (match.group(1).decode() if match else "" for match in found)
    return of_class, syntax


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


@dataclass
class Index:
    """All DICOM below a folder.

    Args:
        images: {series UID: images}, also those that are no slices of a CT.
        others: What kinds of other objects there are.
        broken: Files that cannot be read.
    """

    images: dict[str, list[Slice]]
    others: list[str]
    broken: list[Path]

    @classmethod
    def of(cls, folder: Path) -> Index:
        """Reads the headers of all files."""
        index = cls(defaultdict(list), [], [])
        for path in _files(folder):
            image = _read(path, *_state(path))
            if isinstance(image, Slice):
                index.images[image.series].append(image)
            elif image == BROKEN:
                index.broken.append(path)
            elif image:
                index.others.append(image)
        return index

    def series(self) -> dict[str, list[Slice]]:
        """{series UID: slices of a CT}."""
        slices = {uid: [image for image in images if not image.kind] for uid, images in sorted(self.images.items())}
        return {uid: images for uid, images in slices.items() if images}

    def left_out(self) -> str:
        """How many objects of which kind are no slices of a CT; '' for none."""
        kinds = [image.kind for images in self.images.values() for image in images if image.kind]
        counts = Counter([*kinds, *self.others, *(BROKEN for _ in self.broken)])
        return ", ".join(f"{number} x {kind}" for kind, number in sorted(counts.items()))


@lru_cache(maxsize=50_000)
def _read(path: Path, size: int, time: int) -> Slice | str:
    """The header of an image, read once while its file stays as it is; or what else it is, '' for a directory."""
    of_class, _ = _meta(path, size, time) or (DIRECTORY, "")
    if of_class == DIRECTORY:
        return ""
    kind = _kind_of(of_class)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        if kind:
            return kind
        return BROKEN

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip().strip("\0").strip() if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> tuple[float, ...]:
        try:
            values = tuple(float(value) for value in text(tag).split("\\"))
        except ValueError:
            return ()
        return values if len(values) == count and all(map(math.isfinite, values)) else ()

    kind = (
        kind or _kind_of(text("0008|0016")) or _kind_of_image(text("0008|0060"), text("0008|0008"), text("0028|1054"))
    )
    if not kind and (reader.GetNumberOfComponents() > 1 or reader.GetPixelID() not in VOXEL_BYTES):
        kind = "colour image"
    columns, rows, *frames = reader.GetSize()
    row_step, column_step = numbers("0028|0030", 2) or (0.0, 0.0)
    scale = (*(numbers("0028|1053", 1) or (1.0,)), *(numbers("0028|1052", 1) or (0.0,)))
    return Slice(
        path,
        text("0020|000e") or "0.0",
        hashlib.sha256(patient.encode()).hexdigest()[:16] if (patient := text("0010|0020")) else "",
        text("0008|103e"),
        text("0020|0013"),
        (rows, columns),
        (column_step, row_step) if min(row_step, column_step) > 0 else (),
        numbers("0020|0032", 3),
        numbers("0020|0037", 6),
        scale,
        _padding(numbers("0028|0120", 1), numbers("0028|0121", 1), text("0028|0103") == "1", scale),
        reader.GetPixelID(),
        max(frames, default=1),
        rows * columns * max(frames, default=1) * int(*numbers("0028|0100", 1) or (0,)) // 8,
        numbers("0020|1041", 1),
        kind,
    )


def _kind_of(of_class: str) -> str:
    """What an object is by its class; '' for a CT image and for one that does not say."""
    for start, kind in OTHER_OBJECTS.items():
        if of_class == start or of_class.startswith(f"{start}."):
            return kind
    return ""


def _kind_of_image(modality: str, image_type: str, unit: str) -> str:
    """What an image is by its header, where it is no CT in HU."""
    if modality != "CT":
        return f"{modality or 'image without modality'}"
    words = set(image_type.upper().split("\\"))
    if words & SCOUTS:
        return "scout"
    if words & MEASURES or unit not in ("", "HU", "US"):  # US: unspecified, as many scanners say of HU
        return f"map of another measure ({unit or image_type})"
    return ""


def _padding(
    value: tuple[float, ...], limit: tuple[float, ...], is_signed: bool, scale: tuple[float, ...]
) -> tuple[float, ...]:
    """Range of the values of voxels that were not measured, after scaling."""
    stored = [number - 65536 if is_signed and number > 32767 else number for number in (*value, *limit)]
    scaled = [number * scale[0] + scale[1] for number in stored]
    return (min(scaled), max(scaled)) if value else ()


def _common_folder(images: Sequence[Slice]) -> Path:
    """The innermost folder in which all files of a series lie."""
    first, *others = sorted({image.path.parent for image in images})
    return next(folder for folder in (first, *first.parents) if all(other.is_relative_to(folder) for other in others))


def _sum_up(series: dict[str, list[Slice]]) -> str:
    """What series there are, in words."""
    words = [(uid, f"{len(images)} images", images[0].description) for uid, images in series.items()]
    return "; ".join(f"{uid} ({', '.join(filter(None, what))})" for uid, *what in words)


# ------------------------------------------------------------------------------------------------------------ stacks


def _stack_of(name: str, images: Sequence[Slice]) -> Stack:
    """Puts slices in order.

    Raises:
        InputError: They are no even stack of parallel images of one size, with the reason and the slice.
    """
    if images[0].frames > 1:
        check(len(images) == 1, f"{name} holds {len(images)} multi-frame images; choose one file")
        images = _frames_of(images[0])
    check(len(images) >= MIN_SLICES, f"{name} has one image; a scan has several")
    for image in images:
        missing = [what for what in ("position", "orientation", "spacing") if not getattr(image, what)]
        check(not missing, f"{name}: {image} states no {' and no '.join(missing)}; export the series again")
    first = images[0]
    for image in images:
        check(image.size == first.size, f"{name}: {image} has {image.size} pixels, {first} has {first.size}")
    for what, tolerance in (("spacing", 1e-3), ("orientation", 1e-3)):
        values = np.array([getattr(image, what) for image in images])
        apart = np.abs(values - values[0]).max(axis=1)
        other = images[int(apart.argmax())]
        check(
            bool(apart.max() <= tolerance),
            f"{name}: {other} has another {what} than {first} ({getattr(other, what)}, not {getattr(first, what)}); "
            "these are several scans in one series",
        )
    rows, columns = np.reshape(first.orientation, (2, 3))
    lengths = np.linalg.norm([rows, columns], axis=1)
    check(
        np.allclose(lengths, 1, atol=1e-3) and abs(rows @ columns) < 1e-3,
        f"{name}: the rows and columns of {first} are not at right angles",
    )
    normal = np.cross(rows, columns)
    normal /= np.linalg.norm(normal)
    images = sorted(images, key=lambda image: float(normal @ image.position))
    places = np.array([image.position for image in images])
    heights = places @ normal
    _check_steps(name, images, heights)
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
    size = (len(images), *first.size)
    (dx, dy), origin = first.spacing, places[0]
    aside = step - (normal @ step) * normal
    if np.linalg.norm(aside) * (len(images) - 1) <= allowed:
        direction = np.column_stack([rows, np.cross(normal, rows), normal])
        return Stack(tuple(images), _geometry(size, origin, (dx, dy, float(normal @ step)), direction))
    return _askew(tuple(images), size, origin, np.column_stack([dx * rows, dy * columns, step]))


def _check_steps(name: str, images: Sequence[Slice], heights: np.ndarray) -> None:
    """Raises InputError where an image is there twice, or one is missing."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    for (image, following), step in zip(itertools.pairwise(images), steps, strict=True):
        check(
            step > max(0.01, 0.1 * usual),
            f"{name}: {image} and {following} lie at the same place; is one a copy? remove it",
        )
    for (image, following), step in zip(itertools.pairwise(images), steps, strict=True):
        check(
            step < GAP_STEPS * usual,
            f"{name}: {round(step / usual) - 1 or 'some'} image(s) missing between {image} and {following}: a step of "
            f"{step:g} mm where others are {usual:g} mm; copy or export the series again",
        )


def _check_locations(name: str, images: Sequence[Slice]) -> None:
    """Raises InputError where the locations on the table are uneven, though the positions are not."""
    locations = [image.location[0] for image in images if image.location]
    steps = np.abs(np.diff(locations))
    if len(locations) < len(images) or not steps.min() > 0.01:  # some programs write one number into all
        return
    uneven = int(np.abs(steps - np.median(steps)).argmax())
    check(
        steps.max() < GAP_STEPS * steps.min(),
        f"{name}: uneven steps: SliceLocation goes on by {steps[uneven]:.2f} mm from {images[uneven]} to "
        f"{images[uneven + 1]}, and by {np.median(steps):.2f} mm elsewhere, which its positions do not; one of the two "
        "is wrong; ask where the series comes from, or export it again",
    )


def _geometry(size: Sequence[int], origin: np.ndarray, spacing: Sequence[float], direction: np.ndarray) -> Geometry:
    x, y, z = map(float, origin)
    dx, dy, dz = map(float, spacing)
    return Geometry((size[0], size[1], size[2]), (x, y, z), (dx, dy, dz), tuple(direction.ravel().tolist()))


def _askew(images: tuple[Slice, ...], size: tuple[int, int, int], origin: np.ndarray, axes: np.ndarray) -> Stack:
    """The stack of a tilted gantry, whose slices step sideways, with an upright grid around it.

    Args:
        images: In order.
        size: (z, y, x).
        origin: Centre of the first voxel.
        axes: (3, 3), whose columns are the steps from voxel to voxel along x, y and z.
    """
    spacing = np.array([*images[0].spacing, np.linalg.norm(axes[:, 2])])
    up = axes[:, 2] / spacing[2]
    across = axes[:, 0] - (axes[:, 0] @ up) * up
    across /= np.linalg.norm(across)
    direction = np.column_stack([across, np.cross(up, across), up])
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(size[::-1]) - 1)
    places = (corners @ axes.T) @ direction  # mm along the axes of the upright grid, from the origin
    low, high = places.min(axis=0), places.max(axis=0)
    grid_size = np.ceil((high - low) / spacing - 1e-6).astype(int) + 1
    inverse = np.linalg.inv(axes)
    to_index = np.column_stack([inverse, -inverse @ origin])
    size = grid_size[::-1].tolist()
    return Stack(images, _geometry(size, origin + direction @ low, spacing.tolist(), direction), to_index)


# ------------------------------------------------------------------------------------------------------------ voxels


def _pixel_of(images: Sequence[Slice]) -> int:
    """ITK's type of the scan's voxels: that of its images, or float where they are scaled differently."""
    if len({(image.pixel, image.scale) for image in images}) == 1:
        return images[0].pixel
    return sitk.sitkFloat32


def _read_by_itk(images: Sequence[Slice]) -> sitk.Image:
    """The images in their order, scaled; raises RuntimeError where ITK cannot decode them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(image.path) for image in images])
    reader.SetImageIO("GDCMImageIO")
    reader.SetOutputPixelType(_pixel_of(images))
    return reader.Execute()


def _without_padding(image: sitk.Image, images: Sequence[Slice]) -> sitk.Image:
    """Air instead of voxels that were not measured, where their value could be taken for tissue."""
    paddings = {padded.padding for padded in images if padded.padding and padded.padding[1] > -1000}
    if not paddings:
        return image
    array = sitk.GetArrayFromImage(image)
    for number, padded in enumerate(images):
        if padded.padding in paddings:
            low, high = padded.padding
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


def _pydicom() -> Any:
    """The optional library.

    Raises:
        UserError: It is missing.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"this DICOM file needs pydicom: pip install '{PYDICOM}'") from error
    return pydicom


def _frames_of(image: Slice) -> list[Slice]:
    """The frames of a multi-frame image, each as a slice whose ``number`` counts from 1."""
    data = _pydicom().dcmread(image.path, stop_before_pixels=True)
    shared = data.get("SharedFunctionalGroupsSequence") or [{}]
    groups = data.get("PerFrameFunctionalGroupsSequence") or []
    check(len(groups) == image.frames, f"{image.path} says nothing of the places of its {image.frames} frames")

    def value(group: Any, sequence: str, name: str, default: Any = ()) -> Any:
        items = group.get(sequence) or shared[0].get(sequence)
        found = items[0].get(name, default) if items else default
        return default if found is None else found

    slices = []
    for number, group in enumerate(groups, start=1):
        unit = value(group, "PixelValueTransformationSequence", "RescaleType", "HU")
        frame_type = value(group, "CTImageFrameTypeSequence", "FrameType", ["ORIGINAL"])
        kind = _kind_of_image("CT", "\\".join(frame_type), unit)
        check(not kind, f"{image.path}: frame {number} is a {kind}, no CT in HU")
        spacing = tuple(map(float, value(group, "PixelMeasuresSequence", "PixelSpacing")))
        slope, intercept = (
            float(value(group, "PixelValueTransformationSequence", name, default))
            for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        slices.append(
            replace(
                image,
                number=f"{number}",
                spacing=spacing[::-1],
                position=tuple(map(float, value(group, "PlanePositionSequence", "ImagePositionPatient"))),
                orientation=tuple(map(float, value(group, "PlaneOrientationSequence", "ImageOrientationPatient"))),
                scale=(slope, intercept),
                pixel=sitk.sitkFloat32,
            )
        )
    return slices


def _read_by_pydicom(images: Sequence[Slice]) -> sitk.Image:
    """The images, or the frames of one, in their order and scaled."""
    pydicom = _pydicom()
    stored = {path: pydicom.dcmread(path).pixel_array for path in {image.path for image in images}}
    scaled = []
    for image in images:
        pixels = stored[image.path] if image.frames == 1 else stored[image.path][int(image.number) - 1]
        scaled.append(pixels * image.scale[0] + image.scale[1])
    array = np.stack(scaled)
    return sitk.GetImageFromArray(array.astype(np.float32 if _pixel_of(images) == sitk.sitkFloat32 else np.int32))
