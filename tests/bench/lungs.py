"""How well lungs are found by threshold, by a plain method and here, in scans that are cut, turned and changed.

python tests/bench/lungs.py
python tests/bench/lungs.py --raw_data_dir FOLDER_OF_SCANS --pictures FOLDER

The truth is the true mask of a phantom; of a real scan, what is found in the whole of it, so look at its picture first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jsonargparse import auto_cli
from matplotlib.figure import Figure

from data.lungs import check_scan, fill_dents, find_lungs, widen
from data.phantom import make_phantom
from preprocess import Preprocessing
from utils import Geometry, InputError, list_scans, read_scan, resample

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


def noisy(noise_hu: float) -> Callable[[sitk.Image, sitk.Image], Pair]:
    """Noise of a standard deviation in each voxel."""

    def add(scan: sitk.Image, lungs: sitk.Image) -> Pair:
        hu, truth, geometry = arrays(scan, lungs)
        return images(hu + np.random.default_rng(0).normal(0, noise_hu, hu.shape), truth, geometry)

    return add


KINDS: dict[str, Callable[[sitk.Image, sitk.Image], Pair]] = {
    "whole": whole,
    "noise of 150 HU": noisy(150),
    "noise of 250 HU": noisy(250),
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


@dataclass(frozen=True)
class Row:
    """What one method found in one scan of one kind.

    Args:
        dice: Against the true lungs; NaN where the method raised an error.
        seconds: Of the method alone.
        kept: Share of a mass in the lung that the widened mask keeps; NaN where there is none.
        litres: Volume of the widened mask.
    """

    dice: float
    seconds: float
    kept: float = np.nan
    litres: float = np.nan


def plain(scan: sitk.Image) -> sitk.Image | None:
    """The two largest regions of air that tissue encloses in each slice, after Hu et al. 2001 (10.1109/42.929615)."""
    pairs = zip(scan.GetSpacing(), scan.GetSize(), strict=True)
    factors = [min(max(1, int(3 / step + 0.1)), size) for step, size in pairs]
    coarse = sitk.Cast(sitk.BinShrink(sitk.Clamp(scan, scan.GetPixelID(), -1000, 400), factors), sitk.sitkFloat32)
    tissue = coarse >= -400
    filled = sitk.JoinSeries([sitk.BinaryFillhole(tissue[:, :, z]) for z in range(tissue.GetDepth())])
    filled.CopyInformation(tissue)
    regions = sitk.ConnectedComponent(sitk.And(filled, sitk.Not(tissue)))
    statistics = sitk.LabelIntensityStatisticsImageFilter()
    statistics.Execute(regions, coarse)
    found = sorted(
        (statistics.GetPhysicalSize(label), label)
        for label in statistics.GetLabels()
        if statistics.GetPhysicalSize(label) > 200e3 and statistics.GetMean(label) > -920
    )
    if not found:
        return None
    chosen = [label for volume, label in found[-2:] if volume > 0.05 * found[-1][0]]
    return Geometry.from_image(regions).image(np.isin(sitk.GetArrayViewFromImage(regions), chosen).astype(np.uint8))


def here(scan: sitk.Image) -> sitk.Image | None:
    """The project's method, without the dents."""
    found = find_lungs(scan)
    return None if found is None else found.image


def here_with_dents(scan: sitk.Image) -> sitk.Image | None:
    """The project's method, as scans are prepared by it."""
    found = find_lungs(scan)
    return None if found is None else fill_dents(found)


METHODS = {"plain": plain, "here": here, "here, dents filled": here_with_dents}


def on_grid_of(image: sitk.Image, found: sitk.Image) -> np.ndarray:
    """A mask, bool (z, y, x), on the grid of an image."""
    return sitk.GetArrayFromImage(sitk.Resample(found, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)) > 0


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|)."""
    return float(2 * (found & truth).sum() / max(found.sum() + truth.sum(), 1))


def study(
    scan: sitk.Image, lungs: sitk.Image, kinds: list[str], picture: Path | None = None
) -> Iterator[tuple[str, str, Row]]:
    """(kind, method, what it found) for each kind and method; pictures of the project's own where they are wanted."""
    settings = Preprocessing()
    for kind in kinds:
        changed, truth = KINDS[kind](scan, lungs)
        true = sitk.GetArrayFromImage(truth) > 0
        for name, method in METHODS.items():
            start = time.perf_counter()
            try:
                found = method(changed)
            except RuntimeError:
                yield kind, name, Row(np.nan, time.perf_counter() - start)
                continue
            row = Row(0.0, time.perf_counter() - start)
            if found is not None:
                row = replace(row, dice=dice(on_grid_of(truth, found), true))
                if picture is not None and name == "here, dents filled":
                    draw(picture.with_name(f"{picture.name} {kind}.png"), changed, on_grid_of(changed, found))
                if kind.startswith("mass"):
                    mass = true & (sitk.GetArrayFromImage(changed) != sitk.GetArrayFromImage(scan))
                    widened = widen(found, settings.lung_closing_mm, settings.lung_margin_mm)
                    inside = sitk.GetArrayFromImage(resample(widened, Geometry.from_image(scan), fill=1e3)) <= 0
                    volume = float(inside.sum()) * Geometry.from_image(scan).voxel_volume_mm3 / 1e6
                    row = replace(row, kept=float(inside[mass].mean()), litres=volume)
            yield kind, name, row


def draw(path: Path, scan: sitk.Image, lungs: np.ndarray) -> None:
    """Draws three axial and three coronal slices with the outline of the lungs."""
    hu = sitk.GetArrayFromImage(scan)
    dz, dy, dx = Geometry.from_image(scan).spacing_zyx
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    rows, columns = (np.flatnonzero(lungs.any(axis=axes)) for axes in ((1, 2), (0, 2)))
    for column, share in enumerate((0.25, 0.5, 0.75)):
        z, y = (int(np.quantile(at, share)) if len(at) else 0 for at in (rows, columns))
        planes = ((hu[z], lungs[z], dy / dx), (hu[::-1, y], lungs[::-1, y], dz / dx))
        for row, (plane, mask, aspect) in enumerate(planes):
            axes = figure.add_subplot(2, 3, 1 + column + 3 * row)
            axes.imshow(plane, "gray", vmin=-1000, vmax=400, aspect=aspect)
            if mask.any() and not mask.all():
                axes.contour(mask, [0.5], colors="tab:orange", linewidths=0.8)
            axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def of_phantom(index: int, kinds: list[str], pictures: Path | None) -> list[tuple[str, str, Row]]:
    """The study of a phantom of one of 16 makers."""
    phantom = make_phantom(index, seed=5, size_xyz=(192, 192, 100), makers=list(range(16)))
    labels = sitk.GetArrayFromImage(phantom.lungs)
    truth = Geometry.from_image(phantom.lungs).image(np.isin(labels, (3, 4)).astype(np.uint8))
    return list(study(phantom.image, truth, kinds, None if pictures is None else pictures / str(index)))


def of_scan(path: Path, kinds: list[str], pictures: Path | None) -> list[tuple[str, str, Row]]:
    """The study of a real scan, against what is found in the whole of it."""
    scan = sitk.Cast(read_scan(path), sitk.sitkInt16)
    try:
        check_scan(scan)
    except InputError:  # a mask beside the scans
        return []
    found = here(scan)
    if found is None:
        return [("whole", "here", Row(0.0, 0.0))]
    truth = Geometry.from_image(scan).image(on_grid_of(scan, found).astype(np.uint8))
    return list(study(scan, truth, kinds, None if pictures is None else pictures / path.name[-20:]))


def main(
    raw_data_dir: Path | None = None,
    phantoms: int = 40,
    kinds: list[str] = list(KINDS),  # noqa: B006 - never changed
    processes: int = 1,
    pictures: Path | None = None,
) -> None:
    """Prints two tables by kind: Dice and seconds of each method, and what it keeps of masses at what volume.

    Args:
        raw_data_dir: Folder of real scans; null takes phantoms.
        phantoms: Number of phantoms.
        kinds: Names in KINDS.
        processes: Scans at a time.
        pictures: Folder for a picture of each scan and kind; null draws none.
    """
    paths: Sequence[Any] = range(phantoms) if raw_data_dir is None else list_scans(raw_data_dir)
    with ProcessPoolExecutor(processes) as pool:
        work = pool.map(of_phantom if raw_data_dir is None else of_scan, paths, repeat(kinds), repeat(pictures))
        found = [(kind, method, *astuple(row)) for result in work for kind, method, row in result]
    table = pd.DataFrame(found, columns=["kind", "method", *(field.name for field in fields(Row))])
    by_kind = table.groupby(["kind", "method"], sort=False)
    print(by_kind["dice"].agg(["mean", "min", "count"]).unstack("method").round(3).to_string())  # count: without errors
    print(by_kind["seconds"].mean().unstack("method").round(2).to_string())
    print(by_kind[["kept", "litres"]].mean().dropna().unstack("method").round(3).to_string())


if __name__ == "__main__":
    auto_cli(main)
