"""Lungs: found by threshold in any chest CT, taken from a given mask, and widened; and what a scan's values tell.

Arrays are (z, y, x), positions (x, y, z) in LPS millimetres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from matplotlib.path import Path as PolygonPath
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from utils import Box, Geometry, check, resample, signed_distance

TISSUE_HU = (0, 100)  # where a slice is smooth but for its noise
LEAST_TISSUE_VOXELS = 200
CHEST_MM = 150  # a scan that is larger in all directions holds a chest, not a cube out of one
AIR_HU = -600  # something in a chest is darker, if only an airway
SOFT_HU = -200  # soft tissue and bone are brighter
MEDIAN_HU = 500  # their median is darker, also with contrast
TOO_DARK_HU = -1500  # nothing measured lies below, but for some noise
MOST_TOO_DARK = 0.05
PADDING_VALUES = 4  # tens of HU that padding takes at most, also where it was compressed with losses
FULL_PICTURE = (5, 200)  # a picture of 8 bits begins below and ends above
SIZES_MM = (1, 3000)  # of a scan's longest side
MOST_OUTSIDE = 0.3  # of a lung mask that fits its scan
MOST_TISSUE = 0.2  # likewise
MOST_LACKING = 0.3  # of either lung, likewise, where there is more than ...
LEAST_LACKING = 0.2  # litres
SIDES = ("right", "left")
LUNG_METHOD = 3  # raised whenever other lungs are found in the same scan
LUNG_GRID_MM = 3.0  # lungs are found and widened on voxels of about this size; distances between them stay exact
LUNG_HU = -400  # lung parenchyma and air lie below
PADDING_HU = -1100  # a mean of several voxels below was not measured
GAS_HU = -950  # the mean of gas in bowel or stomach lies below, that of lungs above, also of those with emphysema
BONE_HU = 180
DARK_HU = -850  # the room around the patient is darker, also where it is noisy
SMOOTHING_MM = 4  # how far the mean reaches that the room is told by
ROOM_HU = 60  # how far above the darkest of it the room still goes
LEAST_LUNG_ML = 50  # smaller dark regions are airways, bowel or folds of skin
LEAST_GAS_ML = 700  # so much plain air is a lung of plastic, or an inflated one beside a collapsed one
SLAB_MM = 50  # of a scan that is less high, smaller regions count, too
FIRST_LUNG = 0.2  # of the largest region
CUT_LUNG = 0.05  # likewise, of one that the view's top cuts
LEAST_OVERLAP = 0.6  # share of a lung's height that lies beside another lung; bowel lies below
MOST_TILT = 0.94  # cosine; a scan that is turned further is brought to the patient's axes
LEAST_HULL = 0.4  # share of the outline's hull that is lung where the outline is looked at for dents
LEAST_REACH = 0.35  # of the way from the middle of the chest to the hull; dents lie beyond
FRONT_DEGREES = 15  # so near to the patient's middle plane lie heart and spine, no dents
CUT_PATIENT = 0.4  # of the patient's outline from the side, where the view cuts it
ONE_SIDED = 0.2  # of the larger lung; a smaller one is in doubt
CROSS = ndimage.generate_binary_structure(3, 1)


def _shrink(image: sitk.Image) -> sitk.Image:
    """Averages blocks of voxels up to LUNG_GRID_MM; physical positions stay."""
    pairs = zip(image.GetSpacing(), image.GetSize(), strict=True)
    return sitk.BinShrink(image, [min(max(1, int(LUNG_GRID_MM / spacing + 0.1)), size) for spacing, size in pairs])


def select_lungs(labels: sitk.Image, lung_labels: tuple[int, ...] | None = None) -> sitk.Image | None:
    """Lungs of a label image as a coarse binary mask; None where it has none.

    Args:
        labels: Label image, or a mask.
        lung_labels: Those that are lung; None: all that is not 0.
    """
    values = sitk.GetArrayViewFromImage(labels)
    inside = values != 0 if lung_labels is None else np.zeros(values.shape, bool)
    for label in lung_labels or ():
        inside |= values == label  # several times as fast as ITK's threshold or np.isin
    lungs = _shrink(Geometry.from_image(labels).image(inside * np.uint8(200))) >= 100
    return lungs if inside.any() and sitk.GetArrayViewFromImage(lungs).any() else None


def check_scan(scan: sitk.Image) -> None:
    """Raises InputError where the values of a scan cannot be HU, or its sizes no millimetres.

    What is told: values scaled to [0, 1] or to 8 bits, of any scan; and of one of a chest's size, that it holds nothing
    as dark as lung and air, soft tissue that is far too bright, or much that is far too dark, as after a shift, a
    factor or an inversion.
    """
    sides = np.asarray(scan.GetSize()) * scan.GetSpacing()
    check(
        SIZES_MM[0] <= sides.max() <= SIZES_MM[1],
        f"the scan is {sides.max():.4g} mm long, so its spacing {scan.GetSpacing()} is not in mm; correct its header",
    )
    array = sitk.GetArrayViewFromImage(scan)
    part = tuple(slice(size // 128 // 2, None, max(1, size // 128)) for size in array.shape)
    sampled = array[part].astype(np.float32)
    values = sampled[sampled > PADDING_HU] if (sampled > PADDING_HU).any() else sampled
    low, high = float(values.min()), float(values.max())
    seen = f"its values lie between {low:.4g} and {high:.4g}"
    is_scaled = low >= -1.5 and high <= 1.5 and high > low
    check(not is_scaled, f"the scan is not in HU: {seen}, as after a scaling; take its source")
    is_picture = 0 <= low <= FULL_PICTURE[0] and FULL_PICTURE[1] <= high <= 255
    check(not is_picture, f"the scan is not in HU: {seen}, as in a picture of 8 bits; take its source")
    if sides.min() < CHEST_MM:
        return
    dark, bright = float(np.percentile(values, 0.1)), values[values > SOFT_HU]
    tissue = float(np.median(bright)) if len(bright) else -np.inf
    _, counts = np.unique(np.round(sampled[sampled < TOO_DARK_HU], -1), return_counts=True)
    share = float(np.sort(counts)[:-PADDING_VALUES].sum()) / sampled.size
    for is_right, what in (
        (dark < AIR_HU, f", or no chest: the darkest voxels reach {dark:.0f}, where air has -1000 and lungs -850"),
        (tissue < MEDIAN_HU, f": its soft tissue lies at {tissue:.0f}, not near 40"),
        (share < MOST_TOO_DARK, f": {share:.0%} of it lies below {TOO_DARK_HU} and is no padding; air has -1000"),
    ):
        check(is_right, f"the scan is not in HU{what} ({seen}); is it shifted, scaled or inverted? take its source")


def measure_noise(scan: sitk.Image) -> float | None:
    """Noise of a scan in HU: the typical difference of a voxel in soft tissue to the mean around it, in its slice.

    Returns:
        The standard deviation, by the median of the differences; None where little soft tissue is in the middle slices.
    """
    array = sitk.GetArrayViewFromImage(scan)
    found = []
    for z in np.unique(np.linspace(0.3, 0.7, 5) * len(array)).astype(int):
        plane = array[z].astype(np.float32)
        mean = ndimage.uniform_filter(plane, 3)
        smooth = ndimage.uniform_filter(plane, 9)
        found.append((plane - mean)[(smooth > TISSUE_HU[0]) & (smooth < TISSUE_HU[1])])
    differences = np.concatenate(found)
    if len(differences) < LEAST_TISSUE_VOXELS:
        return None
    return float(1.4826 * np.median(np.abs(differences)) * math.sqrt(9 / 8))


def describe_misfit(scan: sitk.Image, lungs: sitk.Image) -> str:
    """Why a lung mask seems to be that of another scan, turned, or not whole; '' where it fits.

    Args:
        scan: CT in HU.
        lungs: Binary mask that is not empty, in the same patient space.
    """
    voxels = np.argwhere(sitk.GetArrayViewFromImage(lungs))
    voxels = voxels[np.random.default_rng(0).integers(len(voxels), size=4000)]
    values = _values_at(scan, Geometry.from_image(lungs).world(voxels))
    outside = float(np.isnan(values).mean())
    if outside > MOST_OUTSIDE:
        return f"the lung mask does not fit the scan: {outside:.0%} of it lies outside"
    tissue = float((values > -200).sum() / np.isfinite(values).sum())
    if tissue > MOST_TISSUE:
        return (
            f"the lung mask does not fit the scan: {tissue:.0%} of it is soft tissue; is it upside down, another "
            "scan's, or drawn far too wide?"
        )
    found = find_lungs(scan)
    if found is None:
        return ""
    voxels = np.argwhere(sitk.GetArrayViewFromImage(found.image))
    is_lacking = ~(_values_at(lungs, Geometry.from_image(found.image).world(voxels)) > 0)
    lacking = [
        f"{share * litres:.1f} of {litres:.1f} litres on the {side}"
        for side, litres, is_of_side in zip(SIDES, found.litres, found.sides(voxels[:, 2]), strict=True)
        if litres > LEAST_LACKING and (share := float(is_lacking[is_of_side].mean())) > MOST_LACKING
    ]
    return f"the lung mask lacks {' and '.join(lacking)} of what looks like lung" if lacking else ""


def _values_at(image: sitk.Image, world_xyz: np.ndarray) -> np.ndarray:
    """The values, float32, of the voxels nearest to world positions (n, 3); NaN beyond the image."""
    index = np.rint(Geometry.from_image(image).index(world_xyz)).astype(int)
    values, array = np.full(len(index), np.nan, np.float32), sitk.GetArrayViewFromImage(image)
    inside = ((index >= 0) & (index < array.shape)).all(axis=1)
    values[inside] = array[tuple(index[inside].T)]
    return values


@dataclass(frozen=True)
class FoundLungs:
    """The lungs of a scan, and what is to be said of them.

    Args:
        image: Binary mask, airways included, on a coarse grid along the patient's axes.
        litres: Volume on the patient's right and left.
        at_edge: Sides of the view at which the lungs are cut: 'right', 'left', 'front', 'back', 'bottom', 'top'.
        left_out: Dark regions inside the patient that are no lung: (millilitres, why).
        doubtful: One of SIDES where a lung should be and little or none is, else ''.
        middle: Index along x of the patient's middle plane.
    """

    image: sitk.Image
    litres: tuple[float, float]
    at_edge: tuple[str, ...]
    left_out: tuple[tuple[float, str], ...]
    doubtful: str
    middle: int

    def doubtful_box(self, *corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The box (x, y, z) in mm of the side in doubt: from the middle plane to the edge of the view.

        Args:
            corners: Lower and upper corner of the scan, then of the lungs.
        """
        scan_lower, scan_upper, lower, upper = (corner.copy() for corner in corners)
        middle = Geometry.from_image(self.image).world([0, 0, self.middle])[0]
        if self.doubtful == "right":
            lower[0], upper[0] = scan_lower[0], middle
        else:
            lower[0], upper[0] = middle, scan_upper[0]
        return lower, upper

    def sides(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which indices along x lie on the patient's right, and on the left."""
        return x < self.middle, x >= self.middle

    def __str__(self) -> str:
        text = f"{self.litres[0]:.1f} litres on the right, {self.litres[1]:.1f} on the left"
        if self.at_edge:
            text += f"; cut by the view's edge ({', '.join(self.at_edge)})"
        if self.left_out:
            text += "; no lung: " + ", ".join(f"{volume:.0f} ml {why}" for volume, why in self.left_out)
        if self.doubtful:
            text += f"; nearly no lung on the {self.doubtful}, so that side is searched whole"
        return text


def find_lungs(scan: sitk.Image) -> FoundLungs | None:
    """Lungs of a chest CT by threshold: the dark regions that the body surrounds, wherever the view ends.

    Args:
        scan: CT in HU, any direction.

    Returns:
        The lungs; None where there are none.
    """
    hu, grid = _along_patient(scan)
    view = _view(hu)
    dark = (hu < LUNG_HU) & view
    cross = CROSS if len(hu) > 4 else CROSS & (np.arange(3) == 1)[:, None, None]  # few slices have no inside
    body = _largest(ndimage.binary_opening(view & ~dark, cross))
    if not body.any():
        return None
    room = _room(hu, grid, view, dark, body)
    inside = dark & ~room & (_directions_to(body | ~view, room, past_view=True) == 4)
    regions, _ = ndimage.label(ndimage.binary_opening(inside, cross))
    lungs, left_out = _choose_lungs(hu, regions, grid)
    if not lungs:
        return None
    mask = ndimage.binary_dilation(np.isin(regions, lungs), CROSS, iterations=2, mask=inside)
    at_edge = _cut_sides(mask, view, grid)
    middle = _middle_plane(hu, body | mask)
    right, left = (float(half.sum()) * grid.voxel_volume_mm3 / 1e6 for half in (mask[..., :middle], mask[..., middle:]))
    seen = [body[..., :middle].sum(), body[..., middle:].sum()]
    doubtful = ""
    if min(right, left) < ONE_SIDED * max(right, left) and min(seen) > 0.5 * max(seen):  # both halves are in view
        doubtful = "right" if right < left else "left"
    image = grid.image(mask.astype(np.uint8))
    return FoundLungs(image, (right, left), at_edge, left_out, doubtful, middle)


def _along_patient(scan: sitk.Image) -> tuple[np.ndarray, Geometry]:
    """Mean HU of coarse voxels, float32 (z, y, x): z to the head, y to the back, x to the patient's left."""
    clamped = sitk.Clamp(scan, scan.GetPixelID(), -1200, 400)  # of the scan's own type, for its size
    coarse = sitk.DICOMOrient(sitk.Cast(_shrink(clamped), sitk.sitkFloat32), "LPS")
    grid = Geometry.from_image(coarse)
    if np.diag(np.reshape(grid.direction, (3, 3))).min() < MOST_TILT:
        grid = Geometry.covering(*grid.bounds(), shape_zyx=None, spacing=(LUNG_GRID_MM,) * 3)
        coarse = resample(coarse, grid, fill=-1200.0)
    return sitk.GetArrayFromImage(coarse), grid


def _view(hu: np.ndarray) -> np.ndarray:
    """What was measured, bool (z, y, x): without padding, whatever its value, around a circle or a box."""
    view = ndimage.binary_fill_holes(~ndimage.binary_opening(hu < PADDING_HU, CROSS))  # holes in it are noise
    corners = hu[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    values, counts = np.unique(corners, return_counts=True)
    measured = (np.abs(hu - values[counts.argmax()]) > 1).any(axis=0)
    if counts.max() > corners.size / 2 and measured.any():  # one value in the corners: no air is so even
        view &= _convex_hull(measured)
    return view


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask."""
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    return labels == sizes.argmax() if count else np.zeros(mask.shape, bool)


def _room(hu: np.ndarray, grid: Geometry, view: np.ndarray, dark: np.ndarray, body: np.ndarray) -> np.ndarray:
    """The air around the patient: plain air that reaches a side of the view, and that the body does not enclose.

    A lung that the view cuts is enclosed on three sides, the room on two at most.
    """
    side = view & ~ndimage.binary_erosion(view, np.ones((1, 3, 3), bool))
    size = [2 * int(SMOOTHING_MM / step) + 1 for step in grid.spacing_zyx]
    weights = ndimage.uniform_filter(view.astype(np.float32), size)
    smooth = ndimage.uniform_filter(np.where(view, hu, 0), size) / np.maximum(weights, 1e-3)  # mean of those in view
    darkest = smooth[side & (smooth < DARK_HU) & (smooth > PADDING_HU)]
    if not len(darkest):
        return np.zeros(view.shape, bool)
    level = float(np.percentile(darkest, 20))
    labels, count = ndimage.label((smooth < level + ROOM_HU) & view)
    sizes = np.maximum(np.bincount(labels.ravel(), minlength=count + 1), 1)
    enclosed = _directions_to(body, ~view, past_view=False) >= 3
    share = np.bincount(labels.ravel(), enclosed.ravel(), count + 1) / sizes
    is_room = (np.bincount(labels[side], minlength=count + 1) > 0) & (share < 0.5)
    is_room[0] = False
    return ndimage.binary_dilation(is_room[labels], CROSS, iterations=2, mask=dark)


def _directions_to(wanted: np.ndarray, instead: np.ndarray, past_view: bool) -> np.ndarray:
    """In how many of the four directions of the axial plane a voxel meets ``wanted`` before ``instead``.

    Args:
        wanted: bool (z, y, x).
        instead: Likewise.
        past_view: Whether what lies beyond the array counts as met.
    """
    total = np.zeros(wanted.shape, np.uint8)
    for axis in (1, 2):
        for order in (1, -1):
            planes = [np.moveaxis(array, axis, 0)[::order] for array in (wanted, instead, total)]
            met = np.full(planes[0].shape[1:], past_view)
            for there, other, count in zip(*planes, strict=True):
                met = (met | there) & ~other
                count += met
    return total


def _choose_lungs(
    hu: np.ndarray, regions: np.ndarray, grid: Geometry
) -> tuple[list[int], tuple[tuple[float, str], ...]]:
    """The labels of the regions that are lung, and what the larger of the others are."""
    height_mm = len(hu) * grid.spacing_zyx[0]
    least, least_gas = (volume * min(1, height_mm / SLAB_MM) for volume in (LEAST_LUNG_ML, LEAST_GAS_ML))
    found = []  # (label, millilitres, lowest slice, slice above the highest, whether plain air)
    left_out = []
    for label, box in enumerate(ndimage.find_objects(regions), start=1):
        inside = regions[box] == label
        volume = float(inside.sum()) * grid.voxel_volume_mm3 / 1e3
        is_gas = float(hu[box][inside].mean()) < GAS_HU
        if volume >= (least_gas if is_gas else least):
            found.append((label, volume, box[0].start, box[0].stop, is_gas))
        elif volume >= least:
            left_out.append((volume, "of plain air"))
    if not found:
        return [], ()
    # The first lung is the largest region near the top, or of those that the view's top cuts. What is small beside a
    # much larger one is none, such as the throat; nor is plain air beside something else that is large.
    largest = max(volume for _, volume, *_ in found)
    of_lung = [region for region in found if not region[4]]
    of_lung = of_lung if any(region[1] >= FIRST_LUNG * largest for region in of_lung) else found
    cut = [region for region in of_lung if region[3] == len(hu) and region[1] >= CUT_LUNG * largest]
    large = cut or [region for region in of_lung if region[1] >= FIRST_LUNG * largest]
    near_top = max(stop for *_, stop, _ in large) - 30 / grid.spacing_zyx[0]  # mm: lungs end at about one height
    chosen = [max((region for region in large if region[3] >= near_top), key=lambda region: region[1])]
    for region in sorted(found, key=lambda region: -region[1]):
        if region in chosen:
            continue
        _, volume, start, stop, _ = region
        low, high = min(other[2] for other in chosen), max(other[3] for other in chosen)
        if (min(high, stop) - max(low, start)) / (stop - start) >= LEAST_OVERLAP:
            chosen.append(region)
        else:
            left_out.append((volume, "below the lungs" if start < low else "above the lungs"))
    return [label for label, *_ in chosen], tuple(left_out)


def _middle_plane(hu: np.ndarray, patient: np.ndarray) -> int:
    """Index along x of the spine: where the back half of the patient holds most bone.

    It lies in the middle half, unless the view holds half a patient: then one of its sides cuts the patient, the other
    one does not, and the spine is near the cut or out of view.
    """
    rows, columns = (np.flatnonzero(patient.any(axis=axes)) for axes in ((0, 2), (0, 1)))
    first, last = columns[0], columns[-1]
    bone = ((hu > BONE_HU) & patient)[:, (rows[0] + rows[-1]) // 2 :].sum(axis=(0, 1)).astype(float)
    bone = ndimage.uniform_filter1d(bone, 9)
    quarter, outline = (last - first) // 4, patient.any(axis=2).sum()
    cuts = [patient[..., column].sum() / outline for column in (first, last)]
    if max(cuts) > CUT_PATIENT and min(cuts) < CUT_PATIENT / 2:
        edge = first if cuts[0] > cuts[1] else last
        return int(bone.argmax() if abs(int(bone.argmax()) - edge) <= quarter else edge + (edge == last))
    bone[: first + quarter] = bone[last - quarter :] = 0
    return int(bone.argmax()) if bone.any() else int((first + last) // 2)


def _cut_sides(mask: np.ndarray, view: np.ndarray, grid: Geometry) -> tuple[str, ...]:
    """The sides of the view at which at least a square centimetre of a mask is cut."""
    names = (("bottom", "top"), ("front", "back"), ("right", "left"))
    found = []
    for axis, pair in enumerate(names):
        face = math.prod(step for other, step in enumerate(grid.spacing_zyx) if other != axis)
        ahead = np.moveaxis(mask, axis, 0)
        seen = np.moveaxis(view, axis, 0)
        for name, order in zip(pair, (1, -1), strict=True):
            planes, there = ahead[::order], seen[::order]
            beyond = np.concatenate([np.zeros_like(there[:1]), there[:-1]])
            if (planes & ~beyond).sum() * face >= 100:
                found.append(name)
    return tuple(name for pair in (names[2], names[1], names[0]) for name in pair if name in found)


def fill_dents(found: FoundLungs) -> sitk.Image:
    """The lungs with what dents them from outside, such as a mass at the chest wall.

    In each axial slice the outline of either lung is compared with its convex hull. What lies between is taken in where
    no lung lies beyond it, seen from the middle of the chest: so heart, spine and diaphragm stay out.
    """
    lungs = sitk.GetArrayFromImage(found.image) > 0
    filled, (dy, dx) = lungs.copy(), found.image.GetSpacing()[1::-1]
    at = np.moveaxis(np.indices(lungs.shape[1:]), 0, -1)
    for side in found.sides(np.arange(lungs.shape[2])):
        for z in np.flatnonzero(lungs[:, :, side].any(axis=(1, 2))):
            lung = lungs[z] & side
            hull = _convex_hull(lung)
            if lung.sum() < LEAST_HULL * hull.sum():
                continue
            offset = (at - [np.argwhere(lung)[:, 0].mean(), found.middle]) * (dy, dx)
            degrees = np.degrees(np.arctan2(offset[..., 0], offset[..., 1])).astype(int) % 360
            reach = np.hypot(offset[..., 0], offset[..., 1])
            of_lung, of_hull = (np.zeros(360), np.zeros(360))
            np.maximum.at(of_lung, degrees[lung], reach[lung])
            np.maximum.at(of_hull, degrees[hull], reach[hull])
            beyond = (reach >= of_lung[degrees]) & (reach >= LEAST_REACH * of_hull[degrees])
            filled[z] |= hull & beyond & (np.abs(degrees % 180 - 90) > FRONT_DEGREES)
    return Geometry.from_image(found.image).image(filled.astype(np.uint8))


def _convex_hull(plane: np.ndarray) -> np.ndarray:
    """All pixels within the convex hull of those of a mask (y, x)."""
    points = np.argwhere(plane & ~ndimage.binary_erosion(plane))
    try:
        corners = points[ConvexHull(points).vertices]
    except QhullError:  # a line, or less than three pixels
        return plane
    pixels = np.moveaxis(np.indices(plane.shape), 0, -1).reshape(-1, 2)
    return PolygonPath(corners).contains_points(pixels, radius=1e-6).reshape(plane.shape) | plane


def widen(lungs: sitk.Image, closing_mm: float, margin_mm: float) -> sitk.Image:
    """Closes a mask by a ball of radius ``closing_mm`` and grows it by ``margin_mm``, by distance maps.

    Returns:
        Float image on a padded grid: the signed distance in mm to the border of the widened mask, negative inside. It
        can be sampled linearly on any grid.
    """
    start_xyz, size_xyz = _mask_box(lungs)
    box = sitk.RegionOfInterest(lungs, size_xyz.tolist(), start_xyz.tolist())  # nothing farther off can matter
    padding = [int(np.ceil((closing_mm + margin_mm) / spacing)) + 1 for spacing in lungs.GetSpacing()]
    far = _distance_to(sitk.ConstantPad(box, padding, padding, 0)) > closing_mm
    return signed_distance(_distance_to(far) > closing_mm) - margin_mm


def _distance_to(mask: sitk.Image) -> sitk.Image:
    """Distance in mm to the centres of the mask's border voxels.

    Growing a mask by it and then shrinking the result cancels the half voxel between centre and border.
    """
    return sitk.SignedMaurerDistanceMap(mask, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)


def _mask_box(mask: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """First voxel and size (x, y, z) of the box around a binary mask that is not empty."""
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(mask)
    start_xyz, size_xyz = np.split(np.asarray(shape.GetBoundingBox(1)), 2)
    return start_xyz, size_xyz


def mask_bounds(mask: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """World box (x, y, z) in mm around a binary mask that is not empty."""
    start_xyz, size_xyz = _mask_box(mask)
    return Geometry.from_image(mask).cropped(Box.of_size(start_xyz[::-1], size_xyz[::-1])).bounds()
