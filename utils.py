"""What all scripts share: the scan and its geometry, safe files, seeds and devices.

Arrays are indexed (z, y, x). Patient coordinates and SimpleITK's vectors are (x, y, z) in LPS millimetres, the frame of
LUNA16's ``annotations.csv`` and of ITK. The order changes in ``Geometry`` and in the readers and writers only.
"""

from __future__ import annotations

import atexit
import codecs
import csv
import gc
import gzip
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Vector = tuple[float, float, float]
Shape = tuple[int, int, int]

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PIECE_MM = 100  # of no chest
UNKNOWN_DIAMETER_MM = 10.0  # of a finding with a diameter of -1, as in LUNA16's official script
IGNORED = 2  # in the masks of training samples: neither nodule nor background
# Columns of LUNA16's tables; positions are world positions in mm.
POSITION_COLUMNS = ("coordX", "coordY", "coordZ")
ANNOTATION_COLUMNS = ("seriesuid", *POSITION_COLUMNS, "diameter_mm")
CANDIDATE_COLUMNS = ("seriesuid", *POSITION_COLUMNS, "probability")
# Deflate cannot shrink data further than this, so a header that claims more voxels is wrong.
MAX_DEFLATE_RATIO = 1100
GZIP_MAGIC = b"\x1f\x8b"
UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*)){3,}")  # of a series; no date is one
VOXEL_BYTES = {
    **dict.fromkeys((sitk.sitkInt8, sitk.sitkUInt8), 1),
    **dict.fromkeys((sitk.sitkInt16, sitk.sitkUInt16), 2),
    **dict.fromkeys((sitk.sitkInt32, sitk.sitkUInt32, sitk.sitkFloat32), 4),
    **dict.fromkeys((sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkFloat64), 8),
}


# ------------------------------------------------------------------------------------------------------------ errors


class InputError(ValueError):
    """What a user gave cannot be used; the message says what must hold, what came, and what to do."""


class UserError(RuntimeError):
    """What went wrong while running and can be mended by the user, such as a lack of memory; the message says how."""


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line; a bug is called unexpected."""
    if is_lack_of_memory(error):
        return "it does not fit into memory; end other programs, or use smaller sizes"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if is_mendable(error) else f"unexpected {type(error).__name__}: {text}"


def is_mendable(error: BaseException) -> bool:
    """Whether an error is the user's to mend, and no bug of ours."""
    is_missing_package = isinstance(error, ImportError) and error.name is None  # raised by us, not by an import
    return isinstance(error, InputError | UserError | OSError) or is_missing_package or is_lack_of_memory(error)


def is_lack_of_memory(error: BaseException) -> bool:
    """Of main memory; torch and SimpleITK say it in a plain RuntimeError."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


@contextmanager
def noting(failures: dict[str, Exception], name: str, hide: Callable[[str], str] = str) -> Iterator[None]:
    """Notes and logs what goes wrong with one scan, so that the others go on; a bug keeps its traceback in the log.

    ``hide`` takes out of the reason what the log must not show.
    """
    try:
        yield
    except Exception as error:
        failures[name] = error
        reason = hide(reason_of(error))
        logger.error("%s: %s", name, reason, exc_info=error if reason.startswith("unexpected") else None)
        traceback.clear_frames(error.__traceback__)  # the error is kept, and the scan's arrays are not


def check(condition: bool, message: str) -> None:
    """Raises InputError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


# ---------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Box:
    """A box of voxels.

    Args:
        lower: First voxel (z, y, x).
        upper: One past the last voxel (z, y, x).
    """

    lower: Shape
    upper: Shape

    @classmethod
    def between(cls, lower: npt.ArrayLike, upper: npt.ArrayLike) -> Box:
        """The box from its first voxel up to the voxel after its last one."""
        z, y, x = ((int(first), int(end)) for first, end in zip(np.asarray(lower), np.asarray(upper), strict=True))
        return cls((z[0], y[0], x[0]), (z[1], y[1], x[1]))

    @classmethod
    def of_size(cls, lower: npt.ArrayLike, shape_zyx: npt.ArrayLike) -> Box:
        """The box of a shape whose first voxel is ``lower``."""
        return cls.between(lower, np.asarray(lower) + shape_zyx)

    @classmethod
    def around(cls, mask: np.ndarray) -> Box | None:
        """The smallest box around all that is not 0 in an array (z, y, x); None where there is nothing."""
        spans = [np.flatnonzero(mask.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
        if not len(spans[0]):
            return None
        z, y, x = ((int(span[0]), int(span[-1]) + 1) for span in spans)
        return cls((z[0], y[0], x[0]), (z[1], y[1], x[1]))

    @property
    def shape_zyx(self) -> Shape:
        """Number of voxels (z, y, x)."""
        z, y, x = (upper - lower for lower, upper in zip(self.lower, self.upper, strict=True))
        return z, y, x

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index that cuts the box out of an array (z, y, x)."""
        z, y, x = (slice(lower, upper) for lower, upper in zip(self.lower, self.upper, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an array lie in the patient.

    Args:
        shape_zyx: Number of voxels (z, y, x).
        origin: World position (x, y, z) of the centre of voxel 0, in mm.
        spacing: Distance (x, y, z) between voxel centres, in mm.
        direction: Direction cosines, row-major 3 x 3; column i is the world direction of index axis i (x, y, z).
    """

    shape_zyx: Shape
    origin: Vector
    spacing: Vector
    direction: tuple[float, ...] = IDENTITY

    @classmethod
    def from_image(cls, image: sitk.Image) -> Geometry:
        """Geometry of a SimpleITK image."""
        return cls(image.GetSize()[::-1], image.GetOrigin(), image.GetSpacing(), image.GetDirection())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Geometry:
        """Takes back what ``to_dict`` gave."""
        return cls(**{name: tuple(value) for name, value in values.items()})

    @classmethod
    def covering(
        cls,
        lower: npt.ArrayLike,
        upper: npt.ArrayLike,
        *,
        shape_zyx: Shape | None = None,
        spacing: Vector | None = None,
    ) -> Geometry:
        """Grid of identity direction over a world box, voxel edge to voxel edge.

        Args:
            lower: Lowest corner (x, y, z) in mm.
            upper: Highest corner (x, y, z) in mm.
            shape_zyx: Number of voxels; the spacing follows from it.
            spacing: Voxel size (x, y, z) in mm, used when no shape is given; the box grows to whole voxels.
        """
        lower, extent = np.asarray(lower, float), np.subtract(upper, lower)
        if shape_zyx is None:
            size_xyz = np.maximum(np.ceil(extent / np.asarray(spacing) - 1e-3), 1)
            step = np.asarray(spacing, float)
        else:
            size_xyz = np.asarray(shape_zyx[::-1])
            step = extent / size_xyz
        shape = tuple(int(n) for n in size_xyz[::-1])
        return cls(shape, tuple((lower + step / 2).tolist()), tuple(step.tolist()))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Built-in types only, for JSON."""
        return {name: list(value) for name, value in asdict(self).items()}

    def _matrix(self) -> np.ndarray:
        """(3, 3) matrix that takes an index step (x, y, z) to a world step (x, y, z)."""
        return np.asarray(self.direction).reshape(3, 3) * np.asarray(self.spacing)

    def world(self, index_zyx: npt.ArrayLike) -> np.ndarray:
        """World positions (x, y, z) in mm of float indices (z, y, x); shape (..., 3) both."""
        index_xyz = np.asarray(index_zyx, float)[..., ::-1]
        return index_xyz @ self._matrix().T + np.asarray(self.origin)

    def index(self, world_xyz: npt.ArrayLike) -> np.ndarray:
        """Float indices (z, y, x) of world positions (x, y, z) in mm; shape (..., 3) both."""
        offset = np.asarray(world_xyz, float) - np.asarray(self.origin)
        return (offset @ np.linalg.inv(self._matrix()).T)[..., ::-1]

    def contains(self, world_xyz: npt.ArrayLike) -> np.ndarray:
        """Whether world positions (..., 3) lie within the voxels, edges included; bool (...)."""
        index = self.index(world_xyz)
        return np.all((index >= -0.5) & (index <= np.asarray(self.shape_zyx) - 0.5), axis=-1)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner (x, y, z) in mm of the axis-aligned box around all voxels, edge to edge."""
        corners = self.corners()
        return corners.min(axis=0), corners.max(axis=0)

    def corners(self) -> np.ndarray:
        """(8, 3) the outer corners (x, y, z) in mm, half a voxel beyond the centres of the outermost voxels."""
        return self.world(np.array(list(np.ndindex(2, 2, 2))) * self.shape_zyx - 0.5)

    def cropped(self, box: Box) -> Geometry:
        """Geometry of the sub-array ``array[box.slices]``."""
        x, y, z = self.world(box.lower).tolist()
        return Geometry(box.shape_zyx, (x, y, z), self.spacing, self.direction)

    def spacing_along_axes(self) -> np.ndarray:
        """Finest sampling distance (x, y, z) in mm met when walking along each world axis."""
        voxels_per_mm = np.abs(np.asarray(self.direction).reshape(3, 3)) / np.asarray(self.spacing)
        return 1.0 / voxels_per_mm.max(axis=1)

    @property
    def is_piece(self) -> bool:
        """Whether it is smaller than PIECE_MM in all directions: a piece of a scan, such as a cube around a nodule."""
        lower, upper = self.bounds()
        return bool((upper - lower < PIECE_MM).all())

    @property
    def is_axis_aligned(self) -> bool:
        """Whether every array axis runs along its own world axis, in either sense."""
        return bool(np.allclose(np.abs(np.reshape(self.direction, (3, 3))), np.eye(3), atol=1e-6))

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel."""
        return float(np.prod(self.spacing))

    @property
    def spacing_zyx(self) -> Vector:
        """Voxel size in array order (z, y, x), in mm."""
        x, y, z = self.spacing
        return z, y, x

    def image(self, array: np.ndarray) -> sitk.Image:
        """SimpleITK image of an array (z, y, x) that lies on this grid."""
        image = sitk.GetImageFromArray(array)
        image.SetOrigin(self.origin)
        image.SetSpacing(self.spacing)
        image.SetDirection(self.direction)
        return image


def resample(
    image: sitk.Image, grid: Geometry, *, linear: bool = True, fill: float = 0.0, pixel_type: int = sitk.sitkFloat32
) -> sitk.Image:
    """Samples an image once at the voxel centres of ``grid``; ``fill`` outside of it."""
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in grid.shape_zyx[::-1]])
    resampler.SetOutputOrigin(grid.origin)
    resampler.SetOutputSpacing(grid.spacing)
    resampler.SetOutputDirection(grid.direction)
    resampler.SetInterpolator(sitk.sitkLinear if linear else sitk.sitkNearestNeighbor)
    resampler.SetDefaultPixelValue(float(fill))
    resampler.SetOutputPixelType(pixel_type)
    return resampler.Execute(image)


def draw_sphere(grid: Geometry, center_xyz: npt.ArrayLike, diameter_mm: float) -> np.ndarray:
    """Voxels of a ball.

    Args:
        grid: Geometry of the array; identity direction.
        center_xyz: World position in mm.
        diameter_mm: Diameter.

    Returns:
        Int array (m, 3) of indices (z, y, x): the voxels whose centre lies inside the sphere, or the nearest voxel
        where none does; empty where the ball lies off the grid.
    """
    shape = np.asarray(grid.shape_zyx)
    index = grid.index(center_xyz)
    reach = diameter_mm / 2 / np.asarray(grid.spacing_zyx)
    first = np.clip(np.ceil(index - reach), 0, shape).astype(int)
    last = np.clip(np.floor(index + reach) + 1, 0, shape).astype(int)
    axes = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    voxels = voxels[np.linalg.norm(grid.world(voxels) - center_xyz, axis=-1) <= diameter_mm / 2]
    if not len(voxels) and grid.contains(center_xyz):
        voxels = np.clip(np.rint(index), 0, shape - 1).astype(int)[None]
    return voxels


def signed_distance(mask: sitk.Image) -> sitk.Image:
    """Float distance in mm to the border of a binary mask, negative inside.

    ITK's map counts from the centres of the voxels at the border; the mean of the maps from either side counts from the
    border itself.
    """
    inside, outside = (
        sitk.SignedMaurerDistanceMap(side, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
        for side in (mask, sitk.Not(mask))
    )
    return (inside - outside) / 2


# --------------------------------------------------------------------------------------------------------- raw scans


@dataclass(frozen=True)
class ScanHeader:
    """What is known of a scan before its voxels are read.

    Args:
        geometry: Where its voxels lie.
        voxel_bytes: Bytes that one voxel takes.
    """

    geometry: Geometry
    voxel_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes that all voxels take."""
        return math.prod(self.geometry.shape_zyx) * self.voxel_bytes


class ScanReader:
    """Reads one format of scans; all that the project knows of a scan's files it knows through their reader.

    As it stands, it reads one file by ITK. A subclass names its suffixes and adds what ITK would let pass. One for
    scans of another kind, such as folders, says itself which paths it accepts, which files these are, and how their
    header and voxels are read; an instance of it in ``SCAN_READERS`` is all that ``read_scan`` needs. The project's own
    are in ``data/formats.py`` and ``data/dicom.py``.
    """

    suffixes: tuple[str, ...] = ()
    image_io = ""  # ITK's name of the format; without it, ITK goes by the suffix, which it wants in lower case

    def accepts(self, path: Path) -> bool:
        """Whether a path is for this reader, by its name or by what is there; a missing file has a reader, too."""
        return path.name.lower().endswith(self.suffixes) and not path.is_dir()

    def advice(self, path: Path) -> str:
        """What to do with a path that no reader accepts, where this reader knows it; else empty."""
        return ""

    def name(self, path: Path) -> str:
        """Name of the scan: that of the file without its suffix."""
        suffix = next((suffix for suffix in self.suffixes if path.name.lower().endswith(suffix)), "")
        return path.name[: len(path.name) - len(suffix)]

    def patient(self, path: Path) -> str:
        """Whose scan it is, under another name than the patient's own; '' where its files do not say."""
        return ""

    def expand(self, path: Path) -> list[Path]:
        """The scans that a path of this format stands for: itself, where it cannot hold several."""
        return [path]

    def search(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the paths in a folder that are scans of this format."""
        return [path for path in paths if self.accepts(path)]

    def files(self, path: Path) -> tuple[Path, ...]:
        """The files that a scan consists of: the one with the header first, those with the voxels alone after it.

        Raises:
            FileNotFoundError: One of them is missing.
            InputError: The header does not say which they are.
        """
        if not path.is_file():
            raise FileNotFoundError(f"scan {path} does not exist")
        return (path,)

    def fingerprint(self, path: Path) -> tuple[str, list[tuple[int, int]]]:
        """What differs between scans and is read in no time: the first 64 KB, and size and time stamp of each file.

        Raises:
            FileNotFoundError: A file is missing.
            InputError: The header cannot be read.
        """
        files = self.files(path)
        states = [file.stat() for file in files]
        return first_bytes(files[0]).decode("latin-1"), [(state.st_size, state.st_mtime_ns) for state in states]

    def header(self, path: Path) -> ScanHeader:
        """Reads and checks the header.

        Raises:
            FileNotFoundError: A file is missing.
            InputError: The header cannot be read, or is not that of a 3-D scalar volume.
        """
        self.files(path)
        header = self.read_header(path)
        _check_geometry(path, header.geometry)
        return header

    def read_header(self, path: Path) -> ScanHeader:
        """Reads the header without checking where the voxels lie."""
        reader = self._itk_reader(path)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise InputError(
                f"{path} has no readable header; copy or download it again ({last_line(error)})"
            ) from error
        size_xyz, components, pixel = reader.GetSize(), reader.GetNumberOfComponents(), reader.GetPixelID()
        check(
            reader.GetDimension() == 3 and components == 1 and min(size_xyz) >= 2,
            f"{path} must be a 3-D scan with one value a voxel, not size {size_xyz} with {components} component(s)",
        )
        check(pixel in VOXEL_BYTES, f"{path} must hold real numbers, not {sitk.GetPixelIDValueAsString(pixel)}")
        geometry = Geometry(size_xyz[::-1], reader.GetOrigin(), reader.GetSpacing(), reader.GetDirection())
        return ScanHeader(geometry, VOXEL_BYTES[pixel])

    def check_voxels(self, path: Path, expected: int) -> None:
        """Compares the voxels that the header claims with what the files hold, before memory is asked for.

        Args:
            path: The scan.
            expected: Bytes that its voxels take by the header.

        Raises:
            InputError: The files cannot hold them.
        """
        files = self.files(path)
        size = sum(file.stat().st_size for file in files[1:] or files)
        check(
            expected <= size * MAX_DEFLATE_RATIO,
            f"{path} claims {expected:,} bytes of voxels but its file has only {size:,} bytes",
        )

    def read_image(self, path: Path) -> sitk.Image:
        """Reads the voxels of a scan whose header and files have been checked."""
        try:
            return self._itk_reader(path).Execute()
        except RuntimeError as error:
            raise InputError(f"{path} cannot be read; copy or download it again ({last_line(error)})") from error

    def _itk_reader(self, path: Path) -> sitk.ImageFileReader:
        check_name(path)
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.SetImageIO(self.image_io)
        return reader


NO_SCAN = "no scan in {}: no .mhd, .mha, .nii, .nii.gz or .nrrd file, no DICOM series, and no .zip of them"
SCAN_READERS: list[ScanReader] = []  # a user's own


def _scan_readers() -> list[ScanReader]:
    """``SCAN_READERS``, then those of the project, which build upon this module."""
    from data.dicom import DicomReader
    from data.formats import MetaImageReader, NiftiReader, NrrdReader

    return [*SCAN_READERS, MetaImageReader(), NiftiReader(), NrrdReader(), DicomReader()]


def scan_reader(path: str | Path) -> ScanReader:
    """The reader for a scan: the first that accepts the path, those in ``SCAN_READERS`` first.

    Raises:
        FileNotFoundError: Nothing is there.
        InputError: No reader accepts the path.
    """
    path, readers = Path(path), _scan_readers()
    for reader in readers:
        if reader.accepts(path):
            return reader
    for reader in readers:
        if advice := reader.advice(path):
            raise InputError(advice)
    if path.is_dir():
        raise FileNotFoundError(NO_SCAN.format(path))
    if not path.suffix and not path.exists():
        raise FileNotFoundError(f"scan {path} does not exist")
    suffixes = ", ".join(suffix for reader in readers for suffix in reader.suffixes)
    raise InputError(f"a scan must be one of {suffixes}, or a folder or .zip of DICOM files, not {path.name!r}")


def list_scans(path: str | Path, failed: dict[str, Exception] | None = None) -> list[Path]:
    """The scans that a path stands for, each as ``read_scan`` takes it.

    Args:
        path: A scan; or a folder or .zip of scans of any formats, wherever they lie in it. An archive in a folder is
            passed over where a folder of its name lies beside it.
        failed: Takes {path: error} of the archives in a folder that cannot be unpacked. None raises the first of them.

    Returns:
        Files, and addresses of DICOM series (see ``data/dicom.py``), sorted for each format.

    Raises:
        FileNotFoundError: Nothing is there, or no scan.
        InputError: There is no CT, or an archive cannot be unpacked.
    """
    path, readers = Path(path), _scan_readers()
    folder = unpack(path) if is_zip(path) else path
    if not folder.is_dir():
        return scan_reader(folder).expand(folder)
    paths, failed_before = list(walk(folder)), len(failed or ())
    found = [scan for reader in readers for scan in reader.search(paths)]
    for archive in filter(is_zip, paths):
        if archive.with_suffix("").is_dir():
            continue
        try:
            found += list_scans(archive, failed)
        except FileNotFoundError:
            logger.info(
                "an archive holds no scan: %s", archive.name if failed is None else "one of those in the folder"
            )
        except InputError as error:
            if failed is None:
                raise
            failed[str(archive)] = error
    if not found and len(failed or ()) == failed_before:
        advice = next(filter(None, (reader.advice(folder) for reader in readers)), "")
        check(not advice, advice.replace(str(folder), str(path)))
        raise FileNotFoundError(NO_SCAN.format(path))
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Itself and all folders and files below, sorted; links are followed, each folder once; without macOS's ``._*``."""
    seen: set[tuple[int, int]] = set()

    def tell_unreadable(error: OSError) -> None:
        """Says it without the folder's name, which may be a patient's."""
        logger.warning("a folder cannot be looked into (%s)", error.strerror)

    for place, folders, files in os.walk(folder, followlinks=True, onerror=tell_unreadable):
        state = Path(place).stat()
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.sort()
        yield Path(place)
        yield from (Path(place, name) for name in sorted(files) if not is_of_macos(Path(name)))


def is_zip(path: Path) -> bool:
    """Whether a file is a .zip archive, by its name."""
    return path.suffix.lower() == ".zip" and path.is_file()


UNPACKED: dict[tuple[Path, int, int], Path] = {}  # {(archive, its size, its time stamp): folder}, of this process
UNPACKED_NAME = "scans-{}-{}-"  # the machine, and the process


def unpack(archive: Path) -> Path:
    """Unpacks a .zip into a folder that is there until the process ends; its files have the archive's time stamp.

    Raises:
        InputError: The archive is damaged, has a password, or is larger than the disk.
    """
    archive, state = archive.absolute(), archive.stat()
    key = (archive, state.st_size, state.st_mtime_ns)
    if key in UNPACKED:
        return UNPACKED[key]
    _delete_unpacked_of_dead_processes()
    folder = Path(tempfile.mkdtemp(prefix=UNPACKED_NAME.format(_machine(), os.getpid())))
    atexit.register(_delete_unpacked, folder, os.getpid())
    try:
        with zipfile.ZipFile(archive) as file:
            needed, free = sum(member.file_size for member in file.infolist()), shutil.disk_usage(folder).free
            check(needed < free, f"{archive} takes {needed / 1e9:.1f} GB unpacked, {folder} has {free / 1e9:.1f} GB")
            file.extractall(folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error, EOFError) as error:
        raise InputError(f"{archive} cannot be unpacked ({error}); unpack it yourself and name its folder") from error
    for path in walk(folder):
        os.utime(path, ns=(state.st_mtime_ns, state.st_mtime_ns))
    UNPACKED[key] = folder
    return folder


def _delete_unpacked(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked
        shutil.rmtree(folder, ignore_errors=True)


def _delete_unpacked_of_dead_processes() -> None:
    """Deletes what killed processes of this machine have left; it may be patients' images."""
    import psutil

    for folder in Path(tempfile.gettempdir()).glob(UNPACKED_NAME.format(_machine(), "*") + "*"):
        pid = folder.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def origin_of(path: Path) -> Path:
    """Where a scan comes from: its absolute path, or its place in the archive that it was unpacked from."""
    for (archive, *_), folder in UNPACKED.items():
        if path.is_relative_to(folder):
            return archive / path.relative_to(folder)
    return path.absolute()


def is_readable_name(name: str | Path) -> bool:
    """Whether a name is UTF-8: at another one ITK ends the process."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_name(path: Path) -> None:
    """Raises InputError where the name of a scan is no UTF-8."""
    check(is_readable_name(path), f"the name {os.fsencode(path).decode(errors='replace')} is no UTF-8; rename it")


def is_of_macos(path: Path) -> bool:
    """Whether a file is one that macOS puts beside another for its own attributes, named alike."""
    return path.name.startswith("._")


def scan_name(path: str | Path) -> str:
    """Name of a scan: that of its file without suffix; for LUNA16 the series UID."""
    return scan_reader(path).name(Path(path))


def only_scan(path: str | Path) -> Path:
    """The one scan that a path stands for.

    Raises:
        InputError: It stands for several.
    """
    scans = list_scans(path)
    check(len(scans) == 1, f"{path} holds {len(scans)} scans; name one: {', '.join(scan.name for scan in scans[:5])}")
    return scans[0]


def read_scan(path: str | Path, *, constant: bool = False) -> sitk.Image:
    """Reads a 3-D scan after checking what SimpleITK would let pass.

    Args:
        path: .mhd, .mha, .nii, .nii.gz or .nrrd file; a folder, .zip or file of one DICOM series, or the address of one
            (see ``list_scans``); or whatever else a reader in ``SCAN_READERS`` accepts.
        constant: Whether one value everywhere is allowed, as in an empty mask.

    Returns:
        Scalar image with finite values and orthonormal direction.

    Raises:
        FileNotFoundError: The file, or the data file its header names, is missing.
        ValueError: Header and data contradict each other, or the image is no 3-D scalar volume.
    """
    path = only_scan(path) if is_zip(Path(path)) else Path(path)
    check_name(path)
    reader = scan_reader(path)
    reader.check_voxels(path, reader.header(path).num_bytes)
    image = reader.read_image(path)
    _check_values(path, image, constant)
    return image


def first_bytes(path: Path) -> bytes:
    """The first 64 KB of a file, in which its header lies."""
    with open(path, "rb") as file:
        return file.read(65536)


def decode(text: bytes) -> str:
    """Text as UTF-8 or, where it is none, as Latin-1."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def last_line(error: BaseException) -> str:
    """The last line of an error's text, in which ITK says what went wrong."""
    return str(error).strip().split("\n")[-1].strip()


def _check_geometry(path: Path, geometry: Geometry) -> None:
    spacing, origin = np.asarray(geometry.spacing), np.asarray(geometry.origin)
    matrix = np.asarray(geometry.direction).reshape(3, 3)
    check(
        bool(np.isfinite(spacing).all() and (spacing > 0).all() and np.isfinite(origin).all()),
        f"{path}: spacing must be positive and origin finite, not {spacing.tolist()}, {origin.tolist()}",
    )
    check(
        np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-3),
        f"{path}: direction must be a rotation or flip, not {np.round(matrix, 4).tolist()}",
    )


def _check_values(path: Path, image: sitk.Image, constant: bool) -> None:
    values = sitk.GetArrayViewFromImage(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(f"{path} has {bad:,} voxels that are not finite; replace them by -1000 (air)")
    if not constant and values.min() == values.max():
        raise InputError(f"{path} holds one value, {values.min()}, everywhere: it is no scan")


# ------------------------------------------------------------------------------------------------------------- files


MAX_ROW_BYTES = 65536  # of a table; how far back its last whole row is looked for
PARTIAL = ".partial-"  # how the name of a file that is being written begins
PARTIAL_DAYS = 1  # after so many days without a change a partial file of another machine counts as left behind
_tidy_folders: set[Path] = set()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; renames it to ``path`` once it is written and on the disk.

    A run that is killed, or a disk that fills up, leaves the old file or none, never half of one. What a killed run
    leaves behind is deleted by the next process that writes into the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _tidy_folders:
        _tidy_folders.add(path.parent)
        _delete_partial_files(path.parent)
    # Unique among processes and machines. The suffix stays, because writers choose the format by it.
    temporary = path.with_name(f"{PARTIAL}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        with naming(path, temporary):
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Lets an error of writing name the file or folder; a full disk names none, and torch calls it a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        is_of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
        file, number = getattr(error, "filename", None), getattr(error, "errno", None)
        is_nameless = isinstance(error, OSError) and (file is None or Path(file) == temporary)
        is_ours = number is None and str(path) in str(error)
        if is_ours or not (is_nameless or is_of_torch):
            raise
        kind = OSError if is_of_torch else type(error)
        reason = os.strerror(number) if number else "is the disk full?" if is_of_torch else last_line(error)
        free = shutil.disk_usage(path.parent).free / 1e6
        raise kind(
            f"{path} could not be written ({reason}; {free:,.0f} MB are free); what was there before is intact. Make "
            "room or name another folder, then run the same command again"
        ) from error


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _machine() -> str:
    """Eight hex digits for this machine, or this container, within which process numbers are unique."""
    namespace = Path("/proc/self/ns/pid")
    name = f"{platform.node()} {namespace.readlink() if namespace.exists() else ''}"
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _delete_partial_files(folder: Path) -> None:
    """Deletes the partial files in a folder whose process is dead, or that nobody has touched for long."""
    import psutil

    for path in folder.glob(f"{PARTIAL}*"):
        machine, pid, *_ = [*path.name.removeprefix(PARTIAL).split("-"), "", ""]
        with suppress(FileNotFoundError):  # its process may finish right now
            is_dead = machine == _machine() and pid.isdigit() and not psutil.pid_exists(int(pid))
            if is_dead or time.time() - path.stat().st_mtime > PARTIAL_DAYS * 86400:
                path.unlink()


@contextmanager
def folder_lock(folder: str | Path, refusal: str = "") -> Iterator[None]:
    """Lets one process at a time work in a folder. Only where flock exists: not on Windows.

    Args:
        folder: It is made where it is not there.
        refusal: What FileExistsError says where another process is at work; without it one waits.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError as error:
            raise FileExistsError(refusal) from error
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked worker has the descriptor, too
        os.close(descriptor)


def now() -> str:
    """The present time as text, with its offset from UTC, for results that say when they were made."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is no UTF-8
        raise InputError(f"{path} is damaged or no JSON ({error}); make it anew") from error


def write_json(path: str | Path, values: Any) -> None:
    """Writes JSON that a person can read: one field a line, lists of numbers on one line; NaN becomes null."""
    text = json.dumps(_without_nan(values), indent=1, allow_nan=False)
    write_text(path, re.sub(r"\[\n[-+.\deE,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")


def _without_nan(values: Any) -> Any:
    """The same with None for each NaN, which JSON does not know."""
    if isinstance(values, dict):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and math.isnan(values) else values


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Writes a table without its index, whole or not at all; names that are no UTF-8 with their bytes spelt out."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, errors="backslashreplace")


def write_image(path: str | Path, image: sitk.Image) -> None:
    """Writes an image and reads it back: on a full disk the NIfTI writer raises nothing.

    Raises:
        OSError: What was written is not what was to be written.
    """
    with atomic_path(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
            written = sitk.ReadImage(str(temporary))
            same = np.array_equal(sitk.GetArrayViewFromImage(written), sitk.GetArrayViewFromImage(image))
        except RuntimeError:
            same = False
        if not same:
            raise OSError(f"{path} could not be written; is the disk full?")


def write_figure(path: str | Path, figure: Figure) -> None:
    """Writes a picture of matplotlib, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def append_csv(path: Path, table: pd.DataFrame) -> None:
    """Adds rows to a table of the same columns; takes as long for a long table as for a short one.

    Half a row at its end, which a killed process left, is cut off.
    """
    with naming(path, path), open(path, "rb+") as file:
        file.seek(max(0, path.stat().st_size - MAX_ROW_BYTES))
        tail = file.read()
        file.seek(tail.rfind(b"\n") + 1 - len(tail), os.SEEK_END)
        file.truncate()
        file.write(table.to_csv(index=False, header=False).encode(errors="backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


def delete_files(folder: Path, names: Iterable[str]) -> None:
    """Deletes files of a folder, as far as they are there."""
    for name in names:
        if (folder / name).is_file():
            (folder / name).unlink()


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes a .npy file, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def write_objects(path: str | Path, values: Any) -> None:
    """Writes built-in types as a pickled .npy for ``np.load(path, allow_pickle=True).item()``, and a .json twin.

    Our own code reads the twin only: unpickling runs whatever code a file holds.
    """
    path = Path(path)
    boxed = np.empty((), dtype=object)
    boxed[()] = values
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, boxed, allow_pickle=True)
    write_json(path.with_suffix(".json"), values)  # last, since it is what counts


def read_text(path: str | Path) -> str:
    """Text of a file, or of a .gz, as people's programs write it: UTF-8, UTF-16 with its mark, or else Latin-1.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (see data/README.md for where each file goes)")
    data = path.read_bytes()
    if data[:2] == GZIP_MAGIC:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is damaged ({error}); download it again") from error
    try:
        text = data.decode("utf-16") if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else decode(data)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is cut off or no text ({error}); save it as UTF-8") from error
    check("\0" not in text, f"{path} is no text; save it as CSV, UTF-8")
    return text.removeprefix("\ufeff")


def _separator(line: str) -> str:
    """What separates the columns of a table, by its first line."""
    return max(",;\t", key=line.count)  # the comma, where there is none


def read_table(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    """Reads a CSV file (also .csv.gz) of LUNA16's kind; ``seriesuid`` is text, other asked-for columns are numbers.

    Columns may be separated by commas, semicolons (then numbers may have a decimal comma) or tabs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a value is no finite number.
    """
    path, (header, *rows) = Path(path), read_text(path).lstrip("\r\n ").splitlines() or [""]
    separator = _separator(header)
    text = "\n".join([re.sub(rf" *{separator} *", separator, header), *rows])
    decimal = "," if separator == ";" else "."
    try:
        table = pd.read_csv(
            io.StringIO(text), sep=separator, decimal=decimal, dtype={"seriesuid": str}, skipinitialspace=True
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"{path} is no CSV table: {error}") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(f"{path} must have the columns {', '.join(columns)}; missing: {', '.join(missing)}")
    for name in columns:
        if name == "seriesuid":
            table[name] = table[name].astype("string").str.strip().astype(object)
            bad = table[name].isna()
        else:
            table[name] = pd.to_numeric(table[name], errors="coerce").astype(float)
            bad = ~np.isfinite(table[name])
        if bad.any():
            raise InputError(f"{path}, row {int(np.argmax(bad)) + 1}: {name} is empty or no number; correct that row")
    return table


def read_seriesuids(path: str | Path) -> list[str]:
    """Series UIDs of a list such as LUNA16's seriesuids.csv: one a line, with or without a heading, or a table.

    A first line that is no UID above others that are (digits and dots) is a heading.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is a table of several columns of which none is named seriesuid.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    separator = _separator(lines[0]) if lines else ","
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)]
    headings = ["".join(filter(str.isalnum, cell)).lower() for cell in rows[0]] if rows else []
    column = next((headings.index(name) for name in ("seriesuid", "seriesinstanceuid") if name in headings), None)
    check(
        column is not None or len(headings) <= 1 or not any(rows[0][1:]),
        f"{path} has {len(headings)} columns, none of them named seriesuid; keep the one with the series UIDs",
    )
    names = [row[column or 0] for row in rows]
    is_uid = [re.fullmatch(r"\d+(\.\d+)+", name) is not None for name in names]
    has_heading = column is not None or (len(names) > 1 and not is_uid[0] and all(is_uid[1:]))
    return names[1:] if has_heading else names


def without_repeats(annotations: pd.DataFrame, where: str) -> pd.DataFrame:
    """Annotations without those that say again what one above them says: the same scan, and the same place to 0.01 mm.

    Args:
        annotations: With the columns of ``POSITION_COLUMNS`` and seriesuid.
        where: Names them in the warning.
    """
    places = annotations[list(POSITION_COLUMNS)].astype(float).round(2).assign(seriesuid=annotations["seriesuid"])
    repeated = places.duplicated()
    if repeated.any():
        logger.warning(
            "%s: %d of %d nodules are listed twice and count once, such as one in %s",
            where,
            int(repeated.sum()),
            len(annotations),
            annotations.loc[repeated, "seriesuid"].iloc[0],
        )
    return annotations[~repeated]


# ------------------------------------------------------------------------------------------- processed scans, splits


def sphere_diameter(volume: float) -> float:
    """Diameter of the sphere of a volume."""
    return (6 * volume / math.pi) ** (1 / 3)


@dataclass(frozen=True)
class Nodule:
    """A nodule, annotated or found.

    Args:
        center_xyz: World position of its centre, in LPS mm.
        index_zyx: The same position as a float index of the array.
        diameter_mm: Diameter; of a found nodule that of the sphere of equal volume.
    """

    center_xyz: Vector
    index_zyx: Vector
    diameter_mm: float

    def to_dict(self) -> dict[str, Any]:
        """The fields that the brief names, as built-in types; coordinates are (x, y, z)."""
        return {
            "center_world": list(self.center_xyz),
            "center_voxel": list(self.index_zyx[::-1]),
            "diameter_mm": self.diameter_mm,
        }


EMPTY_HU = -800  # the mean of a nodule lies above, also of ground glass


@dataclass(frozen=True)
class AnnotatedNodule(Nodule):
    """A nodule that LUNA16, or another data set, lists.

    Args:
        voxels: Number of its voxels in the mask.
        mask_source: 'sphere', 'lidc' or 'mask'.
        inside_scan: Whether its centre lies in the scan.
        cut_by_lungs: Whether a part of it lies outside the lung mask, where the image is air.
        mean_hu: Of its voxels on the processed grid; None where it has none.
    """

    voxels: int
    mask_source: str = "sphere"
    inside_scan: bool = True
    cut_by_lungs: bool = False
    mean_hu: float | None = None

    @property
    def is_shown(self) -> bool:
        """Whether mask and image show it: where the lung mask cuts it off, the image is air."""
        is_empty = self.cut_by_lungs and self.mean_hu is not None and self.mean_hu < EMPTY_HU
        return self.voxels > 0 and not is_empty

    def to_dict(self) -> dict[str, Any]:
        """Built-in types, for the metadata."""
        own = ("voxels", "mask_source", "inside_scan", "cut_by_lungs", "mean_hu")
        return super().to_dict() | {name: getattr(self, name) for name in own}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AnnotatedNodule:
        """Takes back what ``to_dict`` gave."""
        rest = dict(values)
        center, index = tuple(rest.pop("center_world")), tuple(rest.pop("center_voxel")[::-1])
        return cls(center, index, **rest)


@dataclass(frozen=True)
class ScanMetadata:
    """What preprocess.py notes of a scan.

    Args:
        seriesuid: The scan's name.
        grid: Where the voxels of the processed arrays lie; identity direction.
        nodules: Its annotated nodules.
        fold: Fold of the data set's own cross-validation, from 0; None where it has none.
        patient: Whose scan it is; None where that is unknown.
        lung_source: Where the lungs came from: 'seg-lungs', 'threshold' or 'none'.
        lung_note: What is to be said of lungs found by threshold; '' for a given mask.
        scan_geometry: Where the voxels of the raw scan lie.
        preprocessing: ``Preprocessing.to_dict()``.
        fingerprint: Hash of all that decided the result.
        noise_hu: Noise of the raw scan; None where it could not be measured.
        excluded: World centre (x, y, z) and diameter in mm, below 0 where it is unknown, of each finding that is
            neither nodule nor background.
        mask_note: What is to be said of its nodule masks.
        scan_path: The raw scan; '' where that is unknown.
    """

    seriesuid: str
    grid: Geometry
    nodules: tuple[AnnotatedNodule, ...]
    fold: int | None
    patient: str | None
    lung_source: str
    lung_note: str
    scan_geometry: Geometry
    preprocessing: dict[str, Any]
    fingerprint: str
    noise_hu: float | None = None
    excluded: tuple[tuple[float, float, float, float], ...] = ()
    mask_note: str = ""
    scan_path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Built-in types, for JSON; origin and spacing are those of the processed grid (x, y, z)."""
        return {
            "seriesuid": self.seriesuid,
            "origin": list(self.grid.origin),
            "spacing": list(self.grid.spacing),
            "shape_zyx": list(self.grid.shape_zyx),
            "nodules": [nodule.to_dict() for nodule in self.nodules],
            "subset": self.fold,
            "patient": self.patient,
            "lung_source": self.lung_source,
            "lung_note": self.lung_note,
            "scan_geometry": self.scan_geometry.to_dict(),
            "preprocessing": self.preprocessing,
            "fingerprint": self.fingerprint,
            "noise_hu": self.noise_hu,
            "excluded": [list(finding) for finding in self.excluded],
            "mask_note": self.mask_note,
            "scan_path": self.scan_path,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScanMetadata:
        """Takes back what ``to_dict`` gave; raises KeyError or TypeError where it is something else."""
        return cls(
            values["seriesuid"],
            Geometry(tuple(values["shape_zyx"]), tuple(values["origin"]), tuple(values["spacing"])),
            tuple(AnnotatedNodule.from_dict(nodule) for nodule in values["nodules"]),
            values["subset"],
            values["patient"],
            values["lung_source"],
            values.get("lung_note", ""),
            Geometry.from_dict(values["scan_geometry"]),
            values["preprocessing"],
            values["fingerprint"],
            values.get("noise_hu"),
            tuple((x, y, z, diameter) for x, y, z, diameter in values.get("excluded", ())),
            values.get("mask_note", ""),
            values.get("scan_path", ""),
        )

    def excluded_voxels(self, box: Box | None = None) -> np.ndarray:
        """Voxels (m, 3) (z, y, x) of the excluded findings, counted from the corner of a box of the grid, or of all."""
        grid = self.grid if box is None else self.grid.cropped(box)
        lower, upper = grid.bounds()
        parts = [np.empty((0, 3), int)]
        for *center, diameter in self.excluded:
            radius = (diameter if diameter >= 0 else UNKNOWN_DIAMETER_MM) / 2
            if (center + np.array(radius) > lower).all() and (center - np.array(radius) < upper).all():
                parts.append(draw_sphere(grid, center, 2 * radius))
        return np.concatenate(parts)


FAR_OUTSIDE = 1.5  # times the highest figure of the training scans, or by it below the lowest


def scanning_of(geometry: Geometry, noise_hu: float | None) -> dict[str, float]:
    """What a scan is like, in figures that a network may depend on."""
    *pixel, slices = sorted(geometry.spacing)
    figures = {"slice_mm": slices, "pixel_mm": pixel[0]}
    return figures if noise_hu is None else figures | {"noise_hu": noise_hu}


def ranges_of(scans: Iterable[ScanMetadata]) -> dict[str, tuple[float, float]]:
    """{name: (lowest, highest)} of ``scanning_of`` all scans."""
    table = pd.DataFrame([scanning_of(scan.scan_geometry, scan.noise_hu) for scan in scans])
    return {
        str(name): (float(column.min()), float(column.max())) for name, column in table.items() if column.notna().any()
    }


def describe_unlike(figures: dict[str, float], learnt: dict[str, tuple[float, float]]) -> str:
    """In what a scan lies far outside of the training scans; '' where it does not."""
    words = {"slice_mm": "slices of {} mm", "pixel_mm": "pixels of {} mm", "noise_hu": "a noise of {} HU"}
    found = []
    for name, value in figures.items():
        low, high = learnt.get(name, (value, value))
        is_low = value < low / FAR_OUTSIDE and name != "noise_hu"  # less noise does no harm
        if is_low or value > high * FAR_OUTSIDE:
            found.append(f"{words[name].format(f'{value:.2g}')}, where training scans have {low:.2g} to {high:.2g}")
    return "; ".join(found)


def describe_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Settings that differ, each with both values."""
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name}: {ours.get(name)} instead of {theirs.get(name)}" for name in names)


@dataclass(frozen=True)
class ProcessedScan:
    """One scan as ``preprocess.py`` left it.

    Args:
        seriesuid: The scan's name.
        image: float16 (z, y, x) in [0, 1].
        mask: uint8 (z, y, x), 1 = nodule.
        metadata: What preprocess.py noted of it.
    """

    seriesuid: str
    image: np.ndarray
    mask: np.ndarray
    metadata: ScanMetadata

    @property
    def geometry(self) -> Geometry:
        """Where the voxels lie; identity direction."""
        return self.metadata.grid


Folders = list[Path] | str | Path  # one or more that preprocess.py wrote


def as_folders(data_dir: Folders) -> list[Path]:
    """The processed folders that a ``data_dir`` names.

    Raises:
        InputError: It names none, or one twice.
    """
    folders = [Path(folder) for folder in ([data_dir] if isinstance(data_dir, str | Path) else data_dir)]
    check(bool(folders), "data_dir must name a folder that preprocess.py wrote, or several")
    places = [folder.resolve() for folder in folders]
    check(len({*places}) == len(places), f"data_dir names a folder twice: {name_folders(folders)}")
    return folders


def name_folders(data_dir: Folders) -> str:
    """Processed folders, as messages call them."""
    return str(data_dir) if isinstance(data_dir, str | Path) else " and ".join(map(str, data_dir))


def resolve_folders(data_dir: Folders) -> str | list[str]:
    """Absolute paths of processed folders, as results state them: one, or a list of several."""
    paths = sorted(str(folder.resolve()) for folder in as_folders(data_dir))
    return paths[0] if len(paths) == 1 else paths


def folder_of(data_dir: Folders, seriesuid: str) -> Path:
    """The processed folder that holds a scan; the first one, where none does."""
    if isinstance(data_dir, str | Path):
        return Path(data_dir)
    held = (Path(folder) for folder in data_dir if Path(folder, f"{seriesuid}_metadata.json").is_file())
    return next(held, Path(data_dir[0]))


def metadata_path(data_dir: Folders, seriesuid: str) -> Path:
    """The metadata that our code reads; its pickled .npy twin stands beside it."""
    return folder_of(data_dir, seriesuid) / f"{seriesuid}_metadata.json"


def write_metadata(data_dir: str | Path, metadata: ScanMetadata) -> None:
    """Writes ``<seriesuid>_metadata.npy``, as the brief reads it, and its .json twin."""
    write_objects(metadata_path(data_dir, metadata.seriesuid).with_suffix(".npy"), metadata.to_dict())


def read_metadata(data_dir: Folders, seriesuid: str) -> ScanMetadata:
    """Reads what preprocess.py noted of a scan.

    Raises:
        FileNotFoundError: preprocess.py has not run.
        InputError: The file is damaged, or of another version of preprocess.py.
    """
    path = _prepared(metadata_path(data_dir, seriesuid))
    try:
        return ScanMetadata.from_dict(read_json(path))
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged or of another version; run python preprocess.py again") from error


def readable_metadata(data_dir: Folders, seriesuid: str) -> ScanMetadata | None:
    """What preprocess.py noted of a scan; None for one that fails when its turn comes."""
    try:
        return read_metadata(data_dir, seriesuid)
    except (InputError, OSError):
        return None


def read_lung_points(data_dir: Folders, seriesuid: str) -> np.ndarray:
    """Reads the voxels in the lungs that patches are drawn around; int32 (n, 3), each row (z, y, x).

    Raises:
        FileNotFoundError: preprocess.py has not run.
        ValueError: The file is damaged.
    """
    return _load_prepared(folder_of(data_dir, seriesuid) / "points" / f"{seriesuid}.npy")


def _prepared(path: Path) -> Path:
    """A file that preprocess.py wrote; raises FileNotFoundError where it did not."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run python preprocess.py first")
    return path


def _load_prepared(path: Path, mmap_mode: Literal["c"] | None = None) -> np.ndarray:
    """An array that preprocess.py wrote; raises InputError where it is damaged."""
    try:
        return np.load(_prepared(path), mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); run python preprocess.py again") from error


def read_processed(
    data_dir: Folders, seriesuid: str, in_memory: bool = False, metadata: ScanMetadata | None = None
) -> ProcessedScan:
    """Opens a processed scan.

    Args:
        data_dir: Folder or folders that preprocess.py wrote.
        seriesuid: The scan.
        in_memory: Read its voxels now, not when they are used.
        metadata: What ``read_metadata`` gave, where it is known already.

    Raises:
        FileNotFoundError: A file of the scan is missing.
        ValueError: Image and mask do not belong together.
    """
    folder = folder_of(data_dir, seriesuid)
    # Copy-on-write: the array can be changed, as torch wants it, but changes never reach the file.
    mode: Literal["c"] | None = None if in_memory else "c"
    image, mask = (_load_prepared(folder / kind / f"{seriesuid}.npy", mode) for kind in ("images", "masks"))
    metadata = metadata or read_metadata(data_dir, seriesuid)
    if image.shape != mask.shape:
        raise InputError(f"image {image.shape} and mask {mask.shape} of {seriesuid} differ; run preprocess.py again")
    if image.shape != metadata.grid.shape_zyx:
        raise InputError(
            f"the arrays of {seriesuid} have the shape {image.shape}, not that of its metadata, "
            f"{metadata.grid.shape_zyx}; run preprocess.py again"
        )
    return ProcessedScan(seriesuid, image, mask, metadata)


def read_processed_list(data_dir: Folders) -> list[str]:
    """Series UIDs of the ``processed_files.txt`` of one or more folders.

    Raises:
        FileNotFoundError: A list is missing.
        ValueError: A list is empty, or two folders hold one scan.
    """
    folders, uids = as_folders(data_dir), []
    for folder in folders:
        listed = _read_list(folder / "processed_files.txt")
        others = [other for other in folders if other != folder]
        twice = ((uid, other) for uid in listed for other in others if (other / f"{uid}_metadata.json").is_file())
        for uid, other in twice:
            raise InputError(
                f"scan {uid} lies in {folder} and in {other}; a scan counts once: remove one, or rename it where they "
                "differ"
            )
        uids += listed
    return uids


def _read_list(path: Path) -> list[str]:
    """The lines of one list of scans."""
    lines = _prepared(path).read_text(encoding="utf-8").splitlines()
    uids = [line for line in lines if line.strip()]  # names may have spaces
    if not uids:
        raise InputError(f"{path} lists no scan; see failed_files.csv beside it and run python preprocess.py again")
    return uids


Part = Literal["train", "validation", "test"]
Subset = Literal["validation", "test", "train", "all", "new"]


@dataclass(frozen=True)
class Split:
    """Which scans a training learns from, chooses its best epoch by, and never sees.

    Args:
        train: Series UIDs of the training scans.
        validation: Those of the scans that choose the best epoch.
        test: Those of the fold that is held out.
        fold: Number of that fold; None where none is held out.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...] = ()
    fold: int | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """{series UID: its part}."""
        return {uid: part for part in get_args(Part) for uid in getattr(self, part)}


def write_split(path: str | Path, split: Split) -> None:
    """Writes split.json."""
    write_json(path, asdict(split))


def read_split(path: str | Path) -> Split:
    """Reads the split.json that training left beside its checkpoints.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It does not hold the lists.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; keep split.json of the training beside its checkpoints")
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in ("train", "validation")):
        raise InputError(f"{path} must hold the lists 'train' and 'validation'")
    check(isinstance(found.get("test", []), list), f"{path}: 'test' must be a list")
    train, validation, test = (tuple(found.get(part, ())) for part in get_args(Part))
    return Split(train, validation, test, found.get("fold"))


def split_path(checkpoint_path: Path) -> Path:
    """Where the split of a training stands: beside its checkpoints."""
    return checkpoint_path.parent / "split.json"


SEEN = "seen in training"  # part of a scan that taught the network, or whose patient did, outside of its own split
LEARNT_FROM = ("train", SEEN)  # parts whose scans are never scored
# {series UID: (patient or None, part)} of the scans that a network has learnt from ('train', or 'earlier' for those of
# the weights that its training began with), or that chose its best epoch ('validation').
TUNED_FILE = r"tuned[\w-]*\.pth"  # names of checkpoints that validate.py --tune writes
SeenScans = dict[str, tuple[str | None, str]]


def seen_by(seen: SeenScans, checkpoint_path: Path) -> SeenScans:
    """What a checkpoint says it has seen or, where it says nothing, the split beside it; empty where neither tells."""
    path = split_path(checkpoint_path)
    if seen or not path.is_file():
        return seen
    split = read_split(path)
    return {uid: (None, part) for uid, part in split.parts.items() if part != "test"}


def parts_of(
    patients: Mapping[str, str | None], checkpoint_path: Path | None, seen: SeenScans | None = None
) -> dict[str, str]:
    """What each scan was to a network.

    Args:
        patients: {series UID: patient, or None where that is unknown}.
        checkpoint_path: Checkpoint of the network, beside which its split may lie; None: there is no split.
        seen: The scans that the checkpoint says it has seen; None: it says nothing.

    Raises:
        InputError: The split is that of another network.

    Returns:
        {series UID: its part of the split beside the checkpoint. It is SEEN instead where the network learnt from the
        scan or its patient otherwise, 'new' in no part, and 'unknown' where neither split nor checkpoint tells}.
    """
    path = None if checkpoint_path is None else split_path(checkpoint_path)
    own = read_split(path).parts if path is not None and path.is_file() else {}
    seen = seen or {}
    trained = {uid for uid, (_, part) in seen.items() if part == "train"}
    strangers = trained - {uid for uid, part in own.items() if part == "train"} if own else set()
    check(
        not strangers,
        f"{path} is not the split of {checkpoint_path}, which learnt from {min(strangers, default='')}; keep beside a "
        "checkpoint its own split.json, or none",
    )
    learnt = {uid: patient for uid, (patient, part) in seen.items() if not own or part != "validation"}
    theirs = {patient for patient in learnt.values() if patient is not None}
    earlier = {patient for patient, part in seen.values() if patient is not None and part == "earlier"}
    parts: dict[str, str] = {}
    for uid, patient in patients.items():
        is_seen = uid in learnt or patient in (earlier if uid in own else theirs)
        part = own.get(uid, "new" if own or seen else "unknown")
        parts[uid] = SEEN if is_seen and part != "train" else part
    return parts


def choose_scans(
    data_dir: Folders, checkpoint_path: Path, subset: Subset, seen: SeenScans | None = None
) -> dict[str, str]:
    """{series UID: its part} of the processed scans of a subset, as ``parts_of`` says it.

    'new' are scans that are in no part of its split; 'all' are all. Those that its weights have seen before are among
    them, marked as SEEN.

    Raises:
        FileNotFoundError: The split file is not beside a checkpoint that does not say itself what it has seen.
        InputError: There is no such scan.
    """
    check(subset in get_args(Subset), f"subset must be one of {', '.join(get_args(Subset))}, not {subset!r}")
    path = split_path(checkpoint_path)
    if subset != "all" and not (subset == "new" and seen):
        if seen and not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; keep split.json of the training beside its checkpoints, or name the subset "
                "'new' or 'all': the checkpoint itself says what it has seen"
            )
        read_split(path)  # says what is missing
    metadata = {uid: readable_metadata(data_dir, uid) for uid in read_processed_list(data_dir)}
    patients = {uid: scan.patient if scan else None for uid, scan in metadata.items()}
    parts = parts_of(patients, checkpoint_path, seen)
    own = read_split(path).parts if path.is_file() else {}
    kinds = {uid: own.get(uid, "new" if part == SEEN else part) for uid, part in parts.items()}
    chosen = {uid: parts[uid] for uid, kind in kinds.items() if subset in ("all", kind)}
    folders = name_folders(data_dir)
    check(
        bool(chosen) or subset != "new", f"all scans of {folders} stand in {path}: none is new; name another data_dir"
    )
    check(bool(chosen), f"{folders} has none of the {subset} scans of {path}; name another data_dir or subset")
    return chosen


# -------------------------------------------------------------------------------------- seeds, devices and processes


def generator_of(stream: str, seed: int, *numbers: int) -> np.random.Generator:
    """Random numbers of their own for each use, seed, and numbers such as the epoch and the position in it.

    Args:
        stream: What the numbers are for; each use has another name.
        seed: Of the run.
        numbers: What else they depend on.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(zlib.crc32(stream.encode()), *numbers)))


_warned_devices: set[str] = set()


def select_device(device: str | torch.device, warn: bool = True) -> torch.device:
    """``device``, or the CPU with one warning where CUDA is asked for and absent; ``warn`` puts the warning off.

    Raises:
        ValueError: No such kind of device.
    """
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be 'cuda', 'cuda:<n>' or 'cpu', not {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        if warn and str(device) not in _warned_devices:
            logger.warning("no CUDA device found: running on the CPU, which is much slower")
            _warned_devices.add(str(device))
        return torch.device("cpu")
    if chosen.type not in ("cuda", "cpu"):
        raise InputError(f"device must be 'cuda', 'cuda:<n>' or 'cpu', not {device!r}")
    return chosen


def free_memory(device: torch.device) -> int:
    """Free memory in bytes: of a GPU, with the blocks that torch caches there unused; else of machine or container."""
    import psutil
    import torch

    if device.type != "cuda":
        return int(min(psutil.virtual_memory().available, _memory_left()))
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how OpenMP's threads wait for each other
# Threads spin for some microseconds and then sleep, which costs nothing where the cores are free.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch asks Linux for memory in pages of 2 MB, each of which is mapped once


def count_cores() -> int:
    """Cores that this process may use; those that ``torchrun`` started on this machine share them."""
    cores = math.ceil(min(_granted_cores(), _core_quota()))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _granted_cores() -> int:
    """Cores that the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _core_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that this process's control groups (Linux's containers) may use; infinite without a limit.

    Args:
        groups: File that names this process's groups, as lines of "number:controllers:path".
        root: Where the kernel shows the groups.
    """
    return min(map(_quota_of, _control_groups("cpu", groups, root)), default=math.inf)


def _memory_left(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process's control groups (containers, batch jobs) may still take; infinite without a limit."""
    return min(map(_memory_left_of, _control_groups("memory", groups, root)), default=math.inf)


def _control_groups(controller: str, groups: Path, root: Path) -> Iterator[Path]:
    """Folders of this process's groups and of all that they lie in, to whose limits it is held."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        folder = top / path.strip("/")
        # In a container the path may lead nowhere: the top then is its own group.
        yield from (group for group in [folder, *folder.parents] if group.is_relative_to(root))


def _memory_left_of(group: Path) -> float:
    """Bytes that one control group may still take, by the files of its version 2 or 1; cached files can be dropped."""
    names = ("memory.max", "memory.current", "inactive_file")
    if not (group / names[0]).is_file():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        limit, used = ((group / name).read_text().strip() for name in names[:2])
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get(names[2], "0")
        return math.inf if limit == "max" else max(int(limit) - int(used) + int(cached), 0)
    except (OSError, ValueError):
        return math.inf


def _quota_of(group: Path) -> float:
    """Cores' worth of time that one control group may use, by the files of its version 2 or 1."""
    try:
        if (limit := group / "cpu.max").is_file():
            allowed, period = limit.read_text().split()
        else:
            allowed, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if allowed in ("max", "-1") else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def set_up_torch() -> None:
    """Sets how torch takes memory, and starts the running script anew, once, with threads that sleep while they wait.

    Threads that spin, as OpenMP's do by default, take the cores that others need; in small pages of memory a CPU maps
    and clears a network's arrays for a good part of the time (figures: tests/bench/README.md). OpenMP reads this when
    torch is loaded, so a script calls it before; an import never does. Where a container may use fewer cores than there
    are, it sets the number of threads, too. What the user has set is left alone.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    wanted = dict(PATIENT) if not any(name in os.environ for name in WAITING) else {}
    if "OMP_NUM_THREADS" not in os.environ and _core_quota() < _granted_cores():
        wanted["OMP_NUM_THREADS"] = str(count_cores())
    # Else the process is another's, as that of a notebook or debugger that runs the script.
    is_watched = sys.gettrace() is not None or (hasattr(sys, "monitoring") and sys.monitoring.get_tool(0) is not None)
    is_ours = sys.argv[0] in sys.orig_argv and Path(sys.argv[0]).is_file() and not is_watched
    if wanted and is_ours and sys.executable and os.name == "posix":
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_distributed() -> bool:
    """Whether several processes work together, or will once they have joined."""
    return process_count() > 1 or ("TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1")


def own_gpu(device: torch.device) -> torch.device:
    """This process's own GPU where ``device`` is a GPU and there are several processes; else ``device``.

    A GPU that a caller of ``init_process_group`` names by its number is taken, too.

    Raises:
        InputError: There are more processes than GPUs.
    """
    import torch

    is_named = process_count() > 1 and device.index is not None
    if device.type != "cuda" or not is_distributed() or is_named:
        return device
    rank, count = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())), torch.cuda.device_count()
    check(rank < count, f"this machine has {count} GPUs; start torchrun with --nproc_per_node {count}")
    return torch.device("cuda", rank)


def join_processes(device: torch.device) -> torch.device:
    """Joins the processes that ``torchrun`` started, once; does nothing in a process that it did not start.

    Where the caller has called ``init_process_group`` himself, a GPU that he names by its number is taken, too.

    Returns:
        ``device``, or this process's own GPU where it is a GPU and there are several processes.

    Raises:
        ValueError: There are more processes than GPUs.
    """
    import torch
    from torch import distributed

    joined = distributed.is_initialized()
    if not joined and not is_distributed():
        return device
    own = own_gpu(device)
    if own != device:
        torch.cuda.set_device(own)
    if not joined:
        # A process that is done with its scans waits for the others; torchrun itself notices one that died.
        distributed.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return own


def leave_processes() -> None:
    """Leaves the processes that ``join_processes`` joined; to be called when all went well, since it waits for them.

    What still holds the group, as DistributedDataParallel does in its reference cycles, is let go first: a group that
    lives until the interpreter ends can abort it.
    """
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        gather_objects(None)
        gc.collect()
        distributed.destroy_process_group()


def process_count() -> int:
    """How many processes work together; 1 without ``torchrun``."""
    distributed = sys.modules.get("torch.distributed")  # without torch there is one
    return distributed.get_world_size() if distributed and distributed.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0; 0 is the one that writes what belongs to all."""
    return sys.modules["torch.distributed"].get_rank() if process_count() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """What each process gives, in their order, in every process; all of them must call it."""
    from torch import distributed

    values = [value] * process_count()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def do_once(work: Callable[[], Any]) -> None:
    """Runs ``work`` in the first process, while the others wait; what it raises is raised in all of them."""
    error = None
    if not process_rank():
        try:
            work()
        except Exception as raised:  # noqa: BLE001 - raised again, in all processes
            error = raised
    if first := gather_objects(error)[0]:
        raise first


def autocast_dtype(device: torch.device, mixed_precision: bool) -> torch.dtype | None:
    """The half-precision type that pays on this hardware: bf16 where it has it, fp16 on older CUDA, else None."""
    import torch

    if not mixed_precision:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Computes in that half-precision type, as ``autocast_dtype`` gives it; None computes in float32."""
    import torch

    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


# -------------------------------------------------------------------------------------------------- what is told

SECONDS_BETWEEN_LINES = 60  # of progress, where stderr is no terminal


def tell(message: str) -> None:
    """Says what a person waits for: to the log, or to stderr where a caller from Python has set up none for it."""
    if logging.getLogger().hasHandlers() and logger.isEnabledFor(logging.INFO):
        logger.info("%s", message)
    elif not process_rank():
        print(message, file=sys.stderr, flush=True)


def describe_time(seconds: float) -> str:
    """A length of time as a person says it, such as '45 s', '12 min' or '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Progress:
    """A bar on a terminal; elsewhere one line a minute.

    Args:
        total: Number of things to do.
        desc: What is done.
        unit: What the things are called, in the singular.
        leave: Whether the bar stays when all is done.
    """

    def __init__(self, total: int, desc: str, unit: str, leave: bool = True) -> None:
        from tqdm import tqdm

        self.total, self.desc, self.unit, self.done = total, desc, unit, 0
        self.silent = bool(process_rank())  # the first process speaks for all
        self.bar = tqdm(total=total, desc=desc, unit=unit, leave=leave, disable=True if self.silent else None)
        self.note = ""
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, note: str = "", count: int = 1) -> None:
        """Some things are done; ``note`` says how things stand and is kept until the next one."""
        self.done += count
        self.note = note or self.note
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update(count)
        now_s = time.monotonic()
        if self.bar.disable and self.done and not self.silent and now_s - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now_s
            left = describe_time((now_s - self._start) / self.done * (self.total - self.done))
            note = f", {self.note}" if self.note else ""
            tell(f"{self.desc}: {self.done} of {self.total} {self.unit}s, about {left} left{note}")
