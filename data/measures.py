"""Measures of found nodules as a radiologist states them: where they lie, how long and how dense they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist, squareform

from data.lungs import fill_dents, find_lungs, widen
from preprocess import resample_mean
from utils import Box, Geometry, resample, write_csv, write_json

if TYPE_CHECKING:
    from infer import FoundNodule, Segmentation

SMALLEST_JUDGED_MM = 5.0  # diameter from which density can be told
RIM_MM = 1.0  # of a nodule, in which air and tissue mix
FEWEST_INNER_MM3 = 10.0  # with less than this inside the rim, the whole nodule is judged
DENSE_HU = -450.0
# Share of the inner voxels above DENSE_HU: up to the first it is ground glass, up to the second part-solid. Of 101
# nodules of LIDC-IDRI, on which the three numbers were chosen, 88 are called what a radiologist's rating says.
GROUND_GLASS_SHARE, PART_SOLID_SHARE = 0.2, 0.5
REACHES_MM = (25.0, 50.0, 100.0)  # around a nodule, in which the lung's edge is looked for
LUNG_CLOSING_MM = 5.0  # of the lungs, which takes in vessels
LUNG_SHARE = 0.05  # of the largest axial area of the lungs, that a slice of them has; less is windpipe, or a tip
CUT_MM = 5.0  # lungs that come so near to the end of the scan may go on behind it
AIR_HU = -500.0  # a voxel of lung below this holds air
VALLEY = 0.6  # between two lungs there is less lung than this share of the smaller one


@dataclass(frozen=True)
class Measures:
    """What is measured of a nodule; text is '' and a number is NaN where it cannot be told.

    Args:
        nodule: Its number, as in the mask's labels and the list of nodules.
        center_x_mm: Its centre in LPS mm; x grows to the patient's left.
        center_y_mm: Grows to the back.
        center_z_mm: Grows to the head.
        side: 'left' or 'right' lung of the patient.
        lung_third: 'upper', 'middle' or 'lower' third of the lungs' height.
        distance_to_lung_edge_mm: From its surface to the nearest edge of the lungs: chest wall, mediastinum, diaphragm.
        equivalent_diameter_mm: Of the ball of the same volume.
        longest_axial_mm: The longest diameter in an axial slice.
        across_axial_mm: The longest diameter at right angles to it in the same slice.
        volume_mm3: Of its voxels.
        mean_hu: Of its voxels more than RIM_MM inside, or of all where these are few: the rim mixes with air.
        density: 'solid', 'part-solid' or 'ground glass', of the same voxels; '' below SMALLEST_JUDGED_MM and below two
            slice distances of the scan.
        score: How likely it is a nodule, 0 to 1.
    """

    nodule: int
    center_x_mm: float
    center_y_mm: float
    center_z_mm: float
    side: str
    lung_third: str
    distance_to_lung_edge_mm: float
    equivalent_diameter_mm: float
    longest_axial_mm: float
    across_axial_mm: float
    volume_mm3: float
    mean_hu: float
    density: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Built-in types, for JSON and tables."""
        return asdict(self)


@dataclass(frozen=True)
class MeasuredScan:
    """A scan, and what was found and measured in it.

    Args:
        ct: CT in HU, any direction.
        grid: The grid that the network saw; identity direction.
        hu: CT values (z, y, x) on the grid.
        ranks: Whole numbers (z, y, x) on the grid: the place of each nodule in ``nodules``, counted from 1.
        nodules: The likeliest first.
        measures: Theirs.
        marks: Fainter ones, which are not in the mask, the likeliest first.
        lungs: Bool (z, y, x) on the grid; None where they are unknown.
        frame: Where they lie.
        truth: Annotated mask (z, y, x) on the grid; None where there is none.
    """

    ct: sitk.Image
    grid: Geometry
    hu: np.ndarray
    ranks: np.ndarray
    nodules: Sequence[FoundNodule]
    measures: Sequence[Measures]
    marks: Sequence[FoundNodule]
    lungs: np.ndarray | None
    frame: LungFrame | None
    truth: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        ct: sitk.Image,
        grid: Geometry,
        found: Segmentation,
        own_lungs: sitk.Image | None,
        truth: np.ndarray | None = None,
    ) -> MeasuredScan:
        """Measures what was found in a scan, whose lungs, as ``PreparedScan.own_lungs``, may be unknown."""
        lungs = None if own_lungs is None else lungs_on(own_lungs, grid)
        hu, ranks, nodules = hu_on(ct, grid), found.ranks, found.nodules
        smallest = max(SMALLEST_JUDGED_MM, 2 * max(ct.GetSpacing()))
        first, last = (float(corner[2]) for corner in Geometry.from_image(ct).bounds())
        frame = None if lungs is None else LungFrame.of(lungs, hu, grid, (first, last))
        measures = measure_nodules(nodules, ranks, grid, hu, lungs, frame, smallest)
        return cls(ct, grid, hu, ranks, nodules, measures, found.faint, lungs, frame, truth)


def write_measures(output_dir: Path, name: str, measures: Sequence[Measures]) -> None:
    """Writes ``<name>_measures.csv`` and ``.json``: the scan's name and the measures, to four digits."""
    rows = [{"seriesuid": name} | measure.to_dict() for measure in measures]
    rows = [{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    columns = ["seriesuid", *Measures.__annotations__]
    write_csv(output_dir / f"{name}_measures.csv", pd.DataFrame(rows, columns=columns))
    write_json(output_dir / f"{name}_measures.json", rows)


def lungs_on(own_lungs: sitk.Image, grid: Geometry) -> np.ndarray:
    """Bool (z, y, x) on a grid, the lungs with vessels and small nodules, which a closing takes in."""
    distance = widen(own_lungs, LUNG_CLOSING_MM, 0.0)
    return sitk.GetArrayFromImage(resample(distance, grid, fill=1e3)) <= 0


def lungs_by_threshold(ct: sitk.Image) -> sitk.Image | None:
    """The lungs of a scan as ``PreparedScan.own_lungs`` has them; None where there are none."""
    found = None if Geometry.from_image(ct).is_piece else find_lungs(ct)
    return None if found is None else fill_dents(found)


def hu_on(ct: sitk.Image, grid: Geometry) -> np.ndarray:
    """CT values, float32 (z, y, x), on a grid of identity direction; air outside of the scan."""
    hu = np.empty(grid.shape_zyx, np.float32)
    for part, values in resample_mean(ct, grid, fill=-1024.0):
        hu[part] = values
    return hu


def measure_nodules(
    nodules: Sequence[FoundNodule],
    ranks: np.ndarray,
    grid: Geometry,
    hu: np.ndarray,
    lungs: np.ndarray | None,
    frame: LungFrame | None,
    smallest_mm: float = SMALLEST_JUDGED_MM,
) -> list[Measures]:
    """Measures all nodules of a scan.

    Args:
        nodules: They.
        ranks: Whole numbers (z, y, x): the place of each in ``nodules``, counted from 1; 0 is background.
        grid: Where the voxels lie; identity direction.
        hu: CT values (z, y, x).
        lungs: Bool (z, y, x); None where they are unknown.
        frame: Where the lungs lie.
        smallest_mm: Diameter from which density is told.
    """
    return [
        _measure(number, nodule, ranks, grid, hu, lungs, frame, smallest_mm) for number, nodule in enumerate(nodules, 1)
    ]


def _measure(
    number: int,
    nodule: FoundNodule,
    ranks: np.ndarray,
    grid: Geometry,
    hu: np.ndarray,
    lungs: np.ndarray | None,
    frame: LungFrame | None,
    smallest_mm: float,
) -> Measures:
    x, y, z = nodule.center_xyz
    mask, values = ranks[nodule.box.slices] == number, hu[nodule.box.slices]
    inner = values[inner_of(mask, grid.spacing_zyx)]
    longest, across = axial_diameters(mask, grid.spacing_zyx)
    return Measures(
        number,
        x,
        y,
        z,
        frame.side(x) if frame else "",
        frame.third(z) if frame else "",
        math.nan if lungs is None else edge_distance(mask, nodule.box, lungs, grid.spacing_zyx),
        nodule.diameter_mm,
        longest,
        across,
        nodule.volume_mm3,
        float(inner.mean(dtype=np.float64)),
        density_of(inner) if nodule.diameter_mm >= smallest_mm else "",
        nodule.score,
    )


@dataclass(frozen=True)
class LungFrame:
    """Where the lungs lie.

    Args:
        lower_z_mm: Where their lowest axial slice of some size ends.
        upper_z_mm: Where their highest one ends.
        midline_x_mm: Between the two lungs; NaN where two lungs are not told apart.
        is_whole: Whether the scan shows them from top to bottom.
    """

    lower_z_mm: float
    upper_z_mm: float
    midline_x_mm: float
    is_whole: bool = True

    @classmethod
    def of(
        cls,
        lungs: np.ndarray,
        hu: np.ndarray,
        grid: Geometry,
        view_z_mm: tuple[float, float] = (-math.inf, math.inf),
    ) -> LungFrame | None:
        """The frame of a mask (z, y, x) of the lungs in a scan of this view; None of an empty mask."""
        areas = lungs.sum(axis=(1, 2))
        if not areas.any():
            return None
        slices = np.flatnonzero(areas >= LUNG_SHARE * areas.max())
        half = grid.spacing[2] / 2
        lower, upper = (float(grid.world((end, 0, 0))[2]) for end in (slices[0], slices[-1]))
        lower, upper = lower - half, upper + half
        is_whole = bool(lower > view_z_mm[0] + CUT_MM and upper < view_z_mm[1] - CUT_MM)
        return cls(lower, upper, _midline(lungs & (hu < AIR_HU), grid), is_whole)

    def side(self, x_mm: float) -> str:
        """The lung in which a position lies, by its x alone; '' where two lungs are not told apart."""
        return "" if math.isnan(self.midline_x_mm) else "left" if x_mm > self.midline_x_mm else "right"

    def third(self, z_mm: float) -> str:
        """The third of the lungs' height in which a position lies; '' where the scan does not show all of it."""
        if not self.is_whole:
            return ""
        share = (z_mm - self.lower_z_mm) / (self.upper_z_mm - self.lower_z_mm)
        return "lower" if share < 1 / 3 else "middle" if share < 2 / 3 else "upper"


def _midline(air: np.ndarray, grid: Geometry) -> float:
    """x in mm of the valley between the air (z, y, x) of two lungs; NaN where there is none."""
    counts = air.sum(axis=(0, 1), dtype=float)
    if not counts.any():
        return math.nan
    counts = ndimage.gaussian_filter1d(counts, 5 / grid.spacing[0], mode="nearest")
    middle = int(np.average(np.arange(len(counts)), weights=counts))
    first, last = int(np.argmax(counts[: middle + 1])), middle + int(np.argmax(counts[middle:]))
    valley = first + int(np.argmin(counts[first : last + 1]))
    if counts[valley] > VALLEY * min(counts[first], counts[last]):
        return math.nan
    return float(grid.world((0, 0, valley))[0])


def edge_distance(mask: np.ndarray, box: Box, lungs: np.ndarray, spacing_zyx: Sequence[float]) -> float:
    """Distance in mm from the surface of a nodule to the edge of the lungs; 0 where it touches it or lies outside.

    Args:
        mask: Bool (z, y, x) of the nodule, in its box.
        box: Where the mask lies in the array of the lungs.
        lungs: Bool (z, y, x). Holes that they enclose belong to them, and where the scan ends there is no edge.
        spacing_zyx: Voxel size in mm.

    Returns:
        NaN where no edge is near.
    """
    spacing = np.asarray(spacing_zyx)
    for reach in REACHES_MM:
        steps = np.ceil(reach / spacing).astype(int)
        lower = np.maximum(np.asarray(box.lower) - steps, 0)
        around = Box.between(lower, np.minimum(np.asarray(box.upper) + steps, lungs.shape))
        own = Box.of_size(np.asarray(box.lower) - lower, box.shape_zyx).slices
        inside = lungs[around.slices].copy()
        inside[own] |= mask
        inside = ndimage.binary_fill_holes(inside)
        if inside.all():
            continue
        _, nearest = ndimage.distance_transform_edt(inside, sampling=spacing_zyx, return_indices=True)
        apart = np.abs(nearest - np.indices(inside.shape))[(slice(None), *own)][:, mask].T
        # From surface to surface: along each axis both are half a voxel nearer than their centres.
        found = float(np.linalg.norm(np.maximum(apart - 1, 0) * spacing, axis=1).min())
        if found <= reach:
            return found
    return math.nan


def axial_diameters(mask: np.ndarray, spacing_zyx: Sequence[float]) -> tuple[float, float]:
    """Longest diameter in mm of any axial slice of a mask (z, y, x), and the longest at right angles to it there."""
    best = (0.0, 0.0)
    half_y, half_x = spacing_zyx[1] / 2, spacing_zyx[2] / 2
    for plane in mask:
        voxels = np.argwhere(plane) * spacing_zyx[1:]
        if not len(voxels):
            continue
        # Middles of the pixels' edges: neither their centres, too near, nor their corners, too far.
        shifts = np.array([[half_y, 0], [-half_y, 0], [0, half_x], [0, -half_x]])
        every = (voxels[:, None] + shifts).reshape(-1, 2)
        points = _outer(every)
        distances = squareform(pdist(points))
        one, other = np.unravel_index(distances.argmax(), distances.shape)
        longest = float(distances[one, other])
        if longest > best[0]:
            best = longest, _longest_across(every, (points[other] - points[one]) / longest, min(spacing_zyx[1:]))
    return best


def _longest_across(points: np.ndarray, along: np.ndarray, step: float) -> float:
    """Longest extent at right angles to a direction, of points (n, 2) that lie within one step along it."""
    bins = np.floor((points @ along) / step - 1e-9).astype(int)
    across = points @ [-along[1], along[0]]
    order = np.argsort(bins, kind="stable")
    parts = np.split(across[order], np.flatnonzero(np.diff(bins[order])) + 1)
    return max(float(np.ptp(part)) for part in parts)


def _outer(points: np.ndarray) -> np.ndarray:
    """Those of some points (n, 2) that lie on their convex hull."""
    try:
        return points[ConvexHull(points).vertices]
    except QhullError:
        return points


def inner_of(mask: np.ndarray, spacing_zyx: Sequence[float]) -> np.ndarray:
    """The voxels of a mask (z, y, x) more than RIM_MM inside it; all where these are less than FEWEST_INNER_MM3."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_zyx)[1:-1, 1:-1, 1:-1]
    inner = depth > RIM_MM
    return mask if inner.sum() * math.prod(spacing_zyx) < FEWEST_INNER_MM3 else inner


def density_of(inner_hu: np.ndarray) -> str:
    """'solid', 'part-solid' or 'ground glass', by the CT values inside the rim of a nodule."""
    share = (inner_hu > DENSE_HU).mean()
    return "ground glass" if share < GROUND_GLASS_SHARE else "part-solid" if share < PART_SOLID_SHARE else "solid"
