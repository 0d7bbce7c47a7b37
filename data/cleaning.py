"""Cleaner masks: probabilities along the edges of the image, and morphology in millimetres."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from model import Cleaning

logger = logging.getLogger(__name__)

CRF_WEIGHT = 1.0  # of all neighbours together, in logits
CRF_STEPS = 5
CRF_SIGMA_MM = 1.5  # how far a neighbour counts; at twice that it ends
CRF_EDGE = 0.1  # of the HU window; neighbours that differ by more hardly count
MOST_PAIRS = 50_000_000  # of neighbours in a crop, of 4 bytes each; what has more stays as it is
AIR = 0.05  # of the HU window: what is darker is air, or was masked as none of the lungs


def follow_edges(
    probability: np.ndarray,
    image: np.ndarray,
    spacing_zyx: Sequence[float],
    components: Sequence[np.ndarray],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """A probability map that is smooth where the image is, and steep at its edges.

    Args:
        probability: Float (z, y, x).
        image: Array in [0, 1], of the same shape.
        spacing_zyx: Voxel size in mm.
        components: Voxels (m, 3) of what may be a nodule; all other voxels stay as they are, and so does what needs
            more than MOST_PAIRS, which the log tells.
        device: Where it is computed, one crop at a time.

    Returns:
        float32 (z, y, x).
    """
    refined, left = np.array(probability, np.float32), 0
    reach, kernel = _neighbours(tuple(spacing_zyx))
    for voxels in components:
        lower = np.maximum(voxels.min(axis=0) - reach, 0)
        upper = np.minimum(voxels.max(axis=0) + reach + 1, probability.shape)
        if np.prod(upper - lower) * len(kernel) > MOST_PAIRS:
            left += 1
            continue
        box = tuple(map(slice, lower, upper))
        alone, around = (torch.from_numpy(np.array(array[box], np.float32)) for array in (probability, image))
        crop = mean_field(alone.to(device), around.to(device), spacing_zyx).cpu().numpy()
        refined[tuple(voxels.T)] = crop[tuple((voxels - lower).T)]
    if left:
        logger.warning("%d spots are too large for the random field on this grid, and stay as they are", left)
    return refined


def mean_field(probability: Tensor, image: Tensor, spacing_zyx: Sequence[float]) -> Tensor:
    """Marginals of a conditional random field over a crop, by mean field.

    Two voxels attract each other by exp(-d² / 2 CRF_SIGMA_MM² - difference² / 2 CRF_EDGE²) (Krähenbühl and Koltun 2011,
    arXiv:1210.5644), as far as they lie within twice that distance (Teichmann and Cipolla 2018, arXiv:1805.04777).

    Args:
        probability: Float (Z, Y, X), what the network says of each voxel by itself.
        image: Float in [0, 1], of the same shape.
        spacing_zyx: Voxel size in mm.
    """
    reach, kernel = _neighbours(tuple(spacing_zyx))

    def beside(padded: Tensor, offset: Sequence[int]) -> Tensor:
        """What lies at an offset from each voxel."""
        starts = [size + step for size, step in zip(reach, offset, strict=True)]
        return padded[tuple(slice(start, start + size) for start, size in zip(starts, image.shape, strict=True))]

    def padded(values: Tensor) -> Tensor:
        return functional.pad(values, [size for axis in reversed(reach) for size in (axis, axis)])

    share, around = CRF_WEIGHT / max(sum(kernel.values()), 1e-9), padded(image)
    attraction = {
        offset: share * weight * torch.exp((beside(around, offset) - image) ** 2 / (-2 * CRF_EDGE**2))
        for offset, weight in kernel.items()
    }
    alone = torch.logit(probability, eps=1e-4)
    marginal = probability
    for _ in range(CRF_STEPS):
        signs, message = padded(2 * marginal - 1), torch.zeros_like(alone)
        for offset, weights in attraction.items():
            message += weights * beside(signs, offset)
        marginal = torch.sigmoid(alone + message)
    return marginal


@lru_cache(maxsize=8)
def _neighbours(spacing_zyx: tuple[float, ...]) -> tuple[list[int], dict[tuple[int, ...], float]]:
    """How many voxels a neighbour is off at most along each axis, and {offset (z, y, x): weight} of all of them."""
    reach, kernel = [int(2 * CRF_SIGMA_MM / step) for step in spacing_zyx], {}
    for offset in itertools.product(*(range(-size, size + 1) for size in reach)):
        squared = sum((step * size) ** 2 for step, size in zip(offset, spacing_zyx, strict=True))
        if 0 < squared <= (2 * CRF_SIGMA_MM) ** 2:
            kernel[offset] = math.exp(-squared / (2 * CRF_SIGMA_MM**2))
    return reach, kernel


def reshape_nodules(
    parts: Sequence[np.ndarray],
    image: np.ndarray,
    spacing_zyx: Sequence[float],
    cleaning: Cleaning,
    smallest_mm3: float = 0.0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Nodules after opening, closing, and leaving out what is too small or air, and what is left out.

    No voxel comes to lie in two nodules. One that the opening takes apart is several, and one that it would leave too
    little of stays as it is.

    Args:
        parts: Voxels (m, 3) of each nodule.
        image: Array (z, y, x) in [0, 1].
        spacing_zyx: Voxel size in mm.
        cleaning: What is done.
        smallest_mm3: Volume below which there is no nodule, whatever ``cleaning`` says.

    Returns:
        Voxels (m, 3) (z, y, x) of each nodule, and of each part that would be one but for ``cleaning``.
    """
    voxel_mm3 = math.prod(spacing_zyx)
    smallest = max(1.0, max(smallest_mm3, math.pi / 6 * cleaning.smallest_mm**3) / voxel_mm3)
    if cleaning.opening_mm:
        opened = []
        for voxels in parts:
            pieces = _opened(voxels, image.shape, spacing_zyx, cleaning.opening_mm)
            opened += pieces if max(map(len, pieces), default=0) >= smallest else [voxels]
        parts = opened
    if cleaning.closing_mm:
        taken = np.zeros(image.shape, bool)
        for voxels in parts:
            taken[tuple(voxels.T)] = True
        closed = []
        for voxels in parts:
            gaps = _gaps(voxels, image.shape, spacing_zyx, cleaning.closing_mm)
            gaps = gaps[~taken[tuple(gaps.T)]]
            taken[tuple(gaps.T)] = True
            closed.append(np.concatenate([voxels, gaps]))
        parts = closed
    kept, left_out = [], []
    for voxels in parts:
        is_air = cleaning.in_lungs and np.mean(image[tuple(voxels.T)] > AIR) < 0.5
        if len(voxels) >= smallest and not is_air:
            kept.append(voxels)
        elif len(voxels) * voxel_mm3 >= smallest_mm3:
            left_out.append(voxels)
    return kept, left_out


def _opened(
    voxels: np.ndarray, shape: Sequence[int], spacing_zyx: Sequence[float], radius_mm: float
) -> list[np.ndarray]:
    """The pieces (m, 3) of a nodule that a ball reaches without leaving it."""
    part, lower, _ = _surroundings(voxels, shape, spacing_zyx, radius_mm)
    middles = ndimage.distance_transform_edt(part, spacing_zyx) > radius_mm
    if not middles.any():
        return []
    reached = part & (ndimage.distance_transform_edt(~middles, spacing_zyx) <= radius_mm)
    labels, count = ndimage.label(reached, np.ones((3, 3, 3)))
    labels = labels[tuple((voxels - lower).T)]
    pieces = [voxels[labels == number] for number in range(1, count + 1)]
    return [piece for piece in pieces if len(piece)]  # one may lie beyond the array alone


def _gaps(voxels: np.ndarray, shape: Sequence[int], spacing_zyx: Sequence[float], radius_mm: float) -> np.ndarray:
    """The voxels around a nodule that no ball can reach without touching it, and what these enclose with it."""
    part, lower, inside = _surroundings(voxels, shape, spacing_zyx, radius_mm)
    grown = ndimage.distance_transform_edt(~part, spacing_zyx) <= radius_mm
    closed = ndimage.distance_transform_edt(grown, spacing_zyx) > radius_mm
    return np.argwhere(ndimage.binary_fill_holes(closed | part) & ~part & inside) + lower


def _surroundings(
    voxels: np.ndarray, shape: Sequence[int], spacing_zyx: Sequence[float], radius_mm: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A bool box (z, y, x) of a nodule with the radius around it, its corner's index, and which of it is in the array.

    Beyond the array a nodule goes on as it is at the array's edge.
    """
    margin = np.asarray([math.ceil(radius_mm / step) + 1 for step in spacing_zyx])
    lower, upper = voxels.min(axis=0) - margin, voxels.max(axis=0) + margin + 1
    start, stop = np.maximum(lower, 0), np.minimum(upper, shape)
    part = np.zeros(stop - start, bool)
    part[tuple((voxels - start).T)] = True
    beyond = np.stack([start - lower, upper - stop], axis=1)
    return np.pad(part, beyond, mode="edge"), lower, np.pad(np.ones_like(part), beyond)
