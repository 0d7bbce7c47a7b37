"""How well lungs are found by threshold, beside true masks of phantoms and beside themselves on real scans.

python tests/bench/lungs.py
python tests/bench/lungs.py --raw_data_dir FOLDER_OF_SCANS --kinds '[half, tilted]'

Each scan is also cut, turned and changed as scans of other places are. The truth of a real scan is what is found in the
whole of it, so look at its picture first (``--pictures FOLDER``).
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import SimpleITK as sitk
from jsonargparse import auto_cli

from data.lungs import find_lungs
from data.phantom import make_phantom
from utils import Geometry, list_scans, read_scan

AIR, LUNG = -1000, -850
Pair = tuple[sitk.Image, sitk.Image]  # scan in HU and its lungs


def arrays(scan: sitk.Image, lungs: sitk.Image) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """HU (z, y, x), lungs, and where the voxels lie."""
    return sitk.GetArrayFromImage(scan), sitk.GetArrayFromImage(lungs) > 0, Geometry.from_image(scan)


def images(hu: np.ndarray, lungs: np.ndarray, geometry: Geometry) -> Pair:
    """The reverse of ``arrays``."""
    return geometry.image(np.rint(hu).clip(-32768, 32767).astype(np.int16)), geometry.image(lungs.astype(np.uint8))


def cut(scan: sitk.Image, lungs: sitk.Image, lower_xyz: np.ndarray, upper_xyz: np.ndarray) -> Pair:
    """A part of both."""
    size = (upper_xyz - lower_xyz).astype(int).tolist()
    start = np.asarray(lower_xyz).astype(int).tolist()
    return sitk.RegionOfInterest(scan, size, start), sitk.RegionOfInterest(lungs, size, start)


def lung_box(lungs: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """First voxel (x, y, z) of the lungs, and the one behind the last."""
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(lungs)
    start, size = np.split(np.array(shape.GetBoundingBox(1)), 2)
    return start, start + size


# -------------------------------------------------------------------------------------------------------------- kinds


def whole(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """As it is."""
    return scan, lungs


def sides_cut(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """The view ends 10 mm within the lungs on either side."""
    (low, high), size = lung_box(lungs), np.array(scan.GetSize())
    step = round(10 / scan.GetSpacing()[0])
    return cut(scan, lungs, np.array([low[0] + step, 0, 0]), np.array([high[0] - step, *size[1:]]))


def half(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """One half of the patient, from the middle to the edge."""
    low, high = lung_box(lungs)
    return cut(scan, lungs, np.zeros(3), np.array([(low[0] + high[0]) // 2, *scan.GetSize()[1:]]))


def back_cut(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """The view ends 15 mm within the lungs at the back."""
    _, high = lung_box(lungs)
    end = high[1] - round(15 / scan.GetSpacing()[1])
    return cut(scan, lungs, np.zeros(3), np.array([scan.GetSize()[0], end, scan.GetSize()[2]]))


def bases(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """An abdomen that holds the lowest 80 mm of the lungs."""
    low, _ = lung_box(lungs)
    top = min(low[2] + round(80 / scan.GetSpacing()[2]), scan.GetSize()[2])
    return cut(scan, lungs, np.zeros(3), np.array([*scan.GetSize()[:2], top]))


def bases_and_bowel(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """The lowest 100 mm of the lungs over a bowel of 350 ml at -800 HU."""
    low, _ = lung_box(lungs)
    spacing = np.array(scan.GetSpacing())
    top = min(low[2] + round(100 / spacing[2]), scan.GetSize()[2])
    room = max(0, round(80 / spacing[2]) - low[2])
    scan, lungs = (sitk.ConstantPad(image, [0, 0, int(room)], [0] * 3, 40 * (image is scan)) for image in (scan, lungs))
    hu, truth, geometry = arrays(*cut(scan, lungs, np.zeros(3), np.array([*scan.GetSize()[:2], top + room])))
    first = np.flatnonzero(truth.any(axis=(1, 2)))[0]
    body = hu[first + 1] > -300
    y, x = np.argwhere(body).mean(axis=0)
    place = [first - 48 / spacing[2], y, x + 30 / spacing[0]]
    parts = zip(np.ogrid[tuple(slice(n) for n in hu.shape)], place, spacing[::-1], (36, 45, 52), strict=True)
    bowel = sum(((at - middle) * step / reach) ** 2 for at, middle, step, reach in parts) <= 1
    below = np.arange(len(hu)) < first
    hu[below[:, None, None] & body[None] & (hu < -300)] = 40
    hu[bowel] = -800 + np.random.default_rng(0).normal(0, 20, int(bowel.sum()))
    return images(hu, truth, geometry)


def emphysema(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """Lungs of -930 HU."""
    hu, truth, geometry = arrays(scan, lungs)
    dark = truth & (hu < -600)
    hu = hu.astype(float)
    hu[dark] += -930 - hu[dark].mean()
    return images(np.maximum(hu, -1024), truth, geometry)


def plain_air(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """Lungs of air, as in a phantom of plastic."""
    hu, truth, geometry = arrays(scan, lungs)
    hu[truth] = AIR
    return images(hu, truth, geometry)


def mass(diameter_mm: float) -> Callable[[sitk.Image, sitk.Image], Pair]:
    """A mass at the chest wall, which belongs to the lung."""

    def put(scan: sitk.Image, lungs: sitk.Image) -> Pair:
        hu, truth, geometry = arrays(scan, lungs)
        z = int(np.argwhere(truth.any(axis=(1, 2))).mean())
        y = int(np.argwhere(truth[z].any(axis=1)).mean())
        edge = np.flatnonzero(truth[z, y])[0]
        place = np.array([z, y, edge + 0.3 * diameter_mm / geometry.spacing_zyx[2]])
        parts = zip(np.ogrid[tuple(slice(n) for n in hu.shape)], place, geometry.spacing_zyx, strict=True)
        ball = sum(((at - middle) * step) ** 2 for at, middle, step in parts) <= diameter_mm**2 / 4
        hu[ball & truth] = 40
        return images(hu, truth, geometry)

    return put


def tilted(degrees: float) -> Callable[[sitk.Image, sitk.Image], Pair]:
    """The scan's axes turned about x, so that no axis is the patient's."""

    def turn(scan: sitk.Image, lungs: sitk.Image) -> Pair:
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turned = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.reshape(scan.GetDirection(), (3, 3))
        pair = sitk.Image(scan), sitk.Image(lungs)
        for image in pair:
            image.SetDirection(turned.ravel().tolist())
        return pair

    return turn


def stored(*order: int) -> Callable[[sitk.Image, sitk.Image], Pair]:
    """The same scan with its axes in another order, as coronal or sagittal slices."""

    def permute(scan: sitk.Image, lungs: sitk.Image) -> Pair:
        return sitk.PermuteAxes(scan, list(order)), sitk.PermuteAxes(lungs, list(order))

    return permute


def table(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """The patient lies on a hollow table: a shell of 6 mm around 50 mm of foam."""
    hu, truth, geometry = arrays(scan, lungs)
    dz, dy, dx = geometry.spacing_zyx
    grown, gap = round(90 / dy), round(12 / dy)
    hu, truth = (np.pad(a, ((0, 0), (0, grown), (0, 0)), constant_values=f) for a, f in ((hu, AIR), (truth, False)))
    back = np.flatnonzero((hu > -300).any(axis=(0, 2)))[-1] + gap
    middle, width, shell = hu.shape[2] // 2, round(200 / dx), max(1, round(6 / dy))
    inside = slice(max(middle - width, 0), middle + width)
    bottom = back + round(60 / dy)
    hu[:, back:bottom, inside] = -200
    foam = hu[:, back + shell : bottom - shell, inside][:, :, max(1, round(6 / dx)) : -max(1, round(6 / dx))]
    foam[...] = -900
    del dz
    return images(hu, truth, Geometry(hu.shape, geometry.origin, geometry.spacing, geometry.direction))


def noisy(scan: sitk.Image, lungs: sitk.Image) -> Pair:
    """Noise of 150 HU in each voxel."""
    hu, truth, geometry = arrays(scan, lungs)
    return images(hu + np.random.default_rng(0).normal(0, 150, hu.shape), truth, geometry)


KINDS: dict[str, Callable[[sitk.Image, sitk.Image], Pair]] = {
    "whole": whole,
    "noisy": noisy,
    "sides cut": sides_cut,
    "back cut": back_cut,
    "half": half,
    "bases": bases,
    "bases and bowel": bases_and_bowel,
    "emphysema": emphysema,
    "plain air": plain_air,
    "tilted by 0.001 degrees": tilted(0.001),
    "tilted by 10 degrees": tilted(10),
    "coronal": stored(0, 2, 1),
    "sagittal": stored(1, 2, 0),
    "table": table,
    "mass of 20 mm": mass(20),
    "mass of 50 mm": mass(50),
    "mass of 80 mm": mass(80),
}


# -------------------------------------------------------------------------------------------------------------- study


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|)."""
    return float(2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1))


def study(scan: sitk.Image, lungs: sitk.Image, kinds: list[str]) -> Iterator[tuple[str, float, float]]:
    """(kind, Dice, seconds) of one scan; a method that raises has Dice NaN."""
    for kind in kinds:
        changed, truth = KINDS[kind](scan, lungs)
        start = time.perf_counter()
        try:
            found = find_lungs(changed)
        except RuntimeError:
            yield kind, float("nan"), time.perf_counter() - start
            continue
        seconds = time.perf_counter() - start
        if found is None:
            yield kind, 0.0, seconds
            continue
        there = sitk.Resample(found.image, truth, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
        yield kind, dice(sitk.GetArrayFromImage(there) > 0, sitk.GetArrayFromImage(truth) > 0), seconds


def of_phantom(index: int, kinds: list[str]) -> list[tuple[str, float, float]]:
    """The study of a phantom of one of 16 makers."""
    phantom = make_phantom(index, seed=5, size_xyz=(192, 192, 100), makers=list(range(16)))
    labels = sitk.GetArrayFromImage(phantom.lungs)
    truth = Geometry.from_image(phantom.lungs).image(np.isin(labels, (3, 4)).astype(np.uint8))
    return list(study(phantom.image, truth, kinds))


def of_scan(path: Path, kinds: list[str]) -> list[tuple[str, float, float]]:
    """The study of a real scan, against what is found in the whole of it."""
    scan = sitk.Cast(read_scan(path), sitk.sitkInt16)
    found = find_lungs(scan)
    if found is None:
        return [("whole", 0.0, 0.0)]
    return list(study(scan, sitk.Resample(found.image, scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0), kinds))


def main(
    raw_data_dir: Path | None = None,
    phantoms: int = 40,
    kinds: list[str] = list(KINDS),  # noqa: B006 - never changed
    processes: int = 1,
) -> None:
    """Prints a table: for each kind the mean and the lowest Dice, how many are below 0.9, and seconds a scan.

    Args:
        raw_data_dir: Folder of real scans; null takes phantoms.
        phantoms: Number of phantoms.
        kinds: Names in KINDS.
        processes: Scans at a time.
    """
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with ProcessPoolExecutor(processes) as pool:
        if raw_data_dir is None:
            results = pool.map(of_phantom, range(phantoms), [kinds] * phantoms)
        else:
            paths = [path for path in list_scans(raw_data_dir) if "majority" not in path.name]
            results = pool.map(of_scan, paths, [kinds] * len(paths))
        for result in results:
            for kind, value, seconds in result:
                rows[kind].append((value, seconds))
    print("| scan | Dice, mean | lowest | below 0.9 | failed | s |\n| --- | --- | --- | --- | --- | --- |")
    for kind, found in rows.items():
        values, seconds = np.array(found).T
        good = values[np.isfinite(values)]
        shown = f"{good.mean():.3f} | {good.min():.3f} | {(good < 0.9).sum()}" if len(good) else "| | "
        print(f"| {kind} | {shown} | {np.isnan(values).sum()} of {len(values)} | {seconds.mean():.2f} |")


if __name__ == "__main__":
    auto_cli(main)
