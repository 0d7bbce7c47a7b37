"""Writes synthetic chest CTs with lung nodules in LUNA16's format, so that everything can be tried without its 100 GB.

    python data/phantom.py --num_scans 12 --size_xyz '[256,256,120]'

The patient is a set of signed distances (mm, negative inside) in a canonical frame: x to the patient's left, y to the
back, z to the head, the origin between the hila. A pose (rotation, scale, shift) takes it to world LPS millimetres.
Large organs are evaluated on a coarse lattice and interpolated, because distances are smooth; vessels and nodules are
drawn on the voxels in their own bounding boxes. Fields are (z, y, x).
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from scipy import ndimage, spatial
from tqdm import tqdm

logger = logging.getLogger(__name__)

Array = NDArray[np.floating]
Box = tuple[slice, slice, slice]  # z, y, x

UID_PREFIX = "1.2.826.0.1.3680043.10.1338"
TABLES = ("annotations.csv", "annotations_excluded.csv", "seriesuids.csv")  # the last one is written last
COLUMNS = ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]
LEFT_LUNG, RIGHT_LUNG, AIRWAY = 3, 4, 5  # labels of seg-lungs-LUNA16
LATTICE_MM = 3.0
HEIGHT_MM = 259  # of the field of view, in the mean
TWIGS = 520  # end points of each of the four pulmonary trees

# Hounsfield units
AIR, LUMEN, FAT, FLUID, MUSCLE, LIVER, SKIN = -1000, -970, -100, 15, 55, 60, 20
CARTILAGE, DISC, MARROW, CORTEX = 110, 85, 160, 700
AIRWAY_WALL, FISSURE, GROUND_GLASS, SOLID, CALCIFIED = -150, -720, -560, 35, 450
TABLE_SHELL, TABLE_CORE = 100, -900

# The great vessels: canonical end points (mm) and radii. Their union, a little wider, indents the lungs.
GREAT_VESSELS = [
    ((-8, -28, -15), (-14, -26, 30), 15, 15),  # ascending aorta
    ((-14, -26, 30), (-2, -8, 52), 15, 13.5),  # arch
    ((-2, -8, 52), (20, 28, 46), 13.5, 12.5),
    ((20, 28, 46), (25, 44, 15), 12.5, 12),  # descending aorta
    ((25, 44, 15), (20, 42, -75), 12, 11),
    ((20, 42, -75), (6, 34, -160), 11, 10),
    ((-30, -18, 75), (-30, -14, -15), 9, 10),  # superior vena cava
    ((-30, -18, 75), (25, -34, 92), 7, 6),  # left brachiocephalic vein
    ((-30, -18, 75), (-52, -10, 130), 7, 6),
    ((-6, -12, 54), (-24, -2, 130), 6.5, 5),  # arteries of head and arms
    ((4, -2, 55), (18, 4, 130), 5, 4),
    ((12, 12, 53), (34, 12, 130), 5, 5),
    ((16, -44, -8), (16, -22, 22), 14, 13),  # pulmonary trunk and arteries
    ((16, -22, 22), (40, 10, 20), 12, 8.5),
    ((14, -18, 18), (-38, -2, 10), 11, 8),
    ((-8, 8, -20), (16, 8, -18), 17, 17),  # left atrium and lower veins
    ((-8, 8, -20), (-42, 6, -12), 10, 5.5),
    ((16, 8, -18), (38, 12, -16), 10, 5.5),
    ((-18, -5, -60), (-18, 2, -160), 11, 11),  # inferior vena cava
]
AIRWAYS = [
    ((0, 4, 135), (-1, 16, 34), 8.5, 8.5),  # trachea
    ((-1, 16, 34), (-30, 16, 12), 7, 6.2),  # main bronchi
    ((-1, 16, 34), (38, 20, 6), 6.5, 5.5),
    ((-30, 16, 12), (-46, 6, 26), 4.5, 3.2),  # lobar bronchi
    ((-30, 16, 12), (-40, 18, -22), 5, 3.6),
    ((38, 20, 6), (50, 4, 16), 4, 3),
    ((38, 20, 6), (46, 26, -26), 4.5, 3.4),
]
ESOPHAGUS = [((4, 28, 135), (5, 32, 20), 7, 7), ((5, 32, 20), (10, 28, -75), 7, 8), ((10, 28, -75), (35, 0, -95), 8, 8)]
COLLAR_BONES = [((s * 22, -52, 84), (s * 80, -50, 104), 7.0, 5.5) for s in (-1, 1)]
COLLAR_BONES += [((s * 80, -50, 104), (s * 150, -5, 112), 5.5, 6.0) for s in (-1, 1)]
# Where the pulmonary trees begin: two arteries, then two veins.
HILA = [(-36, 0, 8), (40, 12, 14), (-38, 8, -14), (38, 10, -14)]


@dataclass(frozen=True)
class Nodule:
    """A finding.

    Args:
        center_xyz: Centre in world LPS mm.
        diameter_mm: Diameter; -1 for a finding without one.
        kind: solid, part_solid, ground_glass, pleural, vascular, tiny or scar.
    """

    center_xyz: tuple[float, float, float]
    diameter_mm: float
    kind: str


@dataclass(frozen=True)
class Phantom:
    """A synthetic scan: CT (int16, HU), lung mask (uint8, same geometry), what is annotated and what is excluded."""

    seriesuid: str
    image: sitk.Image
    lungs: sitk.Image
    nodules: list[Nodule]
    excluded: list[Nodule]


@dataclass(frozen=True)
class Maker:
    """What differs between scanners and between makers of phantoms; the defaults are those of a phantom without makers.

    Args:
        noise: Factor of the noise.
        grain: Factor of the width of its texture.
        blur_mm: Width (standard deviation) in the slice by which the kernel smooths.
        sharpening: Share by which the kernel enhances edges.
        slice_mm: Distance of the slices; 0 takes the number of slices that was asked for.
        contrast_hu: Added to the nodules; half of it to ground glass, nothing to what is calcified.
        edge: Factor of the width of the nodules' edges.
        lobes: Relative depth of the bumps of a nodule.
        vessels: Factor of the vessels' radii.
        twigs: End points of each of the four pulmonary trees.
        most_tiny: Largest number of excluded nodules in a scan, at least 1.
        most_scars: Largest number of scars, at least 1.
        breathing_mm: Width of the blur along z that breathing leaves at the lowest slice; none at the highest.
    """

    noise: float = 1.0
    grain: float = 1.0
    blur_mm: float = 0.0
    sharpening: float = 0.0
    slice_mm: float = 0.0
    contrast_hu: float = 0.0
    edge: float = 1.0
    lobes: float = 0.05
    vessels: float = 1.0
    twigs: int = TWIGS
    most_tiny: int = 4
    most_scars: int = 3
    breathing_mm: float = 0.0

    @classmethod
    def draw(cls, number: int) -> "Maker":
        """The maker of a number: the same number gives the same one."""
        rng = np.random.default_rng([number, 13])
        is_sharp = rng.random() < 0.5
        return cls(
            noise=float(np.exp(rng.uniform(np.log(0.5), np.log(2)))),
            grain=rng.uniform(0.6, 2),
            blur_mm=0.0 if is_sharp else rng.uniform(0.3, 1.2),
            sharpening=rng.uniform(0.2, 1) if is_sharp else 0.0,
            slice_mm=rng.uniform(1, 3),
            contrast_hu=rng.uniform(-150, 60),
            edge=rng.uniform(0.7, 2),
            lobes=rng.uniform(0.02, 0.16),
            vessels=rng.uniform(0.7, 1.35),
            twigs=int(rng.integers(250, 901)),
            most_tiny=int(rng.integers(1, 9)),
            most_scars=int(rng.integers(1, 7)),
            breathing_mm=rng.uniform(0, 3) if rng.random() < 0.5 else 0.0,
        )


PLAIN = Maker()


@dataclass(frozen=True)
class Grid:
    """Axis-aligned points in world mm, ascending along every axis."""

    origin_xyz: NDArray[np.float64]
    spacing_xyz: NDArray[np.float64]
    size_xyz: tuple[int, int, int]

    def axis(self, dim: int) -> NDArray[np.float64]:
        """World coordinates along x (0), y (1) or z (2)."""
        return self.origin_xyz[dim] + self.spacing_xyz[dim] * np.arange(self.size_xyz[dim])

    def box(self, low_xyz: NDArray[np.float64], high_xyz: NDArray[np.float64]) -> Box:
        """Slices (z, y, x) of the points between two world corners; may be empty."""
        low = np.clip(np.ceil((low_xyz - self.origin_xyz) / self.spacing_xyz), 0, self.size_xyz).astype(int)
        high = np.clip(np.floor((high_xyz - self.origin_xyz) / self.spacing_xyz) + 1, low, self.size_xyz).astype(int)
        return slice(low[2], high[2]), slice(low[1], high[1]), slice(low[0], high[0])

    def mesh(self, box: Box) -> tuple[Array, Array, Array]:
        """World x, y, z of a box, broadcastable to its (z, y, x) shape."""
        x, y, z = (self.axis(dim)[box[2 - dim]].astype(np.float32) for dim in range(3))
        return x[None, None, :], y[None, :, None], z[:, None, None]


@dataclass(frozen=True)
class Patient:
    """What differs from scan to scan. The pose is world = center + (canonical * scale) @ rotation.T"""

    rotation: NDArray[np.float64]
    scale_xyz: NDArray[np.float64]
    center_xyz: NDArray[np.float64]
    fat_mm: float
    dome_mm: tuple[float, float]  # height of the right and left diaphragm
    heart: float  # relative size
    rib_phase_mm: float
    blood_hu: float
    lung_hu: float
    noise_hu: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        """A random patient."""
        a, b, c = np.deg2rad(rng.normal(0, 2.0, 3).clip(-4, 4))
        turn_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        turn_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
        dome = rng.uniform(-62, -35)
        return cls(
            rotation=turn_x @ turn_y @ turn_z,
            scale_xyz=rng.uniform(0.92, 1.06) * rng.uniform(0.95, 1.05, 3),
            center_xyz=np.array([rng.uniform(-15, 15), rng.uniform(-40, 20), rng.uniform(-260, -80)]),
            fat_mm=rng.uniform(6, 24),
            dome_mm=(dome, dome - rng.uniform(4, 18)),
            heart=rng.uniform(0.9, 1.12),
            rib_phase_mm=rng.uniform(0, 23),
            blood_hu=rng.uniform(120, 240) if rng.random() < 0.4 else rng.uniform(35, 50),
            lung_hu=rng.uniform(-890, -845),
            noise_hu=rng.uniform(12, 38),
        )

    def to_world(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Canonical points (N, 3) -> world points (N, 3)."""
        return self.center_xyz + (points * self.scale_xyz) @ self.rotation.T

    def tubes(self, segments: Sequence[tuple]) -> NDArray[np.float64]:
        """Canonical segments (start, end, radius, radius) -> world rows (x, y, z, x, y, z, radius, radius)."""
        starts, ends = (self.to_world(np.array([s[k] for s in segments], float)) for k in (0, 1))
        radii = np.array([s[2:] for s in segments], float) * self.scale_xyz.mean()
        return np.hstack([starts, ends, radii])


# ---- distances ----


def capsule_distance(mesh: tuple[Array, Array, Array], row: NDArray[np.float64]) -> Array:
    """Signed distance (mm) to a tapering capsule, row = (start, end, radius, radius)."""
    start, step = row[:3].astype(np.float32), (row[3:6] - row[:3]).astype(np.float32)
    offset = [m - s for m, s in zip(mesh, start, strict=True)]
    along = (offset[0] * step[0] + offset[1] * step[1]) + offset[2] * step[2]
    along = np.clip(along / np.float32(max((step**2).sum(), 1e-6)), 0, 1)
    squared = sum((o - along * s) ** 2 for o, s in zip(offset, step, strict=True))
    return np.sqrt(squared) - (np.float32(row[6]) + along * np.float32(row[7] - row[6]))


def tube_box(grid: Grid, row: NDArray[np.float64], margin_mm: float) -> Box:
    """Bounding box of a capsule with a margin."""
    reach = max(row[6], row[7]) + margin_mm
    return grid.box(np.minimum(row[:3], row[3:6]) - reach, np.maximum(row[:3], row[3:6]) + reach)


def tubes_distance(grid: Grid, rows: NDArray[np.float64], margin_mm: float = 15.0) -> Array:
    """Distance to a union of capsules, right up to the margin, at most 100 mm."""
    field = np.full(grid.size_xyz[::-1], 100, np.float32)
    for row in rows:
        box = tube_box(grid, row, margin_mm)
        np.minimum(field[box], capsule_distance(grid.mesh(box), row), out=field[box])
    return field


def as_distance(field: Array, scale_mm: float) -> Array:
    """Turns an implicit function (0 on the surface, slope about 1 / scale_mm) into a distance, to first order."""
    gradient = np.gradient(field * np.float32(scale_mm), np.float32(LATTICE_MM))
    slope = np.sqrt(sum(g * g for g in gradient))
    return field * np.float32(scale_mm) / np.maximum(slope, 0.3)


def ellipsoid(p: tuple[Array, Array, Array], center: Sequence[float], radii: Sequence[float]) -> Array:
    """Approximate distance to an ellipsoid in canonical coordinates."""
    q = sum(((a - np.float32(c)) / np.float32(r)) ** 2 for a, c, r in zip(p, center, radii, strict=True))
    return (np.sqrt(q) - 1) * np.float32(min(radii))


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | Sequence[float]) -> Array:
    """Correlated Gaussian noise of zero mean and unit variance."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3)
    field -= field.mean()  # the box of a tiny nodule may hold a single voxel, whose deviation is 0
    return field / max(field.std(), 1e-6)


class Canvas:
    """A CT that is painted from back to front; edges are ramps about a voxel wide, which stands for partial volume."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        size_mm = grid.spacing_xyz * np.array(grid.size_xyz)
        count = np.ceil(size_mm / LATTICE_MM).astype(int) + 1
        self.lattice = Grid(grid.origin_xyz, np.full(3, LATTICE_MM), (int(count[0]), int(count[1]), int(count[2])))
        self.image = np.full(grid.size_xyz[::-1], AIR, np.float32)
        self.background = self.image
        self.width_mm = float(1.1 * np.prod(grid.spacing_xyz) ** (1 / 3))

    def upsample(self, field: Array, box: Box) -> Array:
        """Lattice values interpolated to the voxels of a box; z last, where whole slices are combined at once."""
        for dim in (0, 1, 2):
            at = (self.grid.axis(dim)[box[2 - dim]] - self.lattice.origin_xyz[dim]) / LATTICE_MM
            low = np.clip(np.floor(at), 0, field.shape[2 - dim] - 2).astype(int)
            weight = (at - low).astype(np.float32).reshape([-1 if k == 2 - dim else 1 for k in range(3)])
            lower = field.take(low, axis=2 - dim)
            field = field.take(low + 1, axis=2 - dim)
            field -= lower
            field *= weight
            field += lower
        return field

    def cover(self, distance: Array) -> tuple[Box, Array]:
        """The voxel box that a lattice distance touches, and how much of each voxel there is inside."""
        inside = distance < LATTICE_MM
        spans = []
        for dim in (0, 1, 2):
            hit = np.flatnonzero(inside.any(axis=tuple(k for k in range(3) if k != 2 - dim)))
            spans.append((hit[0] - 1, hit[-1] + 1) if len(hit) else (0, -1))
        low, high = (self.lattice.origin_xyz + LATTICE_MM * np.array([s[k] for s in spans]) for k in (0, 1))
        box = self.grid.box(low, high)
        return box, np.clip(0.5 - self.upsample(distance, box) / self.width_mm, 0, 1)

    def paint(self, distance: Array, hu: float | Array) -> None:
        """Fills a lattice shape with a value or a lattice of values."""
        box, alpha = self.cover(distance)
        value = self.upsample(hu, box) if isinstance(hu, np.ndarray) else np.float32(hu)
        self.image[box] += alpha * (value - self.image[box])

    def add(self, box: Box, distance: Array, hu: float | Array, fade: float | Array = 1.0) -> None:
        """Brightens voxels to a shape; a maximum leaves no knots where pieces of one tree overlap."""
        alpha = np.clip(0.5 - distance / self.width_mm, 0, 1) * np.float32(fade)
        behind = self.background[box]
        np.maximum(self.image[box], behind + alpha * (hu - behind), out=self.image[box])


# ---- anatomy on the lattice ----


def canonical_mesh(patient: Patient, lattice: Grid) -> tuple[Array, Array, Array]:
    """Canonical x, y, z of every lattice point."""
    world = lattice.mesh((slice(None), slice(None), slice(None)))
    inverse = (patient.rotation.T / patient.scale_xyz[:, None]).astype(np.float32)
    shifted = [w - np.float32(c) for w, c in zip(world, patient.center_xyz, strict=True)]
    x, y, z = (row[0] * shifted[0] + row[1] * shifted[1] + row[2] * shifted[2] for row in inverse)
    return x, y, z


def rise(value: Array, start: float, end: float) -> Array:
    """0 before start, 1 after end, smooth between."""
    t = np.clip((value - np.float32(start)) / np.float32(end - start), 0, 1)
    return t * t * (3 - 2 * t)


class Anatomy:
    """Signed distances of the organs on the lattice (mm)."""

    def __init__(self, patient: Patient, lattice: Grid, rng: np.random.Generator) -> None:
        self.patient, self.lattice, self.rng = patient, lattice, rng
        self.p = canonical_mesh(patient, lattice)
        self.cage = self._cage()
        self.angle = np.arctan2(np.abs(self.p[0]), self.p[1] - 8)  # 0 at the back, pi in front
        self.vessels = tubes_distance(lattice, patient.tubes(GREAT_VESSELS))
        self.airways = tubes_distance(lattice, patient.tubes(AIRWAYS))
        self.esophagus = tubes_distance(lattice, patient.tubes(ESOPHAGUS))
        self.diaphragm = self._diaphragm()
        self.heart = np.maximum(self._heart(), -6 - self.diaphragm)
        z = self.p[2] + 10
        self.spine_y = 64 - np.where(z > 0, 18, 4) * (z / 110) ** 2  # middle of the vertebral bodies: a kyphosis
        self.spine_y = self.spine_y.astype(np.float32)
        self.lungs = self._lungs()

    def _cage(self) -> Array:
        """Inside of the rib cage: a superellipse with a dome over each lung."""
        x, y, z = self.p
        up = np.maximum(z + 38, 0) / 145
        lean = np.clip((z + 60) / 140, -0.6, 1.2)
        middle = 44 * np.minimum(up, 1) ** 3
        # The spine and the breastbone bulge into it.
        y = y + 13 * np.exp(-((x / 32) ** 2)) * rise(y, 0, 60) - 5 * np.exp(-((x / 45) ** 2)) * rise(-y, 0, 60)
        wide, deep = 121 - middle, 87 - 20 * lean
        q = np.abs((np.abs(x) - middle) / wide) ** 2.3 + np.abs((y - 20 * lean + 2) / deep) ** 2.3 + up**2.7
        return as_distance(q ** np.float32(1 / 2.3) - 1, 90)

    def _heart(self) -> Array:
        x, y, z = self.p
        c, s = np.float32(np.cos(0.6)), np.float32(np.sin(0.6))
        dx, dy, dz = x - 22, y + 26, z + 44
        long, across = c * dx - s * dz, s * dx + c * dz  # the apex points to the left and down
        size = self.patient.heart
        return ellipsoid((long, dy, across), (0, 0, 0), (60 * size, 46 * size, 47 * size))

    def _diaphragm(self) -> Array:
        """Positive above the domes (in the lung's half), negative below."""
        x, y, z = self.p
        right, left = self.patient.dome_mm
        side = np.abs(x) - 58
        sag = np.where(side > 0, 55, 16) * (side / 62) ** 2
        sag = sag + 75 * (np.maximum(y, 0) / 85) ** 2 + 24 * (np.maximum(-y - 10, 0) / 75) ** 2
        height = right + (left - right) * rise(x, -25, 25) - sag
        return as_distance(z - height + 2 * smooth_noise(self.rng, x.shape, 8), 1)

    def _lungs(self) -> Array:
        x, y, z = self.p
        column = (np.sqrt((x / 22) ** 2 + ((y - self.spine_y - 4) / 24) ** 2) - 1) * 22
        upper = ellipsoid(self.p, (-2, -8, 52), (31, 54, 66))
        septum = np.abs(x - 4 * rise(-y, 0, 60)) - 3.5 - 6 * rise(z, 40, 100)
        middle = np.minimum.reduce(
            [septum, column, upper, self.vessels - 3, self.airways - 4, self.esophagus - 2, self.heart - 3]
        )
        shape = np.maximum.reduce([self.cage, -middle, -self.diaphragm])
        shape += 1.2 * smooth_noise(self.rng, shape.shape, 3.5)
        return ndimage.gaussian_filter(shape, 1.0)

    def paint_body(self, canvas: Canvas) -> None:
        """Skin, fat and muscle, then everything inside the rib cage as fat."""
        x, y, z = self.p
        shoulders, belly, fat = rise(z, 45, 120), rise(-z, 20, 120), np.float32(self.patient.fat_mm)
        wide, deep = 141 + fat + 45 * shoulders, 106 + 0.8 * fat - 16 * shoulders + 4 * belly
        groove = 7 * np.exp(-((x / 14) ** 2)) * (y > 0)  # along the spine
        q = np.abs(x / wide) ** 2.5 + np.abs((y - 12 - 6 * shoulders) / (deep - groove)) ** 2.5
        skin = as_distance(q ** np.float32(1 / 2.5) - 1, 110)
        angle, noise = self.angle, smooth_noise(self.rng, x.shape, 3)
        thick = (
            11 + 26 * np.exp(-((angle / 0.55) ** 2)) + 14 * np.exp(-(((angle - 2.35) / 0.4) ** 2)) * rise(z, -30, 30)
        )
        thick += 17 * np.exp(-(((angle - 1.2) / 0.5) ** 2)) * rise(z, -40, 50) + 45 * rise(z, 70, 110)
        muscle = np.maximum(self.cage - thick - 2 * noise, skin + 3 + 0.5 * fat)
        gaps = np.maximum(3.5 - self.cage + 8, np.abs(smooth_noise(self.rng, x.shape, (6, 2.5, 2.5))) * 14 - 1.2)
        canvas.paint(skin, SKIN)
        canvas.paint(skin + 2, FAT + 8 * noise)
        canvas.paint(muscle, MUSCLE + 6 * noise)
        canvas.paint(np.maximum(gaps, muscle), FAT / 2)
        canvas.paint(self.cage + 2, FAT + 15 + 12 * noise)

    def paint_abdomen(self, canvas: Canvas) -> None:
        """Liver, spleen and stomach under the diaphragm, which is itself a sheet of muscle."""
        x, y, _ = self.p
        below = np.maximum(self.cage + 2, self.diaphragm)
        contrast = 0.35 * max(self.patient.blood_hu - 45, 0)
        sheet = np.maximum(below, -3 - self.diaphragm)
        wave = 5 * smooth_noise(self.rng, x.shape, 6)
        liver = np.maximum(below + 2, x - 45 + 0.9 * np.maximum(y + 20, 0) + wave)
        spleen = np.maximum(below + 3, ellipsoid(self.p, (78, 45, -105), (38, 42, 42)))
        stomach = np.maximum(below + 4, ellipsoid(self.p, (62, -22, -100), (42, 44, 38)) + 0.5 * wave)
        canvas.paint(sheet, MUSCLE)
        canvas.paint(liver, LIVER + contrast + wave)
        canvas.paint(spleen, LIVER - 5 + contrast)
        canvas.paint(stomach, MUSCLE - 5)
        canvas.paint(np.maximum(stomach + 4, y + 42), LUMEN + 20)

    def paint_mediastinum(self, canvas: Canvas) -> None:
        """Heart in its fat, great vessels, oesophagus."""
        blood = self.patient.blood_hu
        noise = smooth_noise(self.rng, self.heart.shape, 3)
        wall = self.heart + 2 + np.maximum(2 * noise, 0)
        septum = 2.5 + noise - np.abs(self.p[0] - 12 + 0.7 * (self.p[1] + 20) + 0.004 * (self.p[1] + 20) ** 2)
        chambers = np.maximum(wall + 3 + 7 * rise(self.p[0], 10, 40), septum)
        canvas.paint(self.heart, FAT)
        canvas.paint(wall, MUSCLE + 0.3 * (blood - 40))
        canvas.paint(chambers, blood + 4 * noise)
        canvas.paint(self.esophagus, MUSCLE - 15)
        canvas.paint(self.vessels, blood)

    def paint_bones(self, canvas: Canvas) -> None:
        """Ribs, sternum, shoulder blades, collar bones and spine: a dense cortex around marrow."""
        x, y, z = self.p
        drop = 16 * self.angle + 20 * (1 - np.cos(self.angle))  # ribs descend towards the front
        level = np.mod(z + drop + np.float32(self.patient.rib_phase_mm), 23) - 11.5
        ribs = (np.sqrt((level / 5.6) ** 2 + ((self.cage - 6.5) / 4) ** 2) - 1) * 4
        neck = 34 - np.sqrt(x**2 + (y - 10) ** 2)
        ribs = np.maximum.reduce([ribs, neck, z - 118, 18 - np.abs(x)])
        front = (self.angle - 2.5) * 60
        margin = -(z + 78 - 0.9 * np.maximum(np.abs(x) - 20, 0))  # the costal arch
        canvas.paint(np.maximum.reduce([ribs, -front, margin]), CARTILAGE)
        sternum = ((np.abs(x) / (15 + 10 * rise(z, 50, 70))) ** 4 + ((self.cage - 8) / 5.5) ** 4) ** np.float32(0.25)
        sternum = np.maximum.reduce([(sternum - 1) * 6, y + 20, z - 88, -48 - z])
        collar = tubes_distance(self.lattice, self.patient.tubes(COLLAR_BONES))
        bones = np.minimum.reduce([np.maximum(ribs, front), sternum, self._blades(), collar, self._vertebrae()])
        spine_y = y - self.spine_y
        canvas.paint((np.sqrt((x / 17.5) ** 2 + (spine_y / 14.5) ** 2) - 1) * 15, DISC)
        canvas.paint(np.sqrt(x**2 + (spine_y - 24) ** 2) - 9, FLUID + 15)  # the canal
        canvas.paint(bones, CORTEX)
        canvas.paint(bones + 1.7, MARROW + 50 * smooth_noise(self.rng, x.shape, 1.2))

    def _blades(self) -> Array:
        """Shoulder blades: a plate that widens upwards, thick towards the joint, with a ridge behind."""
        x, y, z = np.abs(self.p[0]), self.p[1], self.p[2]
        across, along = 0.6 * (x - 99) + 0.8 * (y - 78), 0.8 * (x - 99) - 0.6 * (y - 78)
        thick = 2.2 + 7 * rise(along, 18, 48) * rise(z, 40, 70)
        width = np.abs(along - 6) - 12 - 30 * rise(z, 5, 70)
        plate = np.maximum.reduce([np.abs(across + along**2 / 260 - 2) - thick, width, 4 - z, z - 112])
        ridge = np.maximum.reduce([np.abs(z - 76 - 0.25 * along) - 3, np.abs(across - 8) - 9, np.abs(along - 10) - 38])
        return np.minimum(plate, ridge)

    def _vertebrae(self) -> Array:
        """Vertebral bodies, arches and processes, every 25 mm."""
        x, z = self.p[0], self.p[2]
        y = self.p[1] - self.spine_y  # 0 in the middle of the vertebral body
        level = np.mod(z + 2 * np.float32(self.patient.rib_phase_mm), 25) - 12.5
        side = np.abs(x)
        body = (np.sqrt((x / 18.5) ** 2 + (y / 15.5) ** 2) - 1 - 0.07 * (level / 10) ** 2) * 16
        body = np.maximum(body, np.abs(level) - 10)
        arch = np.maximum(np.abs(np.sqrt(x**2 + (y - 24) ** 2) - 11.5) - 2.6, np.abs(level - 1) - 9)
        arch = np.maximum(arch, 12 - y)
        slant = np.abs(level + 0.35 * (y - 36)) - 6
        spinous = np.maximum.reduce([side - 3, 34 - y, y - 60, slant])
        across = np.sqrt((y - 22 - 0.35 * side) ** 2 + (level - 3) ** 2) - 5
        across = np.maximum.reduce([across, side - 34, 9 - side])
        return np.minimum.reduce([body, arch, spinous, across])

    def paint_lungs(self, canvas: Canvas) -> None:
        """Parenchyma, denser towards the back on which the patient lies; oblique fissures; main airways."""
        x, y, z = self.p
        hu = (
            self.patient.lung_hu
            + 0.45 * y
            + 14 * smooth_noise(self.rng, x.shape, 5)
            + 12 * smooth_noise(self.rng, x.shape, 1.2)
        )
        hu += 90 * np.exp(self.lungs / 5) * rise(y, 35, 85)  # dependent atelectasis
        canvas.paint(self.lungs, hu)
        fissure = (z + 13 - 1.04 * y) / 1.44 + 4 * smooth_noise(self.rng, x.shape, 9)
        # The sheet is thinner than the lattice: interpolate the plane first, then take its distance.
        box, alpha = canvas.cover(np.maximum(self.lungs, np.abs(fissure) - 4))
        line = np.clip(0.5 - (np.abs(canvas.upsample(fissure, box)) - 0.2) / canvas.width_mm, 0, 0.6)
        canvas.image[box] += alpha * line * (FISSURE - canvas.image[box])
        canvas.paint(self.airways - 1.5, MUSCLE - 20)
        canvas.paint(self.airways, LUMEN)


# ---- vessels ----


def grow_tree(
    targets: NDArray[np.float64], root: NDArray[np.float64], rng: np.random.Generator, width: float = 1.0
) -> NDArray[np.float64]:
    """Connects points to a root, trading wire length against path length (Cuntz et al. 2010); radii by Murray's law.

    Args:
        targets: World points (N, 3).
        root: World point (3,).
        rng: For the bends.
        width: Factor of the radii.

    Returns:
        Capsule rows (2N, 8), thin end last.
    """
    points = np.vstack([root, targets])
    count = len(points)
    parent, path = np.zeros(count, int), np.zeros(count)
    cost = np.linalg.norm(points - root, axis=1)
    cost[0] = np.inf
    order = []
    length = cost.copy()
    for _ in range(count - 1):
        node = int(cost.argmin())
        order.append(node)
        path[node] = path[parent[node]] + length[node]
        cost[node] = np.inf
        away = np.linalg.norm(points - points[node], axis=1)
        better = away + 0.5 * path[node] < cost
        better &= np.isfinite(cost)
        cost[better], length[better], parent[better] = (away + 0.5 * path[node])[better], away[better], node
    weight = np.ones(count)
    for node in reversed(order):
        weight[parent[node]] += weight[node]
    radius = width * (0.52 * weight**0.37)
    nodes = np.array(order)
    start, end = points[parent[nodes]], points[nodes]
    middle = (start + end) / 2 + rng.normal(0, 0.07, start.shape) * length[nodes, None]
    thick, thin = np.minimum(radius[parent[nodes]], 1.35 * radius[nodes])[:, None], radius[nodes][:, None]
    return np.vstack(
        [np.hstack([start, middle, thick, (thick + thin) / 2]), np.hstack([middle, end, (thick + thin) / 2, thin])]
    )


def lattice_points(lattice: Grid, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """World points (N, 3) of chosen lattice points."""
    return lattice.origin_xyz + np.argwhere(chosen)[:, ::-1] * LATTICE_MM


def paint_vessels(
    canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator, maker: Maker = PLAIN
) -> NDArray[np.float64]:
    """Arteries with bronchi beside the thicker ones, and veins. Returns the capsule rows."""
    patient, lung_alpha = anatomy.patient, np.zeros(canvas.image.shape, np.float32)
    box, alpha = canvas.cover(anatomy.lungs)
    lung_alpha[box] = alpha
    hila = patient.to_world(np.array(HILA, float))
    trees = []
    for number, hilum in enumerate(hila):
        side = anatomy.p[0] < 0 if number % 2 == 0 else anatomy.p[0] > 0
        points = lattice_points(canvas.lattice, side & (anatomy.lungs < -4))
        picked = points[rng.choice(len(points), min(maker.twigs, len(points)), replace=False)]
        trees.append(grow_tree(picked + rng.uniform(-1.5, 1.5, picked.shape), hilum, rng, maker.vessels))
    arteries = np.vstack(trees[:2])
    paint_bronchi(canvas, arteries[arteries[:, 7] > 1.4], lung_alpha)
    canvas.background = canvas.image.copy()
    rows = np.vstack(trees)
    for row in rows:
        box = tube_box(canvas.grid, row, canvas.width_mm)
        fade = lung_alpha[box] * np.float32(min(1.0, 1.6 * row[7] / canvas.width_mm))
        canvas.add(box, capsule_distance(canvas.grid.mesh(box), row), patient.blood_hu, fade)
    return rows


def paint_bronchi(canvas: Canvas, rows: NDArray[np.float64], lung_alpha: Array) -> None:
    """A bronchus along each artery: first all walls, then all lumens, so that they stay open at the joints."""
    beside = rows.copy()
    shift = np.array([0.5, 0.75, 0.43])
    beside[:, :3] += 1.7 * rows[:, 6:7] * shift
    beside[:, 3:6] += 1.7 * rows[:, 7:8] * shift
    for thickness, hu in ((0.85, AIRWAY_WALL), (0.55, LUMEN)):
        for row in beside:
            tube = row.copy()
            tube[6:] *= thickness
            box = tube_box(canvas.grid, tube, canvas.width_mm)
            alpha = (
                np.clip(0.5 - capsule_distance(canvas.grid.mesh(box), tube) / canvas.width_mm, 0, 1) * lung_alpha[box]
            )
            canvas.image[box] += alpha * (hu - canvas.image[box])


# ---- findings ----


class Findings:
    """Draws nodules and other findings at free places and remembers them."""

    def __init__(
        self,
        canvas: Canvas,
        anatomy: Anatomy,
        vessels: NDArray[np.float64],
        rng: np.random.Generator,
        maker: Maker = PLAIN,
    ) -> None:
        self.canvas, self.anatomy, self.vessels, self.rng, self.maker = canvas, anatomy, vessels, rng, maker
        self.taken: list[tuple[NDArray[np.float64], float]] = []
        self.pleural: list[tuple[Box, Array]] = []
        lattice = canvas.lattice
        self.points = lattice_points(lattice, anatomy.lungs < 0)
        self.depth = -anatomy.lungs[anatomy.lungs < 0]
        self.wall = -anatomy.cage[anatomy.lungs < 0]
        self.tree = spatial.cKDTree(vessels[:, 3:6])

    def place(self, kind: str, radius: float) -> NDArray[np.float64]:
        """A free centre for a finding of this kind.

        Raises:
            ValueError: If there is no room left.
        """
        grid, rng = self.canvas.grid, self.rng
        low, high = grid.origin_xyz, grid.origin_xyz + grid.spacing_xyz * (np.array(grid.size_xyz) - 1)
        if kind == "pleural":
            good = (self.wall < 0.95 * radius) & (self.wall > 0.55 * radius) & (self.wall < self.depth + 1)
        else:
            good = self.depth > radius + 3
        margin = radius + 2 * grid.spacing_xyz
        good &= np.all((self.points > low + margin) & (self.points < high - margin), axis=1)
        candidates = self.points[good]
        for _ in range(2000 if len(candidates) else 0):
            center = candidates[rng.integers(len(candidates))] + rng.uniform(-1, 1, 3)
            if kind == "vascular":
                row = self.vessels[self.tree.query(center)[1]]
                push = center - row[3:6]
                center = row[3:6] + push / max(np.linalg.norm(push), 1e-3) * (0.6 * radius + row[7])
            at = np.rint((center - self.canvas.lattice.origin_xyz) / LATTICE_MM).astype(int)
            # Moving it to a vessel must not push it into the chest wall.
            deep = kind == "pleural" or -self.anatomy.lungs[at[2], at[1], at[0]] > radius
            if deep and all(np.linalg.norm(center - c) > radius + r + 4 for c, r in self.taken):
                self.taken.append((center, radius))
                return center
        raise ValueError(
            f"no free place in the lungs for a {kind} nodule of {2 * radius:.1f} mm: lower max_diameter_mm."
        )

    def ball(self, center: NDArray[np.float64], radius: float, lobes: float) -> tuple[Box, Array]:
        """Box and distance of a lobulated ball; its volume is that of the sphere."""
        box = self.canvas.grid.box(center - 1.3 * radius - 3, center + 1.3 * radius + 3)
        offset = [m - np.float32(c) for m, c in zip(self.canvas.grid.mesh(box), center, strict=True)]
        distance = np.sqrt(sum(o * o for o in offset))
        safe = np.maximum(distance, 0.3 * radius)
        bumps = np.zeros_like(distance)
        for _ in range(4):
            wave = self.rng.normal(0, 2.2, 3).astype(np.float32)
            bumps += np.sin(
                sum(w * o for w, o in zip(wave, offset, strict=True)) / safe + np.float32(self.rng.uniform(0, 6.3))
            )
        return box, distance - np.float32(radius) * (1 + np.float32(lobes / 1.4) * bumps)

    def add_nodule(self, diameter_mm: float, kind: str) -> Nodule:
        """Places and draws a nodule; a tiny one is too small to be annotated."""
        rng, canvas, radius, contrast = self.rng, self.canvas, diameter_mm / 2, self.maker.contrast_hu
        center = self.place(kind, radius)
        box, distance = self.ball(center, radius, self.maker.lobes)
        texture = 25 * smooth_noise(rng, distance.shape, 1.0)
        edge = np.float32(self.maker.edge)
        if kind in ("ground_glass", "part_solid"):
            canvas.add(box, distance / edge, GROUND_GLASS + contrast / 2 + rng.uniform(-60, 60) + texture)
            if kind == "part_solid":
                core_box, core = self.ball(center + rng.normal(0, 0.08 * radius, 3), 0.6 * radius, 0.08)
                canvas.add(core_box, core / edge, SOLID + contrast)
        else:
            hu = CALCIFIED if kind == "solid" and rng.random() < 0.06 else SOLID + contrast + rng.uniform(-25, 25)
            # One that is smaller than a voxel only tints it.
            canvas.add(box, distance / edge, hu + 0.4 * texture, min(1.0, 1.6 * radius / canvas.width_mm))
        if kind == "pleural":
            self.pleural.append((box, distance))
        return Nodule(tuple(center.tolist()), float(diameter_mm), kind)

    def add_scar(self) -> Nodule:
        """An irregular streak without a diameter."""
        center = self.place("scar", 5.0)
        plane = self.rng.normal(size=(2, 3))
        for _ in range(int(self.rng.integers(3, 7))):
            ray = self.rng.normal(size=2) @ plane
            ray *= self.rng.uniform(3, 11) / np.linalg.norm(ray)
            start = center + self.rng.normal(0, 1.5, 3)
            row = np.concatenate([start, start + ray, (self.rng.uniform(0.7, 1.6), 0.4)])
            box = tube_box(self.canvas.grid, row, self.canvas.width_mm)
            self.canvas.add(box, capsule_distance(self.canvas.grid.mesh(box), row), -120, 0.8)
        return Nodule(tuple(center.tolist()), -1.0, "scar")


def draw_diameter(rng: np.random.Generator, low: float, high: float) -> float:
    """A diameter (mm) like LUNA16's (median 6.4 mm, 42 % under 6 mm), within the limits."""
    for _ in range(1000):
        diameter = 3.25 + float(np.exp(rng.normal(np.log(3.2), 1.0)))  # fitted to LUNA16's 1186
        if low <= diameter <= high:
            return diameter
    return float(rng.uniform(low, high))


def draw_kind(rng: np.random.Generator, diameter_mm: float) -> str:
    """A kind; nodules under 6 mm are seldom annotated unless solid."""
    kinds = ["solid", "pleural", "vascular", "part_solid", "ground_glass"]
    chances = [0.42, 0.22, 0.2, 0.08, 0.08] if diameter_mm >= 6 else [0.5, 0.25, 0.25, 0, 0]
    return str(rng.choice(kinds, p=chances))


# ---- a scan ----


def is_nodule_free(index: int, fraction: float) -> bool:
    """Spreads the nodule-free scans evenly; for fractions from 1/6 to 5/6 any three scans from 0 hold both sorts."""
    return int((index + 1) * fraction + 0.5) > int(index * fraction + 0.5)


def check_sizes(
    index: int, seed: int, size_xyz: tuple[int, int, int], min_diameter_mm: float, max_diameter_mm: float
) -> None:
    """Raises ValueError for values that no phantom can have."""
    if index < 0 or seed < 0:
        raise ValueError(f"seed and index must be at least 0, not {seed} and {index}.")
    if len(size_xyz) != 3 or min(size_xyz[:2]) < 48 or size_xyz[2] < 24:
        raise ValueError(f"size_xyz must be three numbers of at least 48, 48, 24 voxels, not {tuple(size_xyz)}.")
    if not 3 <= min_diameter_mm <= max_diameter_mm <= 40:
        raise ValueError(
            f"diameters must satisfy 3 <= min <= max <= 40 mm, not {min_diameter_mm} and {max_diameter_mm}."
        )


def check_makers(makers: Sequence[int]) -> None:
    """Raises ValueError for numbers that no maker can have."""
    if any(number < 0 for number in makers):
        raise ValueError(f"the numbers of makers must be at least 0, not {list(makers)}.")


def make_grid(patient: Patient, size_xyz: tuple[int, int, int], rng: np.random.Generator) -> Grid:
    """A field of view of 310-345 mm in the plane and 230-275 mm along z around the patient."""
    in_plane, along = rng.uniform(310, 345) / max(size_xyz[:2]), rng.uniform(240, 278) / size_xyz[2]
    spacing = np.round([in_plane, in_plane, along], 6)
    middle = patient.center_xyz + [rng.uniform(-6, 6), rng.uniform(12, 22), rng.uniform(-8, 3)]
    return Grid(np.round(middle - spacing * (np.array(size_xyz) - 1) / 2, 3), spacing, size_xyz)


def paint_table(canvas: Canvas, patient: Patient) -> None:
    """A curved table top below the back."""
    box = (slice(None), slice(None), slice(None))
    x, y, _ = canvas.grid.mesh(box)
    top = patient.center_xyz[1] + 131 * patient.scale_xyz[1] + 0.6 * patient.fat_mm
    depth = y - np.float32(top) + (x - np.float32(patient.center_xyz[0])) ** 2 / 1500
    free = canvas.image < -900
    for low, high, hu in ((0, 22, TABLE_CORE), (0, 1.5, TABLE_SHELL), (20, 22, TABLE_SHELL - 400)):
        alpha = np.clip(0.5 - np.maximum(low - depth, depth - high) / canvas.width_mm, 0, 1)
        canvas.image += alpha * free * (hu - canvas.image)


def scan_as(maker: Maker, canvas: Canvas) -> None:
    """What breathing, slice profile and kernel do to the canvas, before there is noise."""
    image, spacing = canvas.image, canvas.grid.spacing_xyz
    if maker.breathing_mm:
        moved = ndimage.gaussian_filter1d(image, maker.breathing_mm / spacing[2], axis=0)
        image += np.linspace(1, 0, len(image), dtype=np.float32)[:, None, None] * (moved - image)
    if maker.slice_mm:
        canvas.image = ndimage.gaussian_filter1d(canvas.image, 0.4, axis=0)
    if maker.blur_mm:
        canvas.image = ndimage.gaussian_filter(canvas.image, (0, *(maker.blur_mm / spacing[1::-1])))
    if maker.sharpening:
        smooth = ndimage.gaussian_filter(canvas.image, (0, *(0.8 / spacing[1::-1])))
        canvas.image += np.float32(maker.sharpening) * (canvas.image - smooth)


def finish(
    canvas: Canvas, index: int, noise_hu: float, rng: np.random.Generator, maker: Maker = PLAIN
) -> NDArray[np.int16]:
    """Adds noise, clips to what a scanner stores and pads outside the circular field of view on two scans of three."""
    scan_as(maker, canvas)
    noise = smooth_noise(rng, canvas.image.shape, (0.45, 0.8 * maker.grain, 0.8 * maker.grain))
    x, y, _ = canvas.grid.mesh((slice(None), slice(None), slice(None)))
    radius = canvas.grid.spacing_xyz[0] * max(canvas.grid.size_xyz[:2]) / 2
    away = np.sqrt((x - x.mean()) ** 2 + (y - y.mean()) ** 2) / radius
    noise *= maker.noise * noise_hu * (1.15 - 0.5 * np.minimum(away, 1))  # more noise where more tissue is in the way
    canvas.image += noise
    pixels = np.rint(canvas.image.clip(-1024, 3071)).astype(np.int16)
    padding = (-3024, None, -2048)[index % 3]
    if padding is not None:
        pixels[np.broadcast_to(away > 0.995, pixels.shape)] = padding
    return pixels


def label_lungs(canvas: Canvas, anatomy: Anatomy, findings: Findings) -> NDArray[np.uint8]:
    """Lung labels like LUNA16's, which leave out most of a nodule that touches the pleura."""
    labels = np.zeros(canvas.image.shape, np.uint8)
    box, alpha = canvas.cover(anatomy.lungs)
    labels[box] = np.where(alpha > 0.5, np.where(canvas.upsample(anatomy.p[0], box) > 0, LEFT_LUNG, RIGHT_LUNG), 0)
    for near, distance in findings.pleural:
        labels[near][distance < -0.3] = 0
    box, alpha = canvas.cover(anatomy.airways)
    labels[box][alpha > 0.5] = AIRWAY
    return labels


def to_image(array: NDArray, grid: Grid, flipped: bool) -> sitk.Image:
    """Wraps an array; a flipped scan stores x and y from the other end (TransformMatrix -1 0 0 0 -1 0 0 0 1)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, ::-1, ::-1]) if flipped else array)
    last = grid.origin_xyz + grid.spacing_xyz * (np.array(grid.size_xyz) - 1)
    image.SetSpacing(grid.spacing_xyz.tolist())
    image.SetOrigin([last[0], last[1], grid.origin_xyz[2]] if flipped else grid.origin_xyz.tolist())
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1] if flipped else [1, 0, 0, 0, 1, 0, 0, 0, 1])
    return image


def make_phantom(
    index: int,
    seed: int = 0,
    size_xyz: tuple[int, int, int] = (256, 256, 120),
    nodule_free: float = 0.33,
    min_diameter_mm: float = 3.25,
    max_diameter_mm: float = 32.3,
    makers: Sequence[int] = (),
) -> Phantom:
    """Makes one scan. The same arguments give the same scan; every fourth (index 2, 6, ...) is stored flipped.

    Args:
        index: Number of the scan in its data set.
        seed: Seed of the data set.
        size_xyz: Number of voxels; the field of view stays about 330 x 330 x 250 mm.
        nodule_free: Share of scans without a nodule; which ones depends on the index only.
        min_diameter_mm: Smallest nodule.
        max_diameter_mm: Largest nodule.
        makers: Numbers of makers, of which the scan gets one at random; none is the plain one.

    Raises:
        ValueError: For impossible values.
    """
    check_sizes(index, seed, size_xyz, min_diameter_mm, max_diameter_mm)
    check_makers(makers)
    rngs = [np.random.default_rng([seed, index, part]) for part in range(7)]
    maker = Maker.draw(makers[int(rngs[6].integers(len(makers)))]) if makers else PLAIN
    patient = Patient.draw(rngs[0])
    slices = round(HEIGHT_MM / maker.slice_mm) if maker.slice_mm else size_xyz[2]
    canvas = Canvas(make_grid(patient, (size_xyz[0], size_xyz[1], slices), rngs[1]))
    anatomy = Anatomy(patient, canvas.lattice, rngs[2])
    anatomy.paint_body(canvas)
    anatomy.paint_abdomen(canvas)
    anatomy.paint_mediastinum(canvas)
    anatomy.paint_bones(canvas)
    anatomy.paint_lungs(canvas)
    findings = Findings(canvas, anatomy, paint_vessels(canvas, anatomy, rngs[3], maker), rngs[4], maker)
    count = 0 if is_nodule_free(index, nodule_free) else int(rngs[4].choice([1, 2, 3, 4], p=[0.45, 0.3, 0.15, 0.1]))
    # The largest first: it needs most room.
    diameters = sorted((draw_diameter(rngs[4], min_diameter_mm, max_diameter_mm) for _ in range(count)), reverse=True)
    nodules = [findings.add_nodule(d, draw_kind(rngs[4], d)) for d in diameters]
    tiny = int(rngs[4].integers(1, maker.most_tiny + 1))
    excluded = [findings.add_nodule(float(rngs[4].uniform(1.6, 2.95)), "tiny") for _ in range(tiny)]
    excluded += [findings.add_scar() for _ in range(int(rngs[4].integers(1, maker.most_scars + 1)))]
    paint_table(canvas, patient)
    labels = label_lungs(canvas, anatomy, findings)
    flipped = index % 4 == 2
    image = to_image(finish(canvas, index, patient.noise_hu, rngs[5], maker), canvas.grid, flipped)
    return Phantom(f"{UID_PREFIX}.{seed}.{index}", image, to_image(labels, canvas.grid, flipped), nodules, excluded)


# ---- the data set ----


def write_scan(index: int, output_dir: Path, make: Callable[[int], Phantom]) -> tuple[str, list[Nodule], list[Nodule]]:
    """Makes one scan and writes its image and lung mask."""
    phantom = make(index)
    raw, seg = output_dir / "raw" / f"subset{index % 10}", output_dir / "seg-lungs-LUNA16"
    sitk.WriteImage(phantom.image, str(raw / f"{phantom.seriesuid}.mhd"), useCompression=False)
    sitk.WriteImage(phantom.lungs, str(seg / f"{phantom.seriesuid}.mhd"), useCompression=True)
    return phantom.seriesuid, phantom.nodules, phantom.excluded


def clear(output_dir: Path, overwrite: bool) -> None:
    """Makes the folders, and removes an older phantom where that is allowed; files of others are never removed.

    Raises:
        FileExistsError: If there are data already.
    """
    files = [*output_dir.glob("raw/subset*/*"), *output_dir.glob("seg-lungs-LUNA16/*")]
    own = [f for f in files if f.name.startswith(f"{UID_PREFIX}.")]
    if len(own) < len(files):
        raise FileExistsError(f"{output_dir} holds scans that are no phantoms; choose another output_dir.")
    if (files or (output_dir / "annotations.csv").exists()) and not overwrite:
        raise FileExistsError(
            f"{output_dir} already holds data; choose another output_dir, or overwrite=True (--overwrite true)."
        )
    for file in own:
        file.unlink()
    for name in TABLES:  # which say that all is there
        (output_dir / name).unlink(missing_ok=True)
    for folder in ["seg-lungs-LUNA16", *(f"raw/subset{k}" for k in range(10))]:
        (output_dir / folder).mkdir(parents=True, exist_ok=True)


def as_table(findings: Sequence[tuple[str, list[Nodule]]]) -> pd.DataFrame:
    """Rows in the layout of annotations.csv."""
    return pd.DataFrame(
        [(uid, *n.center_xyz, n.diameter_mm) for uid, nodules in findings for n in nodules], columns=COLUMNS
    )


def write_phantoms(
    output_dir: str | os.PathLike[str] = "data/phantom",
    num_scans: int = 12,
    seed: int = 0,
    size_xyz: tuple[int, int, int] = (256, 256, 120),
    nodule_free: float = 0.33,
    min_diameter_mm: float = 3.25,
    max_diameter_mm: float = 32.3,
    makers: tuple[int, ...] = (),
    num_processes: int | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Writes a phantom data set laid out like LUNA16: raw/subset0-9, seg-lungs-LUNA16 and the CSV files.

    Args:
        output_dir: Folder to write to.
        num_scans: Number of scans; scan i lies in subset i % 10.
        seed: Seed; a scan depends on seed, its index, sizes and makers, not on num_scans or num_processes.
        size_xyz: Voxels of a scan, e.g. '[160,160,64]'; the field of view stays the same.
        nodule_free: Share of scans without a nodule, 0 to 1.
        min_diameter_mm: Smallest nodule.
        max_diameter_mm: Largest nodule.
        makers: Numbers of makers, e.g. '[0,1,2,3]': each scan gets the noise, kernel, slice distance, nodules, vessels,
            other findings and breathing of one of them at random, whatever size_xyz says of z. '[]' varies none of it.
        num_processes: Scans made at a time; default: the number of cores.
        overwrite: Replace an older phantom in output_dir.

    Returns:
        The annotations: seriesuid, coordX, coordY, coordZ (world LPS mm), diameter_mm.

    Raises:
        ValueError: For impossible values.
        FileExistsError: If output_dir holds data and overwrite is not set.
    """
    if num_scans < 1 or (num_processes is not None and num_processes < 1):
        raise ValueError(f"num_scans and num_processes must be at least 1, not {num_scans} and {num_processes}.")
    if not 0 <= nodule_free <= 1:
        raise ValueError(f"nodule_free must lie between 0 and 1, not {nodule_free}.")
    check_sizes(0, seed, size_xyz, min_diameter_mm, max_diameter_mm)
    check_makers(makers)
    folder = Path(output_dir)
    clear(folder, overwrite)
    make = partial(
        make_phantom,
        seed=seed,
        size_xyz=size_xyz,
        nodule_free=nodule_free,
        min_diameter_mm=min_diameter_mm,
        max_diameter_mm=max_diameter_mm,
        makers=makers,
    )
    job = partial(write_scan, output_dir=folder, make=make)
    workers = min(num_processes or os.cpu_count() or 1, num_scans)
    if workers == 1:
        results = [job(index) for index in tqdm(range(num_scans), disable=None)]
    else:
        # Fork needs no main guard in a caller's script.
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            results = list(tqdm(pool.map(job, range(num_scans)), total=num_scans, disable=None))
    annotations = as_table([(uid, nodules) for uid, nodules, _ in results])
    tables = [folder / name for name in TABLES]
    annotations.to_csv(tables[0], index=False)
    as_table([(uid, excluded) for uid, _, excluded in results]).to_csv(tables[1], index=False)
    tables[2].write_text("".join(f"{uid}\n" for uid, _, _ in results))
    return annotations


def main(argv: list[str] | None = None) -> int:
    """Command line of write_phantoms; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    parser = ArgumentParser(description="Writes synthetic chest CTs with nodules in the format of LUNA16.")
    parser.add_function_arguments(write_phantoms)
    options = parser.parse_args(argv)
    try:
        annotations = write_phantoms(**vars(options))
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    print(f"{options.num_scans} scans with {len(annotations)} nodules in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
