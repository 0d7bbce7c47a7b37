"""Probability maps, nodules, files and pictures, from processed arrays or raw scans.

python infer.py
python infer.py --input scan.mhd --output_dir results

The parts stand in this order: array to probability (``Predictor``), probability to nodules (``find_candidates``), files
(``ResultFolder``), pictures (``draw_overlay``), and ``NoduleInferencer``, which puts them together.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from utils import set_up_torch

    set_up_torch()

import hashlib
import itertools
import logging
import math
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cc3d
import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

from data.cleaning import CRF_WEIGHT, follow_edges, reshape_nodules
from data.command_line import parse_command_line, run_main
from data.dicom import DicomReader
from data.dicom_results import has_highdicom, write_dicom_results
from data.lungs import LUNG_METHOD, measure_noise
from data.measures import MeasuredScan, Measures, lungs_by_threshold, write_measures
from data.report import ANNOTATED, FOUND, ct_of, reach_mm, report_scan, write_index
from data.rescoring import Features
from data.slicer import write_points, write_segmentation
from model import (
    EXTRAS,
    MEAN_EPS,
    Cleaning,
    InferenceSettings,
    SegmentationNetwork,
    Zoom,
    checkpoint_file,
    load_checkpoint,
    padded,
    save_checkpoint,
    to_device,
)
from preprocess import PreparedScan, Preprocessing
from utils import (
    CANDIDATE_COLUMNS,
    LEARNT_FROM,
    PIECE_MM,
    UID,
    UNKNOWN_DIAMETER_MM,
    Box,
    Folders,
    Geometry,
    InputError,
    Nodule,
    ProcessedScan,
    Progress,
    SeenScans,
    Subset,
    UserError,
    Vector,
    append_csv,
    atomic_path,
    autocast,
    autocast_dtype,
    check,
    choose_scans,
    delete_files,
    describe_difference,
    describe_unlike,
    do_once,
    folder_lock,
    folder_of,
    free_memory,
    gather_objects,
    is_zip,
    join_processes,
    list_scans,
    name_folders,
    noting,
    now,
    only_scan,
    origin_of,
    parts_of,
    process_count,
    process_rank,
    read_json,
    read_metadata,
    read_processed,
    read_scan,
    reason_of,
    resample,
    resolve_folders,
    scan_name,
    scan_reader,
    scanning_of,
    select_device,
    signed_distance,
    sphere_diameter,
    tell,
    unpack,
    walk,
    write_array,
    write_csv,
    write_figure,
    write_image,
    write_json,
    write_objects,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 100  # per scan, LUNA16's limit
CANDIDATE_THRESHOLD = 0.1  # a spot that reaches it is a candidate


# ------------------------------------------------------------------------------------------------- array to probability

WINDOW_OVERLAP = 0.25  # of the window; 0.5 costs 2.7 times the windows
WINDOW_BATCH = 4
SCAN_BYTES = 64  # per voxel: image, logits, sums of windows and of further looks, and the loss of a validation
MEMORY_SHARE = 0.5  # of the GPU's free memory that these may take; the rest is for the windows
OUTSIDE_LOGIT = -20.0  # where no network looked: a probability of 2e-9
LOOK_SIGMA = 0.25  # of the window, how far from its middle another look counts
WIDEST_WINDOW = 96  # voxels, of a look at a spot that is wider than half a window
WIDE_WEIGHT = 10.0  # of a look in such a window, beside the first one
MOST_WIDE = 8  # such looks in a scan, at the likeliest spots


class Transform(Protocol):
    """A test-time transform: another look at the same image."""

    def apply(self, image: Tensor) -> Tensor:
        """The image (B, 1, Z, Y, X) that the network looks at, of a size that the network takes."""

    def undo(self, logits: Tensor) -> Tensor:
        """Its logits (B, 1, Z, Y, X), moved back to lie on the image."""


@dataclass(frozen=True)
class Flip:
    """A mirror image, or, with y and x exchanged before, a quarter turn in their plane or its mirror image.

    Args:
        axes_zyx: Axes of the array that are reversed.
        exchanged: Whether y and x are exchanged before; voxels should be as long along both.
    """

    axes_zyx: tuple[int, ...]
    exchanged: bool = False

    def apply(self, image: Tensor) -> Tensor:
        """The image that the network looks at."""
        return (image.transpose(3, 4) if self.exchanged else image).flip([axis + 2 for axis in self.axes_zyx])

    def undo(self, logits: Tensor) -> Tensor:
        """The logits, as they lie on the image."""
        back = logits.flip([axis + 2 for axis in self.axes_zyx])
        return back.transpose(3, 4) if self.exchanged else back


AS_IT_IS = Flip(())
# ``mirrors`` counts how many of them are used, from the first: mirror images, then what has y and x exchanged, of which
# quarter turns come first.
TRANSFORMS: list[Transform] = [
    Flip((2,)),
    Flip((1,)),
    Flip((0,)),
    Flip((1, 2)),
    Flip((0, 1)),
    Flip((0, 2)),
    Flip((0, 1, 2)),
    Flip((1,), exchanged=True),
    Flip((2,), exchanged=True),
    Flip((0, 1), exchanged=True),
    Flip((0, 2), exchanged=True),
    Flip((), exchanged=True),
    Flip((1, 2), exchanged=True),
    Flip((0,), exchanged=True),
    Flip((0, 1, 2), exchanged=True),
]


class Predictor:
    """Array to probability: a network, and how it looks at an image.

    Args:
        model: The network; a SegmentationNetwork is moved to the device.
        settings: How it looks at an image.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
        mixed_precision: Compute in half precision where the hardware gains by it.

    Raises:
        InputError: ``settings.mirrors`` is larger than the number of TRANSFORMS, or they exchange axes whose voxels are
            not as long.
    """

    def __init__(
        self, model: nn.Module, settings: InferenceSettings, device: str, mixed_precision: bool = True
    ) -> None:
        check(
            settings.mirrors in range(len(TRANSFORMS) + 1),
            f"mirrors must be 0 to {len(TRANSFORMS)} or null, not {settings.mirrors}",
        )
        x, y = (settings.grid_spacing or (1.0, 1.0))[:2]
        turns = any(getattr(transform, "exchanged", False) for transform in TRANSFORMS[: settings.mirrors])
        check(
            not turns or math.isclose(x, y, rel_tol=1e-3),
            f"mirrors above 7 exchange x and y, along which voxels are {x:g} and {y:g} mm here; take 7 at most",
        )
        self.settings = settings
        self.asked_device = device
        self.device = join_processes(select_device(device, warn=False))
        self.model = to_device(model, self.device) if isinstance(model, SegmentationNetwork) else model
        self.more_looks = settings.mirrors + len(settings.scales)
        self.autocast_dtype = autocast_dtype(self.device, mixed_precision)

    @property
    def divisor(self) -> int:
        """Sizes that the network takes are multiples of it."""
        return self.model.divisor if isinstance(self.model, SegmentationNetwork) else 1

    def logits(self, image: Tensor, box: Box | None = None) -> Tensor:
        """Float32 logits (B, 1, Z, Y, X) of images (B, 1, Z, Y, X) in [0, 1], of any size.

        A network trained on patches slides over the image, or over ``box`` alone; the logits
        outside of it are OUTSIDE_LOGIT. The windows go to the device one batch at a time; the logits come to lie where
        the image does. It looks again at wide spots that may be a nodule, with ``mirrors`` and ``scales`` at all of
        them, or ``everywhere``. The network's training mode is left as it was.
        """
        with evaluation_mode(self.model), torch.inference_mode():
            if self.settings.window is None:
                return _check_finite(self._forward(image, again=True))
            inside: Any = (..., *(box.slices if box else ()))
            logits = torch.full_like(image, OUTSIDE_LOGIT, dtype=torch.float32)
            logits[inside] = sliding_window_inference(  # type: ignore[assignment]
                image[inside].float(),
                self._first_window(logits[inside].shape[2:]),
                WINDOW_BATCH,
                partial(self._forward, again=self.settings.everywhere),
                overlap=WINDOW_OVERLAP,
                mode="gaussian",
                sw_device=self.device,
                device=image.device,
            )
            for one, its_logits in zip(image[inside], logits[inside], strict=True):
                self._refine_spots(one[None], its_logits[0])
            return _check_finite(logits)

    def _first_window(self, shape_zyx: Sequence[int]) -> list[int]:
        """Shape of the windows that slide over an array of this shape.

        They are as small as they can be without being more than windows of ``first_window`` would be. They are no
        larger than the array, so that none holds air from outside of it, but no smaller than ``window``.
        """
        assert self.settings.window is not None
        widest = np.minimum(self.settings.first_window or self.settings.window, shape_zyx)
        widest = np.maximum(widest - widest % self.divisor, 1)
        steps = np.ceil((shape_zyx - widest) / ((1 - WINDOW_OVERLAP) * widest))  # from the first window to the last
        even = shape_zyx / (1 + (1 - WINDOW_OVERLAP) * steps)
        multiple = math.lcm(self.divisor, 4)  # a quarter of it overlaps, and is no fraction of a voxel
        even = np.ceil(even / multiple).astype(int) * multiple
        return np.maximum(self.settings.window, np.minimum(even, widest)).tolist()

    def _refine_spots(self, image: Tensor, logits: Tensor) -> None:
        """Predicts possible nodules again, in the middle of a window and flipped, and averages all predictions.

        The likeliest spots that are wider than half a window are looked at in one of WIDEST_WINDOW, also without
        further looks: they may not have fitted into any window of the first one.

        Args:
            image: (1, 1, Z, Y, X).
            logits: (Z, Y, X) of the first prediction, changed in place. Further ones count less towards the edges of
                their window.
        """
        window, whole = np.asarray(self.settings.window), np.asarray(logits.shape)
        widest = np.maximum(window, np.minimum(WIDEST_WINDOW, whole + -whole % self.divisor))
        is_wider = bool((widest > window).any())
        looks_again = self.more_looks and not self.settings.everywhere
        if not (is_wider or looks_again):
            return
        views = 1 + self.more_looks
        first = views if self.settings.everywhere else 1
        probability = logits.sigmoid()
        total, weights = first * probability, torch.full_like(logits, first)
        voxel_mm3 = math.prod(self.settings.grid_spacing or (0.0,))
        wide_left = MOST_WIDE
        for spot in _spots(probability.cpu().numpy(), np.maximum(window, WIDEST_WINDOW) // 2, voxel_mm3):
            is_wide = is_wider and wide_left > 0 and bool((np.asarray(spot.shape_zyx) > window // 2).any())
            if not (is_wide or looks_again):
                continue
            wide_left -= is_wide
            shape = widest if is_wide else window
            size = np.minimum(shape, whole)
            counts = views * (WIDE_WEIGHT if is_wide else 1)
            weight = counts * compute_importance_map(tuple(size), "gaussian", LOOK_SIGMA, logits.device)
            middle = np.add(spot.lower, spot.upper) // 2
            crop = Box.of_size(np.clip(middle - size // 2, 0, whole - size), size).slices
            again = self._forward(padded(image[:, :, *crop], shape.tolist()), again=True)[0, 0].to(logits.device)
            total[crop] += weight * again[tuple(map(slice, size))].sigmoid()
            weights[crop] += weight
        looked = weights > first
        logits[looked] = torch.logit(total[looked] / weights[looked], eps=MEAN_EPS)

    def _forward(self, image: Tensor, again: bool) -> Tensor:
        """Logits of one batch, padded with air to a size that the network takes and cropped again.

        It returns the logit of the probability, ``again``: averaged over the image and all further looks at it.
        """
        shape = tuple(image.shape[2:])
        inside: Any = (..., *map(slice, shape))
        try:
            image = padded(image.to(self.device).float(), [size + -size % self.divisor for size in shape])
            if not (again and self.more_looks):
                return self._run(image)[inside]
            zooms = [Zoom(scale, shape, self.divisor) for scale in self.settings.scales]
            total = torch.zeros_like(image[inside])
            for looks, views in self._views(image, [AS_IT_IS, *TRANSFORMS[: self.settings.mirrors], *zooms]):
                for look, logits in zip(looks, self._run(views).split(len(image)), strict=True):
                    total += look.undo(logits)[inside].sigmoid()
            return torch.logit(total / (1 + self.more_looks), eps=MEAN_EPS)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"CUDA is out of memory for {' x '.join(map(str, shape))} voxels at a time; free the GPU of other "
                "programs, leave out scales, or set device='cpu' (--device cpu)"
            ) from error

    def _views(self, image: Tensor, looks: Sequence[Transform]) -> Iterator[tuple[list[Transform], Tensor]]:
        """What the looks see of images (B, 1, Z, Y, X), one after the other along the first axis.

        Of windows, as many go to the network at a time as in the first look, since it takes several times as long for
        each small one alone. What has another shape goes apart.
        """
        most = max(WINDOW_BATCH // len(image), 1) if self.settings.window else 1
        batch: list[tuple[Transform, Tensor]] = []
        for look in looks:
            view = look.apply(image)
            if batch and (len(batch) == most or view.shape != batch[0][1].shape):
                yield [look for look, _ in batch], torch.cat([view for _, view in batch])
                batch = []
            batch.append((look, view))
        yield [look for look, _ in batch], torch.cat([view for _, view in batch])

    def _run(self, image: Tensor) -> Tensor:
        """float32 logits of images of a size that the network takes."""
        with autocast(self.device, self.autocast_dtype):
            return self.model(image).float()

    def to_tensor(self, image: npt.ArrayLike) -> Tensor:
        """Checks an array (z, y, x) in [0, 1] and makes it a float32 tensor (1, 1, Z, Y, X).

        It lies on the device where all that is made of it fits there, else in main memory, so that a scan of any length
        can be looked at.

        Raises:
            ValueError: It is no 3-D float array of that range.
        """
        select_device(self.asked_device)  # warns of a missing GPU when there is something to compute
        array = np.asarray(image)
        check(array.ndim == 3 and array.size > 0, f"image must have three axes (z, y, x), not shape {array.shape}")
        check(
            array.dtype.kind == "f", f"image must be float in [0, 1], not {array.dtype}; give raw scans to infer_scan"
        )
        small = np.array(array, np.float16 if array.dtype == np.float16 else np.float32)  # half as much to carry
        tensor = torch.from_numpy(small).to(self._home_of(array.size)).float()
        low, high = torch.stack(tensor.aminmax()).tolist()
        check(
            low >= -0.01 and high <= 1.01,  # false for NaN, too
            f"image must lie in [0, 1], not [{low:g}, {high:g}]; give raw scans to infer_scan",
        )
        return tensor[None, None]

    def _home_of(self, voxels: int) -> torch.device:
        """Where a scan of so many voxels, its logits and their sums lie while windows slide over it."""
        fits = SCAN_BYTES * voxels <= MEMORY_SHARE * free_memory(self.device)
        return self.device if fits else torch.device("cpu")

    def predict_probability(self, image: npt.ArrayLike, box: Box | None = None) -> np.ndarray:
        """Nodule probability, float32 (z, y, x), of a processed array (z, y, x) of any float type.

        Args:
            image: Array in [0, 1].
            box: Outside of it a network trained on patches need not look; None takes the whole array.
        """
        return torch.sigmoid(self.logits(self.to_tensor(image), box))[0, 0].cpu().numpy()


def _check_finite(logits: Tensor) -> Tensor:
    """The logits; raises UserError where one is NaN or infinite, which would look like a scan without nodules."""
    if not torch.isfinite(logits).all():
        raise UserError(
            "the network gives numbers that are not finite; try float32 (mixed_precision=False, --mixed_precision "
            "false), and if that does not help, another checkpoint"
        )
    return logits


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode and back into whatever mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def content_box(image: np.ndarray) -> Box | None:
    """The box around all voxels of a processed array (z, y, x) that are not air; None where there are none.

    Where preprocessing masks the lungs, it is the box of the lungs.
    """
    return Box.around(np.asarray(image) > 0)


def _spots(probability: np.ndarray, step: np.ndarray, voxel_mm3: float = 0.0) -> list[Box]:
    """Boxes of up to MAX_CANDIDATES spots that may be a nodule in a map (z, y, x), the likeliest first.

    What is wider than ``step`` voxels is divided into boxes that are not, of which those that are not empty stay; the
    first ones of all spots come first. A map that is noise has none.
    """
    spots, is_noise = _main_components(probability, CANDIDATE_THRESHOLD, voxel_mm3)
    if is_noise:
        return []
    spots.sort(key=lambda voxels: -probability[tuple(voxels.T)].max())
    boxes: list[tuple[int, Box]] = []  # each with its number among those of its spot
    for voxels in spots[:MAX_CANDIDATES]:
        lower, width = voxels.min(axis=0), np.ptp(voxels, axis=0) + 1
        parts = -(-width // np.maximum(step, 1))
        part = ((voxels - lower) / width * parts).astype(int)
        filled = np.unravel_index(np.unique(np.ravel_multi_index(tuple(part.T), parts)), parts)
        for turn, number in enumerate(np.stack(filled, axis=1)):
            first, end = (lower + (number + edge) / parts * width for edge in (0, 1))
            boxes.append((turn, Box.between(np.floor(first.round(6)), np.ceil(end.round(6)))))
    boxes.sort(key=lambda box: box[0])
    return [box for _, box in boxes[:MAX_CANDIDATES]]


# ----------------------------------------------------------------------------------------------- probability to nodules

SURELY_BACKGROUND = 0.02  # probabilities up to this say nothing of how a candidate fades out
NECK_MM = 1.0  # a component is split where it is thinner by this than on both sides
SMALLEST_SPLIT = 30  # voxels
SMALLEST_NODULE_MM3 = 4.2  # a sphere of 2 mm, as LUNA16's nodules have 3 mm or more; nothing smaller stays in a mask
GRID_SLACK = 0.3  # of a voxel's squared edge, by which the grid may change how long a ball looks along it
ROUND = 0.92  # what is as round as this is one nodule
LARGEST_NODULE_MM3 = 113_000  # a sphere of 60 mm; nothing larger is a nodule, and splitting it would take long
MOST_COMPONENTS = 1000  # that are looked at in a map; one that has more is noise
NOISE_MM3 = 1_000_000  # a map that marks more than a litre is noise, too
PEAK_MM3 = 33.0  # where a candidate is likeliest; a ball of 4 mm
HAZE_MM = (3.0, 8.0)  # from a candidate, where the network should be sure that there is nothing
AIR_MM = (2.0, 6.0)  # from a candidate, where most nodules have lung around them
AERATED = 0.4  # of the HU window: what is darker, and not masked, is lung
MOST_MEASURED = 1_000_000  # voxels of a component that its centre and shape are computed from


@dataclass(frozen=True)
class FoundNodule(Nodule):
    """A nodule that was found in a mask or a probability map.

    Args:
        volume_voxels: Number of its voxels.
        volume_mm3: Their volume.
        box: The box around them.
        score: How likely it is a nodule, in [0, 1]: ``Features.score`` or a ``LearntScore``; NaN without a map.
        features: What the score is computed from; None without a probability map.
    """

    volume_voxels: int
    volume_mm3: float
    box: Box
    score: float
    features: Features | None = None

    def to_dict(self) -> dict[str, Any]:
        """The brief's fields as built-in types; ``bbox`` is half-open, ``probability`` is the score."""
        edges = zip(self.box.lower, self.box.upper, strict=True)
        return super().to_dict() | {
            "volume_voxels": self.volume_voxels,
            "volume_mm3": self.volume_mm3,
            "bbox": tuple(edge for side in edges for edge in side),
            "probability": self.score,
        }


@dataclass(frozen=True)
class Segmentation:
    """What was found in a probability map, before or after ``keep``.

    Args:
        labels: int32 (z, y, x); every nodule of the mask has a number from 1, 0 is background.
        candidates: All that might be a nodule: those of the mask,
            and where these are fewer than MAX_CANDIDATES, the likeliest fainter spots.
        numbers: Label of each candidate in ``labels``; 0 for a candidate that is not in the mask.
        is_noise: Whether the map marks more than MOST_COMPONENTS spots or more than a litre.
    """

    labels: np.ndarray
    candidates: list[FoundNodule]
    numbers: list[int]
    is_noise: bool = False

    @classmethod
    def nothing(cls) -> Segmentation:
        """Of a scan in which nothing was found."""
        return cls(np.zeros((1, 1, 1), np.int32), [], [])

    @property
    def scores(self) -> np.ndarray:
        """(n + 1,) score of each label; label 0, the background, has -1."""
        scores = np.full(max(self.numbers, default=0) + 1, -1.0)
        scores[self.numbers] = [found.score for found in self.candidates]
        scores[0] = -1.0
        return scores

    def without_voxels(self) -> Segmentation:
        """The same without the array, which is too large to be kept of many scans."""
        return replace(self, labels=np.zeros((1, 1, 1), np.int32))

    def keep(self, min_score: float) -> Segmentation:
        """The same with only those nodules in the mask whose score reaches ``min_score``."""
        kept = self.scores >= min_score
        numbers = [number if kept[number] else 0 for number in self.numbers]
        return replace(self, labels=np.where(kept[self.labels], self.labels, 0), numbers=numbers)

    def rescored(self, score: Callable[[Features], float]) -> Segmentation:
        """The same with other scores, which change the order of the candidates.

        Raises:
            InputError: The candidates are of a mask without a probability map.
        """
        pairs = []
        for found, number in zip(self.candidates, self.numbers, strict=True):
            if found.features is None:
                raise InputError("candidates of a mask without a probability map have no score")
            pairs.append((replace(found, score=score(found.features)), number))
        pairs.sort(key=lambda pair: (pair[1] == 0, -pair[0].score, -pair[0].volume_mm3))  # faint ones come last
        return replace(self, candidates=[found for found, _ in pairs], numbers=[number for _, number in pairs])

    @property
    def ranks(self) -> np.ndarray:
        """uint16 (z, y, x); the place of each nodule in ``nodules``, counted from 1, 0 is background."""
        ranks = np.zeros(max(self.numbers, default=0) + 1, np.uint16)
        numbers = [number for number in self.numbers if number]
        ranks[numbers] = np.arange(1, len(numbers) + 1)
        return ranks[self.labels]

    @property
    def mask(self) -> np.ndarray:
        """uint8 (z, y, x), 1 = nodule."""
        return (self.labels > 0).astype(np.uint8)

    @property
    def nodules(self) -> list[FoundNodule]:
        """The candidates in the mask, the likeliest first."""
        return [found for found, number in zip(self.candidates, self.numbers, strict=True) if number]

    @property
    def faint(self) -> list[FoundNodule]:
        """The other candidates, the likeliest first."""
        others = [found for found, number in zip(self.candidates, self.numbers, strict=True) if not number]
        return sorted(others, key=lambda found: -found.score)

    def marks(self, uid: str) -> pd.DataFrame:
        """The likeliest MAX_CANDIDATES candidates in LUNA16's submission format."""
        likeliest = sorted(self.candidates, key=lambda found: -found.score)[:MAX_CANDIDATES]
        return nodule_table(uid, likeliest)[list(CANDIDATE_COLUMNS)]


def extract_nodules(
    mask: np.ndarray,
    geometry: Geometry,
    probability: np.ndarray | None = None,
    grid_spacing: Vector | None = None,
) -> list[FoundNodule]:
    """Nodules of a mask: connected components (26 neighbours), touching nodules split; the likeliest first.

    The mask is taken as it is: holes stay, which ``find_candidates`` fills.

    Args:
        mask: (z, y, x), nodule where not 0.
        geometry: Where its voxels lie.
        probability: Float (z, y, x), or None.
        grid_spacing: Voxel size (x, y, z) in mm by which shape is judged; None takes that of ``geometry``.

    Raises:
        ValueError: Mask and probability differ in shape.
    """
    mask = np.asarray(mask)
    check(mask.ndim == 3, f"mask must have three axes (z, y, x), not shape {mask.shape}")
    if probability is not None:
        check(np.shape(probability) == mask.shape, f"probability {np.shape(probability)} and mask {mask.shape} differ")
    grid = replace(geometry, spacing=grid_spacing or geometry.spacing)
    parts = _nodule_voxels(_components(mask != 0), grid)
    return [nodule for _, nodule in _describe(parts, geometry, probability, grid)]


def is_hit(marks_xyz: npt.ArrayLike, centers_xyz: npt.ArrayLike, diameters_mm: npt.ArrayLike) -> np.ndarray:
    """LUNA16's rule: whether a mark lies nearer to a centre than its radius; a diameter below 0 is unknown.

    Args:
        marks_xyz: World positions (..., 3) in mm.
        centers_xyz: Likewise; the shapes broadcast.
        diameters_mm: (...) of the findings at the centres.
    """
    diameters = np.asarray(diameters_mm, float)
    radii = np.where(diameters >= 0, diameters, UNKNOWN_DIAMETER_MM) / 2
    return np.square(np.subtract(centers_xyz, marks_xyz)).sum(axis=-1) < radii**2


def hits_of(found: Sequence[Nodule], annotated: Sequence[Nodule]) -> np.ndarray:
    """Bool (found, annotated): whether a found nodule hits an annotated one."""
    marks, centers = (np.reshape([n.center_xyz for n in nodules], (-1, 3)) for nodules in (found, annotated))
    return is_hit(marks[:, None], centers[None], [nodule.diameter_mm for nodule in annotated])


def find_candidates(
    probability: np.ndarray,
    geometry: Geometry,
    threshold: float,
    grid_spacing: Vector | None = None,
    smallest_mm3: float = SMALLEST_NODULE_MM3,
    cleaning: Cleaning | None = None,
    image: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    score: Callable[[Features], float] | None = None,
    most: int | None = MAX_CANDIDATES,
) -> Segmentation:
    """All that might be a nodule: those of the mask, and fainter spots that do not reach the threshold.

    What a nodule encloses on all sides belongs to it, too. Of a map that is mostly noise the MOST_COMPONENTS largest
    components are kept as they are, so that a noisy map takes no longer than another.

    Args:
        probability: Float (z, y, x).
        geometry: Where its voxels lie.
        threshold: Probability from which a voxel belongs to the mask by itself.
        grid_spacing: Voxel size (x, y, z) in mm by which size and shape are judged; None takes that of ``geometry``. A
            network that sees all scans stretched to one grid judges them by one voxel size, too, so that the mask
            follows from the array alone.
        smallest_mm3: Volume that a nodule of the mask must have; what is smaller is a faint spot.
        cleaning: What is done to the mask besides; the candidates' scores are those of ``probability`` as it is.
        image: The array in [0, 1] that the map is of; needed with ``cleaning``, and for a score that is learnt.
        device: Where ``cleaning.crf`` computes.
        score: Of a candidate; None takes ``Features.score``.
        most: How many candidates are kept, those of the mask in any case; None keeps all.

    Raises:
        ValueError: ``cleaning`` has no image, or the image has another shape.
    """
    cleaning = None if cleaning == Cleaning() else cleaning
    array = None if image is None else np.asarray(image)
    fits = array is not None and array.shape == probability.shape
    check(fits or (array is None and cleaning is None), "cleaning needs the image that the map is of")
    grid = replace(geometry, spacing=grid_spacing or geometry.spacing)
    voxel_mm3 = grid.voxel_volume_mm3
    spots, spots_are_noise = _main_components(probability, min(CANDIDATE_THRESHOLD, threshold), voxel_mm3)
    left_out: list[np.ndarray] = []
    marked = probability
    if cleaning and cleaning.crf and not spots_are_noise and array is not None:
        marked = _along_edges(probability, spots, threshold, array, grid, device)
        left_out = _large(_main_components(probability, threshold, voxel_mm3)[0], smallest_mm3, voxel_mm3)
    parts, is_noise = _main_components(marked, threshold, voxel_mm3)
    if not is_noise:
        parts = _nodule_voxels(_fill_holes(parts, probability.shape, grid), grid)
    parts = _large(parts, smallest_mm3, voxel_mm3)
    if cleaning and not is_noise and array is not None:
        parts, reshaped = reshape_nodules(parts, array, grid.spacing_zyx, cleaning, smallest_mm3)
        left_out = reshaped + left_out  # what the random field takes below the threshold stays a candidate, too
    labels = np.zeros(probability.shape, np.int32)
    for number, voxels in enumerate(parts, start=1):
        labels[tuple(voxels.T)] = number
    found = _describe(parts, geometry, probability, grid, array)
    faint = _describe(_faint_parts(spots, left_out, labels), geometry, probability, grid, array)
    numbers = [number for number, _ in found] + [0] * len(faint)
    whole = Segmentation(labels, [nodule for _, nodule in found + faint], numbers, is_noise or spots_are_noise)
    whole = whole if score is None else whole.rescored(score)
    kept = slice(None if most is None else max(most, len(found)))
    return replace(whole, candidates=whole.candidates[kept], numbers=whole.numbers[kept])


def _large(parts: Sequence[np.ndarray], smallest_mm3: float, voxel_mm3: float) -> list[np.ndarray]:
    """Those of some components (m, 3) that have a volume."""
    return [voxels for voxels in parts if len(voxels) * voxel_mm3 >= smallest_mm3]


def _along_edges(
    probability: np.ndarray,
    spots: Sequence[np.ndarray],
    threshold: float,
    image: np.ndarray,
    grid: Geometry,
    device: torch.device | str,
) -> np.ndarray:
    """The map after ``follow_edges`` in those spots whose neighbours can raise it to the threshold."""
    least = 1 / (1 + math.exp(CRF_WEIGHT) * (1 / threshold - 1))
    may_be_marked = [voxels for voxels in spots if probability[tuple(voxels.T)].max() >= least]
    return follow_edges(probability, image, grid.spacing_zyx, may_be_marked, device)


def _faint_parts(spots: Sequence[np.ndarray], left_out: Sequence[np.ndarray], labels: np.ndarray) -> list[np.ndarray]:
    """The spots in which no nodule is, and what cleaning left out of the others, each as voxels (m, 3)."""
    faint = [voxels for voxels in spots if not labels[tuple(voxels.T)].any()]
    if not left_out:
        return faint
    listed = labels > 0
    for voxels in faint:
        listed[tuple(voxels.T)] = True
    for voxels in left_out:
        if not listed[tuple(voxels.T)].any():
            listed[tuple(voxels.T)] = True
            faint.append(voxels)
    return faint


def _main_components(probability: np.ndarray, threshold: float, voxel_mm3: float) -> tuple[list[np.ndarray], bool]:
    """Components of what reaches a threshold, as ``_components`` gives them, and whether the map is noise.

    Of more than MOST_COMPONENTS those with the largest sums of probability are kept.
    """
    mask = probability >= threshold
    flat, labels = _label(mask)
    is_noise = len(flat) * voxel_mm3 > NOISE_MM3
    if len(flat) and labels.max() >= MOST_COMPONENTS:
        is_noise = True
        sums = np.bincount(labels, weights=probability.ravel()[flat])
        is_kept = np.zeros(len(sums), bool)
        is_kept[np.argpartition(sums, -MOST_COMPONENTS)[-MOST_COMPONENTS:]] = True
        kept = is_kept[labels]
        flat, labels = flat[kept], labels[kept]
    return _split_by_label(flat, labels, mask.shape), is_noise


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Voxels, int (m, 3) (z, y, x), of each connected component (26 neighbours) of a bool mask."""
    return _split_by_label(*_label(mask), mask.shape)


def _label(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the voxels of a bool mask, ascending, and the number from 0 of the component of each."""
    flat = np.flatnonzero(mask)
    return flat, cc3d.connected_components(mask, connectivity=26).ravel()[flat].astype(np.int64) - 1


def _split_by_label(flat: np.ndarray, labels: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Voxels (m, 3) (z, y, x) of each label, by their flat indices in an array of this shape."""
    if not len(flat):
        return []
    order = np.argsort(labels, kind="stable")
    voxels = np.stack(np.unravel_index(flat[order], shape), axis=1)
    return np.split(voxels, np.flatnonzero(np.diff(labels[order])) + 1)


def _fill_holes(components: list[np.ndarray], shape: tuple[int, ...], grid: Geometry) -> list[np.ndarray]:
    """Components (m, 3) of an array of this shape (z, y, x), each with all that it encloses on all sides.

    A shell that would be larger than any nodule stays hollow: what lies in it may be a nodule.
    """
    holes = [hole for voxels in components for hole in _holes(voxels, grid)]
    if not holes:
        return components
    filled = np.zeros(shape, bool)
    for voxels in (*components, np.asarray(holes)):
        filled[tuple(voxels.T)] = True
    return _components(filled)  # a component in the hole of another one is part of it now


def _holes(voxels: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Voxels (n, 3) that a component (m, 3) encloses, none where it would be larger than any nodule with them."""
    none = voxels[:0]
    steps = np.diff(voxels, axis=0)
    has_gap = ((steps[:, 2] > 1) & (steps[:, 0] == 0) & (steps[:, 1] == 0)).any()  # in a row, as each hole makes one
    if not has_gap:
        return none
    part, lower = _in_a_box(voxels)
    holes = lower + np.argwhere(ndimage.label(part == 0)[0] > 1)  # 1 is all around
    return holes if (len(voxels) + len(holes)) * geometry.voxel_volume_mm3 <= LARGEST_NODULE_MM3 else none


def _in_a_box(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 array (z, y, x) of one component (m, 3) with an empty voxel all around, and the index of its corner."""
    lower = voxels.min(axis=0) - 1
    box = np.zeros(np.ptp(voxels, axis=0) + 3, np.uint8)
    box[tuple((voxels - lower).T)] = 1
    return box, lower


def _nodule_voxels(components: Sequence[np.ndarray], geometry: Geometry) -> list[np.ndarray]:
    """Voxels (m, 3) of each nodule: a component, or its parts where it has a neck between two thick ones."""
    largest = LARGEST_NODULE_MM3 / geometry.voxel_volume_mm3
    parts = []
    for voxels in components:
        shape = np.ptp(voxels, axis=0) + 1
        may_have_neck = min(shape) >= 3 and SMALLEST_SPLIT < len(voxels) < largest
        if may_have_neck and _roundness(voxels, geometry) < ROUND:
            parts += _split_at_necks(voxels, geometry)
        else:
            parts.append(voxels)
    return parts


def _split_at_necks(voxels: np.ndarray, geometry: Geometry) -> list[np.ndarray]:
    """Voxels (m, 3) of each thick part of one component: watershed of its distance map in mm."""
    part, lower = _in_a_box(voxels)
    basins = sitk.MorphologicalWatershed(
        signed_distance(Geometry(part.shape, geometry.origin, geometry.spacing).image(part)),
        level=NECK_MM,
        markWatershedLine=False,
        fullyConnected=True,
    )
    basin = sitk.GetArrayViewFromImage(basins)[tuple((voxels - lower).T)]
    return [voxels[basin == number] for number in np.unique(basin)]


def _roundness(voxels: np.ndarray, geometry: Geometry, slack: float = 0.0) -> float:
    """Shortest over longest axis of the voxels (m, 3), in (0, 1]; 1 for a ball.

    What is thinner than a voxel is taken as one voxel thick. Where a ball lies between the slices changes the variance
    of its voxels along an axis by up to a quarter of the squared spacing, whatever its size. With ``slack``, that share
    of the squared spacing is taken from the longest axis and added to the shortest one, so that the position of the
    grid decides nothing.
    """
    squared = np.square(geometry.spacing_zyx)
    offsets = (voxels - voxels.mean(axis=0)) * geometry.spacing_zyx
    spread = offsets.T @ offsets / len(voxels) + np.eye(3) * squared.max() / 12
    variances, axes = np.linalg.eigh(spread)  # ascending; the axes are columns
    doubt = slack * squared @ axes**2
    shortest, longest = variances[0] + doubt[0], variances[2] - doubt[2]
    return math.sqrt(shortest / max(shortest, longest))


def _describe(
    parts: Sequence[np.ndarray],
    geometry: Geometry,
    probability: np.ndarray | None,
    grid: Geometry,
    image: np.ndarray | None = None,
) -> list[tuple[int, FoundNodule]]:
    """(number from 1, nodule) of nodules, given by their voxels (m, 3); the likeliest and then the largest first.

    They are measured by ``geometry`` and scored by ``grid``.
    """
    nodules = []
    for number, voxels in enumerate(parts, start=1):
        sample = voxels[:: 1 + len(voxels) // MOST_MEASURED]
        index = sample.mean(axis=0)
        features = None if probability is None else features_of(sample, grid, probability, len(voxels), image)
        nodule = FoundNodule(
            tuple(geometry.world(index).tolist()),
            tuple(index.tolist()),
            sphere_diameter(len(voxels) * geometry.voxel_volume_mm3),
            len(voxels),
            len(voxels) * geometry.voxel_volume_mm3,
            Box.between(voxels.min(axis=0), voxels.max(axis=0) + 1),
            math.nan if features is None else features.score,
            features,
        )
        nodules.append((number, nodule))
    return sorted(nodules, key=lambda n: (0 if probability is None else -n[1].score, -n[1].volume_mm3))


def features_of(
    voxels: np.ndarray, geometry: Geometry, probability: np.ndarray, count: int, image: np.ndarray | None = None
) -> Features:
    """What is known of a candidate.

    Next to it lie the voxels that share a face with it. What lies farther off says less, and there is much of it around
    a large nodule. Voxels up to SURELY_BACKGROUND do not count for its certainty.

    Args:
        voxels: (m, 3) indices (z, y, x) of the candidate, or of a sample of its voxels.
        geometry: Where the voxels lie.
        probability: Float (z, y, x).
        count: Number of all its voxels.
        image: The array in [0, 1] that the map is of, or None.
    """
    part, lower = _in_a_box(voxels)
    near = lower + np.argwhere(ndimage.binary_dilation(part))
    values = probability[tuple(near[((near >= 0) & (near < probability.shape)).all(axis=1)].T)].astype(np.float32)
    most = max(1, round(PEAK_MM3 / geometry.voxel_volume_mm3))
    peak = float(np.sort(values)[-most:].sum()) / most
    values = values[values > SURELY_BACKGROUND]
    certainty = float(values.mean()) if len(values) else 0.0
    reach = np.ceil(max(HAZE_MM + AIR_MM) / np.asarray(geometry.spacing_zyx)).astype(int)
    lower = np.maximum(voxels.min(axis=0) - reach, 0)
    box = Box.between(lower, np.minimum(voxels.max(axis=0) + reach + 1, probability.shape)).slices
    there = np.ones(probability[box].shape, bool)
    there[tuple((voxels - lower).T)] = False
    distance = ndimage.distance_transform_edt(there, geometry.spacing_zyx)
    haze = probability[box][(distance > HAZE_MM[0]) & (distance <= HAZE_MM[1])]
    shown = np.zeros(0) if image is None else image[box][(distance > AIR_MM[0]) & (distance <= AIR_MM[1])]
    return Features(
        certainty,
        peak,
        _roundness(voxels, geometry, GRID_SLACK),
        sphere_diameter(count * geometry.voxel_volume_mm3),
        float(haze.mean(dtype=np.float64)) if haze.size else 0.0,
        float(((shown > 0) & (shown < AERATED)).mean()) if shown.size else 0.0 if image is not None else math.nan,
    )


# The columns of nodules after seriesuid; the first ones are LUNA16's, which calls the score "probability".
NODULE_COLUMNS: dict[str, Callable[[FoundNodule], float]] = {
    "coordX": lambda nodule: nodule.center_xyz[0],
    "coordY": lambda nodule: nodule.center_xyz[1],
    "coordZ": lambda nodule: nodule.center_xyz[2],
    "probability": lambda nodule: nodule.score,
    "diameter_mm": lambda nodule: nodule.diameter_mm,
    "volume_mm3": lambda nodule: nodule.volume_mm3,
    "volume_voxels": lambda nodule: nodule.volume_voxels,
    "voxelX": lambda nodule: nodule.index_zyx[2],
    "voxelY": lambda nodule: nodule.index_zyx[1],
    "voxelZ": lambda nodule: nodule.index_zyx[0],
}


def nodule_table(uid: str, nodules: Iterable[FoundNodule]) -> pd.DataFrame:
    """Nodules of a scan as rows of NODULE_COLUMNS."""
    rows = [(uid, *(value(nodule) for value in NODULE_COLUMNS.values())) for nodule in nodules]
    return pd.DataFrame(rows, columns=["seriesuid", *NODULE_COLUMNS])


# ---------------------------------------------------------------------------------------------------------------- files

# Files of a run in output_dir, and of each scan.
RUN_FILES = (
    "inference_summary.npy",
    "inference_summary.json",
    "inference_summary.csv",
    "candidates.csv",
    "failed_scans.csv",
    "inference.json",
    "report.html",
)
MEASURE_FILES = ("{}_measures.json", "{}_measures.csv")
PAGE_FILES = ("reports/{}.html", "reports/{}.jpg")
DICOM_FILES = ("predicted_masks/{}.dcm", "{}_measures.dcm")
SCAN_FILES = (
    *DICOM_FILES,
    "predicted_masks/{}.npy",
    "predicted_masks/{}.nii.gz",
    "predicted_masks/{}.seg.nrrd",
    "predicted_masks/{}.mrk.json",
    "visualizations/{}.png",
    "{}_nodules.npy",
    "{}_nodules.json",
    "{}_nodules.csv",
    *MEASURE_FILES,
    *PAGE_FILES,
)
SUMMARY_SHARE = 0.05  # a summary is written anew when so many of its scans are new
MAX_LISTED = 40  # scans on the console
SHORT_NAME = 34  # letters of a name on the console
REMEDY = "; name another output_dir, or replace them with overwrite=True (--overwrite true)"


def mark_lost_nodules(ranks: sitk.Image, nodules: Sequence[FoundNodule]) -> None:
    """Gives each nodule without a voxel the one at its middle: a small one may lie between thick slices.

    Args:
        ranks: Whole numbers on the scan's own grid, changed in place: 1 is the first nodule, 0 is background.
        nodules: The nodules in this order.
    """
    present, geometry = np.unique(sitk.GetArrayViewFromImage(ranks)), Geometry.from_image(ranks)
    for rank, nodule in enumerate(nodules, start=1):
        if rank in present:
            continue
        index = np.rint(geometry.index(nodule.center_xyz)).astype(int)
        voxel = np.clip(index, 0, np.subtract(geometry.shape_zyx, 1))[::-1].tolist()
        if ranks[voxel] == 0:
            ranks[voxel] = rank
        else:
            logger.warning("nodule %d has no voxel in the scan's own grid, since another one lies there", rank)


@dataclass(frozen=True)
class ScanResult:
    """What was found in one scan.

    Args:
        seriesuid: Name of the scan.
        part: 'train', 'validation', 'test', 'seen in training', 'new' or 'unknown', as ``parts_of`` says.
        source: File or folder that the scan was read from.
        found: All that was found.
        highest_probability: Of any voxel.
        lungs: What is to be said of the lungs that were found.
        unlike_training: In what the scan lies outside of what the checkpoint has learnt; '' where it does not.
        warnings: What else is to be known before its nodules are.
    """

    seriesuid: str
    part: str
    source: str
    found: Segmentation
    highest_probability: float
    lungs: str = ""
    unlike_training: str = ""
    warnings: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """What the summary says of the scan."""
        nodules = self.found.nodules
        return {
            "part": self.part,
            "source": self.source,
            "nodules": [nodule.to_dict() for nodule in nodules],
            "largest_diameter_mm": max((n.diameter_mm for n in nodules), default=None),
            "highest_score": max((n.score for n in nodules), default=None),
            "nodule_volume_mm3": sum(n.volume_mm3 for n in nodules),
            "faint_marks": len(self.found.faint),
            "highest_voxel_probability": self.highest_probability,
            "lungs": self.lungs,
            "unlike_training": self.unlike_training or "no",
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        """One line that tells a clean scan from a network that marks nothing, or everything."""
        nodules, marks = self.found.nodules, self.found.candidates
        kept = f"{len(nodules)} nodule{'s' * (len(nodules) != 1)}" if nodules else "no nodule found"
        faint = [mark.score for mark in self.found.faint]
        if self.found.is_noise:
            return f"{kept}, but the map is mostly noise: the network has not learnt, or does not suit this scan"
        if not marks:
            return f"{kept}; no faint mark either: the highest probability of a voxel is {self.highest_probability:.2g}"
        more = f"; {len(faint)} fainter marks with scores up to {max(faint):.2f} in candidates.csv" if faint else ""
        return kept + (f", the highest score is {nodules[0].score:.2f}" if nodules else "") + more


class ResultFolder:
    """The folder that the files of an inference go to, which holds the results of one checkpoint alone.

    Args:
        path: The folder.
        provenance: Whose results these are: all that decides what is found.
        overwrite: Replace other results.
    """

    def __init__(self, path: Path, provenance: dict[str, Any], overwrite: bool) -> None:
        self.path, self.provenance, self.overwrite = path, provenance, overwrite
        self._new_scans: dict[str, dict[str, Any]] = {}  # raw ones that are not in the summary yet
        self._num_summarized = 0
        weakref.finalize(self, _add_to_summary, path, provenance, self._new_scans)

    def claim(self, data_dir: str | list[str] | None, subset: str | None, scans: dict[str, str]) -> bool:
        """Notes in the folder whose results it holds, so that those of two checkpoints or data sets never mix.

        Args:
            data_dir: Folder or folders of the processed scans; None for raw scans.
            subset: Their subset; None for raw scans.
            scans: {name: path} of the scans; a raw one must not replace another of its name.

        Returns:
            Whether a result of one of them is there.
        """
        path, ours = self.path / "inference.json", self.provenance | {"data_dir": data_dir, "subset": subset}
        with folder_lock(self.path):
            mismatch = claim(path, ours, self.overwrite)
            theirs = read_json(path) if path.is_file() and not mismatch else {}
            known: dict[str, str] = theirs.get("scans", {})
            others = [f"another {name}, {known[name]}" for name in scans if known.get(name, scans[name]) != scans[name]]
            if others and not self.overwrite:
                raise FileExistsError(f"{self.path} holds results of {others[0]}{REMEDY}")
            if mismatch:
                delete_results(self.path)
            write_json(path, ours | {"date": now(), "scans": known | scans})
            return any(name in known for name in scans)

    def write_scan(self, result: ScanResult, figure: Figure, own_ranks: sitk.Image | None = None) -> None:
        """Mask, nodules and picture of one scan; of a raw one also files in its own grid, from its nodules' ranks."""
        uid, nodules = result.seriesuid, result.found.nodules
        write_array(self.path / "predicted_masks" / f"{uid}.npy", result.found.mask)
        write_objects(self.path / f"{uid}_nodules.npy", [nodule.to_dict() for nodule in nodules])
        write_csv(self.path / f"{uid}_nodules.csv", nodule_table(uid, nodules))
        write_figure(self.path / "visualizations" / f"{uid}.png", figure)
        if own_ranks is not None:
            path = self.path / "predicted_masks" / uid
            write_image(Path(f"{path}.nii.gz"), sitk.Cast(own_ranks > 0, sitk.sitkUInt8))
            names = [f"nodule {n}: {found.diameter_mm:.1f} mm, {found.score:.2f}" for n, found in enumerate(nodules, 1)]
            write_points(Path(f"{path}.mrk.json"), nodules, names)
            ranks = sitk.GetArrayViewFromImage(own_ranks)
            if ranks.any():
                write_segmentation(Path(f"{path}.seg.nrrd"), ranks, Geometry.from_image(own_ranks), names)
            else:
                delete_files(path.parent, [f"{uid}.seg.nrrd"])

    def write_tables(self, results: Sequence[ScanResult], failed: dict[str, str]) -> None:
        """The tables of a data set."""
        write_failures(self.path, failed)
        marks = [result.found.marks(result.seriesuid) for result in results] or [Segmentation.nothing().marks("")]
        write_csv(self.path / "candidates.csv", pd.concat(marks))
        write_summary(self.path, self.provenance, {result.seriesuid: result.row() for result in results})

    def add(self, result: ScanResult, is_again: bool) -> None:
        """Adds a raw scan to the tables.

        Rows are appended, and the summary's .json and .npy, which must be whole, are written anew when enough scans are
        new, so that the hundredth scan costs what the first one costs; what is missing then is written when the
        object goes.
        """
        uid = result.seriesuid
        self._new_scans[uid] = result.row()
        rows, marks = summary_table({uid: self._new_scans[uid]}), result.found.marks(uid)
        with folder_lock(self.path):
            for name, table in (("inference_summary.csv", rows), ("candidates.csv", marks)):
                path = self.path / name
                if is_again and path.is_file():
                    old = pd.read_csv(path, dtype=str, keep_default_na=False)  # a scan may be called NA
                    write_csv(path, pd.concat([old[old["seriesuid"] != uid], table]))
                elif path.is_file():
                    append_csv(path, table)
                else:
                    write_csv(path, table)
        if is_again or len(self._new_scans) >= SUMMARY_SHARE * self._num_summarized:
            self.flush_summary()

    def flush_summary(self) -> None:
        """Brings inference_summary.json and .npy up to date with the raw scans that were added."""
        self._num_summarized = _add_to_summary(self.path, self.provenance, self._new_scans) or self._num_summarized

    def finish(self, wants_index: bool) -> None:
        """Brings summary and report.html up to date with all scans of a run, those that failed, too."""
        self.flush_summary()
        path = self.path / "inference_summary.json"
        scans = read_json(path)["scans"] if path.is_file() else {}
        update_index(self.path, self.provenance, scans, wants_index)


def summary_table(scans: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Rows of the summary as a table: the number of nodules instead of the nodules."""
    rows = [
        {"seriesuid": uid} | scan | {"nodules": len(scan["nodules"]), "warnings": " ".join(scan["warnings"]) or "no"}
        for uid, scan in scans.items()
    ]
    return pd.DataFrame(rows)


def write_summary(output_dir: Path, provenance: dict[str, Any], scans: dict[str, dict[str, Any]]) -> None:
    """Writes inference_summary.npy, .json and .csv."""
    path = output_dir / "inference_summary.npy"
    write_objects(path, provenance | {"date": now(), "scans": scans})
    write_csv(path.with_suffix(".csv"), summary_table(scans))
    update_index(output_dir, provenance, scans)


def update_index(
    output_dir: Path, provenance: dict[str, Any], scans: dict[str, dict[str, Any]], wants_index: bool = False
) -> None:
    """Writes report.html where a scan has a page, or where it is wanted; deletes that of an earlier run elsewhere."""
    if wants_index or any((output_dir / "reports").glob("*.html")):
        write_index(output_dir, provenance, scans)
    else:
        (output_dir / "report.html").unlink(missing_ok=True)


def _add_to_summary(output_dir: Path, provenance: dict[str, Any], new: dict[str, dict[str, Any]]) -> int:
    """Moves rows into the summary, beside those of other processes; returns how many scans it has then."""
    if not new:
        return 0
    with folder_lock(output_dir):
        path = output_dir / "inference_summary.json"
        scans = (read_json(path)["scans"] if path.is_file() else {}) | new
        # The table may hold rows of other processes that are not in their summary yet, so it stays as it is.
        write_objects(path.with_suffix(".npy"), provenance | {"date": now(), "scans": scans})
        new.clear()  # not before they are written
        update_index(output_dir, provenance, scans)
        return len(scans)


def delete_results(output_dir: Path) -> None:
    """Deletes the results of an earlier run, by the names of its scans, and no file of anyone else."""
    path = output_dir / "inference.json"
    with suppress(InputError, OSError):
        names = read_json(path).get("scans", {})
        delete_files(output_dir, [pattern.format(name) for name in names for pattern in SCAN_FILES])
    delete_files(output_dir, RUN_FILES)


def claim(path: Path, ours: dict[str, Any], overwrite: bool) -> str:
    """Why results cannot go into a folder that holds those that ``path`` tells of; empty where they can.

    Raises:
        FileExistsError: They cannot, and are not to be replaced.
    """
    try:
        theirs = read_json(path) if path.is_file() else ours
        check(isinstance(theirs, dict), f"{path} is damaged")
        mismatch = describe_mismatch(path.parent, theirs, ours)
    except InputError as error:
        mismatch = f"{error}{REMEDY}"
    if mismatch and not overwrite:
        raise FileExistsError(mismatch)
    return mismatch


def describe_mismatch(output_dir: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Why results cannot go into a folder that holds others, by what is noted there; empty where they can."""
    noted = dict.fromkeys(EXTRAS) | ours  # they are noted only where there are any
    differing = [name for name in noted if name != "checkpoint" and theirs.get(name) != noted[name]]
    if not differing:
        return ""
    min_score, folder = theirs.get("min_score"), theirs.get("data_dir")
    of = f"of {theirs.get('checkpoint')} at threshold {theirs.get('threshold')}, min_score "
    of += f"{min_score if min_score is None else round(min_score, 4)} and {theirs.get('mirrors')} mirrors"
    if {"data_dir", "subset", "fold"} & set(differing):
        of += f", of the {theirs.get('subset')} scans of {name_folders(folder)}" if folder else ", of single scans"
    if theirs.get("checkpoint") == ours.get("checkpoint") and "checkpoint_sha256" in differing:
        of += ", which has changed since"
    names = ", ".join(name.removesuffix("_sha256") for name in differing)
    return f"{output_dir} holds results {of} (what differs: {names}){REMEDY}"


def write_failures(output_dir: Path, failed: dict[str, str]) -> None:
    """Writes failed_scans.csv, or deletes that of an earlier run where nothing failed."""
    path = output_dir / "failed_scans.csv"
    if failed:
        table = pd.DataFrame(sorted(failed.items()), columns=["seriesuid", "reason"])
        write_csv(path, table)
    else:
        path.unlink(missing_ok=True)


def format_nodules(nodules: pd.DataFrame) -> str:
    """The table of ``nodule_table`` as a person reads it on the console."""
    if nodules.empty:
        return "no nodule found"
    columns = {"coordX": "x mm", "coordY": "y mm", "coordZ": "z mm", "diameter_mm": "diameter mm", "volume_mm3": "mm3"}
    shown = nodules[list(columns)].rename(columns=columns).round(1)
    shown.insert(0, "nodule", nodules.groupby("seriesuid").cumcount() + 1)
    if nodules["seriesuid"].nunique() > 1:
        shown.insert(0, "scan", nodules["seriesuid"].map(_shorten))
    shown["score"] = nodules["probability"].map("{:.2f}".format)
    return shown.to_string(index=False)


def format_scans(summary: pd.DataFrame) -> str:
    """The table of ``inference_summary.csv`` as a person reads it on the console."""
    if summary.empty:
        return "no scan was searched"
    shown = pd.DataFrame({"scan": summary["seriesuid"].map(_shorten), "part": summary["part"]})
    shown["nodules"] = summary["nodules"]
    for name, column, digits in (("largest mm", "largest_diameter_mm", 1), ("highest score", "highest_score", 2)):
        shown[name] = ["" if pd.isna(value) else f"{value:.{digits}f}" for value in summary[column]]
    rest = f"\n... and {len(shown) - MAX_LISTED} more scans" if len(shown) > MAX_LISTED else ""
    total = f"{int(summary['nodules'].sum())} nodules in {int((summary['nodules'] > 0).sum())} of {len(summary)} scans"
    return f"{shown.head(MAX_LISTED).to_string(index=False)}{rest}\n{total}"


def _shorten(seriesuid: str) -> str:
    """The end of a long name; of LUNA16's series UIDs the beginnings are alike."""
    return seriesuid if len(seriesuid) <= SHORT_NAME else "..." + seriesuid[3 - SHORT_NAME :]


# ------------------------------------------------------------------------------------------------------------- pictures

MAX_PICTURED = 6  # rows drawn for a scan
VIEW_SHARE = 0.7  # of half the width of a view: what lies nearer to its middle is surely seen in it
LABEL_BOX = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.5}
TRUTH_COLOR, PREDICTION_COLOR = (f"#{bytes(color).hex()}" for color in (ANNOTATED, FOUND))


def draw_overlay(
    image: np.ndarray,
    geometry: Geometry,
    mask: np.ndarray,
    nodules: Sequence[FoundNodule],
    truth: np.ndarray | None = None,
    title: str = "",
    most: int = MAX_PICTURED,
    annotated: Sequence[Nodule] | None = None,
) -> Figure:
    """Axial slice and three zoomed views of each finding, with truth and prediction as contours.

    Findings that lie in the view of a surer one share its row.

    Args:
        image: Float (z, y, x) in [0, 1].
        geometry: Where its voxels lie.
        mask: Predicted mask (z, y, x).
        nodules: Predicted nodules.
        truth: Annotated mask (z, y, x).
        title: First line.
        most: Rows that are drawn; the title counts all findings.
        annotated: Annotated nodules, which the tables count, too; those that LUNA16's rule takes for missed are drawn.
            None takes the components of ``truth``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if annotated is None and truth is not None:
        annotated = extract_nodules(truth, geometry)
    findings: list[tuple[str, Nodule]] = [
        (f"{i}: {n.diameter_mm:.1f} mm, score {n.score:.2f}", n) for i, n in enumerate(nodules, 1)
    ]
    counted = f"{len(nodules)} predicted"
    if annotated is not None:
        hits = hits_of(nodules, annotated)
        missed = [nodule for number, nodule in enumerate(annotated) if not hits[:, number].any()]
        findings = [(f"missed, {n.diameter_mm:.1f} mm", n) for n in missed] + findings
        counted += f", {len(annotated)} annotated, {len(missed)} missed"
    rows = _share_rows(findings)
    shown = rows[:most] or [("axial, no nodule found", _placeholder_finding(image.shape))]
    figure = Figure(figsize=(15, 0.9 + 3.9 * len(shown)), dpi=100, layout="constrained", facecolor="white")
    more = f" (the first {most} of {len(rows)} findings)" if len(rows) > most else ""
    figure.suptitle(f"{title}\n{counted}{more}", fontsize=12, parse_math=False)  # names may have a $
    lines = [Line2D([], [], color=PREDICTION_COLOR, label="prediction")]
    if truth is not None:
        lines.append(Line2D([], [], color=TRUTH_COLOR, label="annotation"))
    _, height_mm, width_mm = np.asarray(image.shape) * geometry.spacing_zyx
    widths = [1.25, 1, 1, 1] if findings else [width_mm, width_mm, height_mm]
    axes = figure.subplots(len(shown), len(widths), squeeze=False, width_ratios=widths)
    if findings:
        axes[0, 3].legend(handles=lines, loc="upper right", fontsize=10)
    for row, (label, finding) in zip(axes, shown, strict=True):
        _draw_finding(row, label, finding, image, geometry, mask, truth)
    return figure


def _share_rows(findings: Sequence[tuple[str, Nodule]]) -> list[tuple[str, Nodule]]:
    """(label, nodule) of each row of a picture: a finding, and how many more lie in its view."""
    rows: list[tuple[str, Nodule, int]] = []
    for label, nodule in findings:
        for number, (first, shown, others) in enumerate(rows):
            reach = VIEW_SHARE * reach_mm(shown)
            if np.linalg.norm(np.subtract(nodule.center_xyz, shown.center_xyz)) < reach:
                rows[number] = first, shown, others + 1
                break
        else:
            rows.append((label, nodule, 0))
    return [(label + (f", and {others} more here" if others else ""), shown) for label, shown, others in rows]


def _placeholder_finding(shape_zyx: Sequence[int]) -> Nodule:
    """What is drawn where nothing was found: whole slices, the sagittal one through a lung."""
    z, y, x = shape_zyx
    return Nodule((math.nan,) * 3, ((z - 1) / 2, (y - 1) / 2, (x - 1) / 4), 0.0)


def _draw_finding(
    row: Sequence[Axes],
    label: str,
    finding: Nodule,
    image: np.ndarray,
    geometry: Geometry,
    mask: np.ndarray,
    truth: np.ndarray | None,
) -> None:
    index = np.clip(np.rint(finding.index_zyx), 0, np.asarray(image.shape) - 1).astype(int)
    center_mm = np.asarray(finding.index_zyx) * geometry.spacing_zyx
    reach = reach_mm(finding)
    views = [(0, None, label), (0, reach, f"axial, {2 * reach:.0f} mm"), (1, reach, "coronal"), (2, reach, "sagittal")]
    if not finding.diameter_mm:  # nothing to look at closely
        views = [(0, None, label), (1, None, "coronal"), (2, None, "sagittal")]
    for axes, (axis, zoom, name) in zip(row, views, strict=True):
        planes = [None if array is None else np.take(array, index[axis], axis) for array in (image, mask, truth)]
        _draw_plane(axes, planes, [geometry.spacing_zyx[a] for a in range(3) if a != axis])
        axes.set_title(name, fontsize=11)
        _name_sides(axes, "AP" if axis == 2 else "RL")
        rows, columns = [center_mm[a] for a in range(3) if a != axis]
        if axis:
            axes.invert_yaxis()  # head up
        if zoom is not None:
            axes.set_xlim(columns - zoom, columns + zoom)
            axes.set_ylim((rows - zoom, rows + zoom) if axis else (rows + zoom, rows - zoom))
        elif finding.diameter_mm:
            _point_at(axes, columns, rows, finding.diameter_mm, label)


def _name_sides(axes: Axes, sides: str) -> None:
    """The patient's right and left, or front and back, as letters at the sides of a slice."""
    for x, letter in zip((0.02, 0.98), sides, strict=True):
        align = "left" if x < 0.5 else "right"
        style: dict[str, Any] = {"ha": align, "va": "center", "transform": axes.transAxes, "bbox": LABEL_BOX}
        axes.text(x, 0.5, letter, color="white", fontsize=10, **style)


def _draw_plane(axes: Axes, planes: Sequence[np.ndarray | None], spacing: Sequence[float]) -> None:
    """One slice in millimetres, with the contours of prediction and truth."""
    image, mask, truth = planes
    assert image is not None
    height, width = image.shape
    extent = (-0.5 * spacing[1], (width - 0.5) * spacing[1], (height - 0.5) * spacing[0], -0.5 * spacing[0])
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="bilinear")
    axes.set_facecolor("black")
    axes.set_xticks([])
    axes.set_yticks([])
    for plane, color in ((truth, TRUTH_COLOR), (mask, PREDICTION_COLOR)):
        if plane is not None and plane.any():
            outline = np.pad(plane != 0, 1).astype(float)
            y, x = ((np.arange(n) - 1) * step for n, step in zip(outline.shape, spacing, strict=True))
            axes.contour(x, y, outline, levels=[0.5], colors=color, linewidths=1.4)


def _point_at(axes: Axes, x: float, y: float, diameter: float, label: str) -> None:
    left, right = axes.get_xlim()
    side = -1 if x > (left + right) / 2 else 1
    axes.annotate(
        label.split(":")[0].split(",")[0],
        (x + side * diameter / 2, y),
        (x + side * (diameter / 2 + 45), y),
        color="yellow",
        fontsize=11,
        va="center",
        ha="center",
        bbox=LABEL_BOX,
        arrowprops={"arrowstyle": "->", "color": "yellow"},
    )


# ---------------------------------------------------------------------------------------------------- scans and folders


@dataclass(frozen=True)
class RawScan:
    """A scan outside the data set.

    Args:
        path: As ``read_scan`` takes it.
        name: What its results are called; '' wants a number.
        source: Where it comes from, as the results say it.
        private: File or folder below which all names may be those of patients, and must not be shown; None: they may.
    """

    path: Path
    name: str
    source: str
    private: Path | None = None

    def hide(self, message: str) -> str:
        """A message without what must not be shown."""
        if self.private is None:
            return message
        message = message.replace(str(self.path), self.name)
        folder = unpack(self.private) if is_zip(self.private) else self.private
        below = walk(folder) if folder.exists() else ()
        names = {text for path in below for text in (path.name, path.stem)} | {*self.private.absolute().parts}
        for name in sorted(names, key=len, reverse=True):
            if len(name) > 2 and not UID.fullmatch(name) and not (name.isascii() and name.isalpha() and name.islower()):
                message = message.replace(name, "...")
        message = re.sub(r"\S*/\S*", "...", message)  # a word in lower case is shown, but not as a part of a path
        return message.removeprefix(f"{self.name}: ")


def raw_scan(path: Path, given: Path, names: bool) -> RawScan:
    """A scan that was found at a given path, by its series UID, by the name of its file, or without a name."""
    name, origin = scan_name(path), origin_of(path)
    is_series = not path.exists()  # but an address
    if names and is_series:
        name = f"{origin.parent.name.removesuffix('.zip')}-{name}"
    if names or path == given:
        return RawScan(path, name, str(origin))
    source = f"sha256 of its path: {hashlib.sha256(os.fsencode(origin)).hexdigest()[:16]}"
    return RawScan(path, name if is_series or UID.fullmatch(name) else "", source, given)


class NoduleInferencer:
    """Finds nodules in processed arrays and in raw scans.

    Args:
        checkpoint_path: Checkpoint of train.py; it carries the network and the preprocessing.
        output_dir: Where files and pictures go, whichever checkpoint is named.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
        threshold: Probability from which a voxel counts as nodule; null takes the checkpoint's, 0.5 unless it is tuned.
        min_score: Score from which a nodule stays in the mask, 0 to 1; null takes the checkpoint's, chosen on the
            validation scans, and 0 (all stay) for another threshold than the checkpoint's or a live network.
        mirrors: Mirror images, and from the 8th on quarter turns, 0 to 15, whose probabilities are averaged with those
            of the scan itself; a network trained on patches looks again only at what may be a nodule. null takes the
            number that the training chose min_score with, and 0 for a live network.
        mixed_precision: Compute in half precision where the hardware gains by it.
        overwrite: Replace the results of another checkpoint, data set or setting in output_dir.
        report: Write pages to look at the results with: report.html, and one for each scan; null does it for raw scans.
        model: A live network instead of a checkpoint.
        settings: How a live network looks at a scan, where the arguments above say nothing; a checkpoint knows its own.
        cleaning: What is done to the mask besides the threshold, in place of all that the checkpoint says; null takes
            the checkpoint's, nothing unless it is tuned. --cleaning.crf false alone turns all of it off.
        scales: Factors by which the scan is magnified or shrunk for further looks, such as '[0.8, 1.25]'; they count as
            much as mirror images. null takes the checkpoint's, none unless they were set.
        everywhere: Whether a network trained on patches looks again in each of its windows, instead of in one around
            each spot that may be a nodule; null takes the checkpoint's, false unless it was set.

    Raises:
        FileNotFoundError: There is no checkpoint.
        InputError: The checkpoint is damaged, or a value is out of its range.
    """

    def __init__(
        self,
        checkpoint_path: str | Path = "experiments/luna16_unet/checkpoints/best_model.pth",
        output_dir: str | Path = "experiments/luna16_unet/inference",
        device: str = "cuda",
        threshold: float | None = None,
        min_score: float | None = None,
        mirrors: int | None = None,
        mixed_precision: bool = True,
        overwrite: bool = False,
        report: bool | None = None,
        model: nn.Module | None = None,
        settings: InferenceSettings | None = None,
        cleaning: Cleaning | None = None,
        scales: tuple[float, ...] | None = None,
        everywhere: bool | None = None,
    ) -> None:
        self.checkpoint_path = checkpoint_file(checkpoint_path)
        self.report = report
        self.output_dir = Path(output_dir)
        self.preprocessing: Preprocessing | None = None
        self.checkpoint_sha256, self.about = "", ""
        self.seen: SeenScans = {}
        self.failed: dict[str, str] = {}  # {series UID: reason} of the last run
        if model is None:
            checkpoint = load_checkpoint(self.checkpoint_path)
            self.checkpoint_sha256 = checkpoint.sha256
            self.preprocessing = Preprocessing.from_dict(checkpoint.preprocessing)
            self.learnt, self.seen, self.about = checkpoint.learnt, checkpoint.seen, checkpoint.about
            if self.about:
                tell(f"{self.checkpoint_path.name}: {self.about}")
            self.lung_method = checkpoint.preprocessing.get("lung_method", 1)
            settings = checkpoint.inference
        given: dict[str, Any] = {"threshold": threshold, "min_score": min_score, "mirrors": mirrors}
        given |= {"cleaning": cleaning, "scales": scales, "everywhere": everywhere}
        self.settings = _override(settings or InferenceSettings(), given)
        self.by_hand = _describe_by_hand(settings or self.settings, self.settings)
        if everywhere and not self.settings.looks_everywhere:
            logger.warning("everywhere without effect: it needs mirrors or scales, and a network trained on patches")
        check(
            not self.settings.cleaning.in_lungs or self.preprocessing is None or self.preprocessing.mask_lungs,
            "cleaning.in_lungs needs scans prepared with mask_lungs, where all around the lungs is air; leave it out",
        )
        self.predictor = Predictor(model or checkpoint.build_network(), self.settings, device, mixed_precision)
        self.folder = ResultFolder(self.output_dir, self.provenance, overwrite)

    def predict_probability(self, image: npt.ArrayLike) -> np.ndarray:
        """Nodule probability, float32 (z, y, x), of a processed array (z, y, x) in [0, 1] of any float type.

        A network trained on patches looks at the box around all that is not air, and a live one everywhere.
        """
        box = None if self.preprocessing is None else content_box(np.asarray(image))
        return self.predictor.predict_probability(image, box)

    def predict(self, image: npt.ArrayLike) -> np.ndarray:
        """Nodule mask, uint8 (z, y, x), of a processed array (z, y, x) of any float type in [0, 1].

        It is the mask that ``infer_dataset`` writes for the same array: what stays in it depends on the array and the
        checkpoint alone.
        """
        image = np.asarray(image)
        geometry = Geometry(image.shape, (0.0, 0.0, 0.0), self.settings.grid_spacing or (1.0, 1.0, 1.0))
        return self.segment(self.predict_probability(image), geometry, image).mask

    def find_candidates(
        self,
        probability: np.ndarray,
        geometry: Geometry,
        image: np.ndarray | None = None,
        settings: InferenceSettings | None = None,
        most: int | None = MAX_CANDIDATES,
    ) -> Segmentation:
        """All that might be a nodule in a probability map, float (z, y, x), judged by this network's grid.

        With a live network of unknown grid a nodule may be as small as a voxel. ``image`` is the array that the map is
        of, which is only needed where the mask is cleaned or the score is learnt. ``settings`` None takes this
        network's; of more than ``most`` candidates the likeliest are kept (None keeps all).
        """
        settings = settings or self.settings
        return find_candidates(
            probability,
            geometry,
            settings.threshold,
            settings.grid_spacing,
            SMALLEST_NODULE_MM3 if settings.grid_spacing else 0.0,
            settings.cleaning,
            image,
            self.predictor.device,
            settings.learnt_score,
            most,
        )

    def save_checkpoint(self, path: Path, settings: InferenceSettings) -> None:
        """Writes a copy of this network's checkpoint that looks at scans by other settings.

        Raises:
            InputError: The checkpoint has become another one since it was read.
        """
        checkpoint = load_checkpoint(self.checkpoint_path)
        check(
            checkpoint.sha256 == self.checkpoint_sha256,
            f"{self.checkpoint_path} has changed meanwhile, and the settings are of the earlier network; do it again",
        )
        with atomic_path(path) as temporary:
            save_checkpoint(temporary, replace(checkpoint, inference=settings))

    def segment(self, probability: np.ndarray, geometry: Geometry, image: np.ndarray | None = None) -> Segmentation:
        """Mask, nodules and candidates of a probability map, float (z, y, x), of an image of the same shape."""
        return self.find_candidates(probability, geometry, image).keep(self.settings.min_score)

    def extract_nodule_candidates(
        self,
        mask: np.ndarray,
        origin: Sequence[float],
        spacing: Sequence[float],
        probability: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Nodules of a mask, the likeliest first, as the brief's dicts.

        Args:
            mask: (z, y, x), nodule where not 0.
            origin: World position (x, y, z) of the centre of voxel 0, in mm.
            spacing: Voxel size (x, y, z) in mm.
            probability: Float (z, y, x), or None.

        Returns:
            One dict a nodule: ``center_world`` [x, y, z] in LPS mm, ``center_voxel`` [x, y, z] as floats,
            ``diameter_mm`` of the sphere of equal volume, ``volume_voxels``, ``volume_mm3``, half-open ``bbox`` (z_min,
            z_max, y_min, y_max, x_min, x_max), and ``probability``, its score (see ``Features.score``), NaN without
            a map. A score that the checkpoint has learnt needs the image, too: ``segment`` and ``infer_scan`` give it.

        Raises:
            InputError: Mask and probability differ in shape.
        """
        x, y, z = map(float, origin)
        geometry = Geometry(np.shape(mask), (x, y, z), tuple(map(float, spacing)))  # type: ignore[arg-type]
        return [n.to_dict() for n in extract_nodules(mask, geometry, probability, self.settings.grid_spacing)]

    def infer_dataset(self, data_dir: Folders = "data/LUNA16/processed", subset: Subset = "validation") -> pd.DataFrame:
        """Finds the nodules of processed scans and writes all files and pictures.

        Args:
            data_dir: Folder or folders that preprocess.py wrote.
            subset: 'validation', 'test', 'train' or 'all' scans of the split beside the checkpoint, or 'new' ones that
                training never saw.

        Scans that cannot be used stand in ``failed`` and failed_scans.csv, each with its reason.

        Returns:
            The table of ``inference_summary.csv``.

        Raises:
            FileExistsError: output_dir holds other results.
            InputError: The folder was prepared with other settings than the checkpoint's training data.
            RuntimeError: This inferencer has a live model instead of a checkpoint.
        """
        if self.preprocessing is None:
            raise RuntimeError("files are written for a checkpoint only; build NoduleInferencer from one")
        parts = choose_scans(data_dir, self.checkpoint_path, subset, self.seen)
        self.check_prepared_alike(data_dir, list(parts))
        source = resolve_folders(data_dir)
        sources = {uid: str(folder_of(data_dir, uid).resolve()) for uid in parts}
        do_once(lambda: self.folder.claim(source, subset, sources))
        finish = partial(self._finish, parts, sources)
        self.failed = {}
        results = map_scans(data_dir, list(parts), self._predict, finish, desc="inference", failed=self.failed)
        tell_noise([result.found for result in results])
        do_once(lambda: self.folder.write_tables(results, self.failed))
        return summary_table({result.seriesuid: result.row() for result in results})

    def _predict(self, scan: ProcessedScan) -> np.ndarray:
        """Probability (z, y, x) of a processed scan."""
        return self.predict_probability(scan.image)

    def _finish(
        self, parts: dict[str, str], sources: dict[str, str], scan: ProcessedScan, probability: np.ndarray
    ) -> ScanResult:
        """Nodules, files and picture of a processed scan."""
        assert self.preprocessing is not None
        uid, found = scan.seriesuid, self.segment(probability, scan.geometry, scan.image)
        lungs = scan.metadata.lung_note or f"by {scan.metadata.lung_source}"
        unlike = describe_unlike(scanning_of(scan.metadata.scan_geometry, scan.metadata.noise_hu), self.learnt)
        highest = float(probability.max())
        result = ScanResult(uid, parts[uid], sources[uid], found, highest, lungs, unlike, self.by_hand)
        image, annotated = np.asarray(scan.image, np.float32), scan.metadata.nodules
        figure = draw_overlay(image, scan.geometry, found.mask, found.nodules, scan.mask, uid, annotated=annotated)
        self.folder.write_scan(result, figure)
        if self.report:
            ct, note = ct_of(scan)
            own_lungs = None if note or not self.preprocessing.uses_lungs else lungs_by_threshold(ct)
            measured = MeasuredScan.of(ct, scan.geometry, found, own_lungs, scan.mask)
            write_measures(self.output_dir, uid, measured.measures)
            report_scan(self.output_dir, self.provenance, result, measured, [note] if note else [])
        else:
            delete_files(self.output_dir, [pattern.format(uid) for pattern in (*PAGE_FILES, *MEASURE_FILES)])
        return replace(result, found=found.without_voxels())

    def infer_scan(self, path: str | Path) -> list[dict[str, Any]]:
        """Finds the nodules of a raw scan, and writes files, picture and the mask in the scan's own grid.

        Args:
            path: A chest CT in HU, as ``read_scan`` takes it: .mhd, .mha, .nii, .nii.gz or .nrrd file, or a DICOM
                series.

        Returns:
            The nodules, as ``extract_nodule_candidates`` gives them, with the checkpoint's learnt score if it has one.

        Raises:
            FileExistsError: output_dir holds other results, or those of another scan of this name.
            InputError: The scan cannot be used.
            RuntimeError: This inferencer has a live model and so does not know how to prepare a scan.
        """
        scan = only_scan(path)
        return [nodule.to_dict() for nodule in self._infer_scan(raw_scan(scan, scan, names=False)).found.nodules]

    def infer_scans(self, paths: Iterable[str | Path], series: str | None = None, names: bool = False) -> pd.DataFrame:
        """Does as ``infer_scan`` with all scans at some paths; those that cannot be used stand in ``failed``.

        Args:
            paths: Scans, and folders and .zip archives of scans.
            series: SeriesInstanceUID of the one DICOM series to take; None takes all.
            names: Name the results of all scans by their files. A file that ``paths`` names is called by its own name
                in any case, and a DICOM series by its UID. Other scans of a folder, whose name may be a patient's, get
                a number.

        Returns:
            One row a nodule.

        Raises:
            FileExistsError: output_dir holds the results of another checkpoint, setting or data set.
            InputError: There is no such series.
            RuntimeError: This inferencer has a live model and so does not know how to prepare a scan.
        """
        scans, self.failed = self._name_scans(list(map(Path, paths)), series, names)
        self.folder.claim(None, None, {})  # a folder that cannot be used is told once, not for each scan
        tables = []
        for scan in scans:
            failures: dict[str, Exception] = {}
            with noting(failures, scan.name, scan.hide):
                tables.append(nodule_table(scan.name, self._infer_scan(scan).found.nodules))
            self.failed |= {name: scan.hide(reason_of(error)) for name, error in failures.items()}
        write_failures(self.output_dir, self.failed)
        self.folder.finish(wants_index=self.report is not False)
        check(bool(scans), "none of the inputs is a scan that can be read")
        found = [table for table in tables if len(table)]  # pandas wants no empty ones
        return pd.concat(found, ignore_index=True) if found else nodule_table("", [])

    def _name_scans(
        self, paths: Sequence[Path], series: str | None, names: bool
    ) -> tuple[list[RawScan], dict[str, str]]:
        """The scans at some paths with the names of their results, and why other paths have none."""
        found: list[RawScan] = []
        failed: dict[str, str] = {}
        for number, given in enumerate(paths, start=1):
            failures: dict[str, Exception] = {}
            whole = RawScan(given, f"input_{number}", "", None if names else given)
            # What is wrong with the only path is raised, and names it.
            with nullcontext() if len(paths) == 1 else noting(failures, whole.name, whole.hide):
                archives: dict[str, Exception] = {}
                own = self.output_dir.resolve()
                scans = list_scans(given, archives)
                listed = [scan for scan in scans if scan == given or own not in scan.resolve().parents]
                found += [raw_scan(scan, given, names) for scan in listed]
                for count, error in enumerate(archives.values(), start=1):
                    with noting(failures, f"{whole.name}_archive_{count}", whole.hide):
                        raise error
            failed |= {name: whole.hide(reason_of(error)) for name, error in failures.items()}
        if series is not None:
            uids = sorted({scan_name(scan.path) for scan in found if not scan.path.exists()})  # addresses of series
            found = [scan for scan in found if scan_name(scan.path) == series]
            check(bool(found), f"there is no series {series}, but {', '.join(uids) or 'no other one either'}")
        return self._number_scans(found), failed

    def _number_scans(self, scans: Sequence[RawScan]) -> list[RawScan]:
        """Gives each scan a name that no other has, and that of an earlier run to one that is done again."""
        path = self.output_dir / "inference.json"
        earlier = {source: name for name, source in (read_json(path)["scans"] if path.is_file() else {}).items()}
        taken = set(earlier.values())
        named: dict[str, RawScan] = {}
        for scan in {scan.source: scan for scan in scans}.values():  # a file that is named twice is one scan
            name = earlier.get(scan.source)
            if name is None and scan.name and scan.name not in taken:
                name = scan.name
            elif name is None:
                pattern, first = (f"{scan.name}_{{}}", 2) if scan.name else ("scan_{:03d}", 1)
                name = next(free for n in itertools.count(first) if (free := pattern.format(n)) not in taken)
            named[name] = replace(scan, name=name)
            taken.add(name)
        return list(named.values())

    def _infer_scan(self, raw: RawScan) -> ScanResult:
        """What ``infer_scan`` does."""
        if self.preprocessing is None:
            raise RuntimeError("a raw scan needs the preprocessing of a checkpoint; build NoduleInferencer from one")
        name, source = raw.name, raw.source
        with warnings_told() as doubts:
            scan = read_scan(raw.path)
            prepared = self.preprocessing.prepare(scan)
            is_piece = Geometry.from_image(scan).is_piece
            self._tell_prepared(name, prepared, is_piece)
        is_again = self.folder.claim(None, None, {name: source})
        part = self._part_of(raw)
        probability = self.predict_probability(prepared.array)
        found = self.segment(probability, prepared.grid, prepared.array)
        unlike = describe_unlike(scanning_of(Geometry.from_image(scan), measure_noise(scan)), self.learnt)
        if prepared.lung_source == "none" and self.preprocessing.uses_lungs and not is_piece:
            unlike = "; ".join(filter(None, [unlike, "no lungs were found"]))
        if unlike:
            logger.warning("%s is unlike the training scans: %s", name, unlike)
        lungs = prepared.lung_note or ("not found" if self.preprocessing.uses_lungs else "not looked for")
        told = (*self.by_hand, *(_as_sentence(raw.hide(doubt).removeprefix(f"{name}: ")) for doubt in doubts))
        result = ScanResult(name, part, source, found, float(probability.max()), lungs, unlike, told)
        # The CT itself, not what the network sees of it: a radiologist wants to see what lies around the lungs.
        ct = self.preprocessing.apply_hu_window(scan, prepared.grid).astype(np.float32)
        title = name + (f"\nlungs: {prepared.lung_note}" if prepared.lung_note else "")
        figure = draw_overlay(ct, prepared.grid, found.mask, found.nodules, title=title)
        ranks = prepared.grid.image(found.ranks)
        own_ranks = resample(ranks, Geometry.from_image(scan), linear=False, pixel_type=sitk.sitkUInt16)
        mark_lost_nodules(own_ranks, found.nodules)
        self.folder.write_scan(result, figure, own_ranks)
        measured = MeasuredScan.of(scan, prepared.grid, found, prepared.own_lungs)
        write_measures(self.output_dir, name, measured.measures)
        self._write_dicom(raw, own_ranks, measured.measures)
        if self.report is not False:
            report_scan(self.output_dir, self.provenance, result, measured)
        else:
            delete_files(self.output_dir, [pattern.format(name) for pattern in PAGE_FILES])
        self.folder.add(result, is_again)
        tell(f"{name}: {result}")
        return result

    def _write_dicom(self, raw: RawScan, own_ranks: sitk.Image, measures: Sequence[Measures]) -> None:
        """For a DICOM series, the nodules as DICOM objects beside the other files."""
        names = DICOM_FILES[0].format(raw.name), DICOM_FILES[1].format(raw.name)
        delete_files(self.output_dir, names)  # of an earlier run
        reader = scan_reader(raw.path)
        if not isinstance(reader, DicomReader):
            return
        if not measures:
            tell(f"{raw.name}: without a nodule there is no DICOM segmentation and no DICOM report")
            return
        if not has_highdicom():
            return
        segmentation, report = (self.output_dir / name for name in names)
        ranks, stack = sitk.GetArrayFromImage(own_ranks), reader.stack(raw.path)
        try:
            write_dicom_results(segmentation, report, stack, ranks, measures, self.provenance)
            tell(f"{raw.name}: the DICOM segmentation and report bear the patient's name and ID, as the series does")
        except InputError as error:
            logger.warning("%s: no DICOM segmentation and no DICOM report: %s", raw.name, raw.hide(str(error)))

    def _part_of(self, raw: RawScan) -> str:
        """What a raw scan was to the network; one that it has learnt from is warned of."""
        uid, patient = scan_name(raw.path), scan_reader(raw.path).patient(raw.path) or None
        part = parts_of({uid: patient}, self.checkpoint_path, self.seen)[uid]
        if part in LEARNT_FROM:
            logger.warning("%s was seen in training: what this network finds there says nothing of new scans", raw.name)
        return part

    def _tell_prepared(self, name: str, prepared: PreparedScan, is_piece: bool) -> None:
        """Says how the lungs were found and what grid the network sees."""
        assert self.preprocessing is not None
        if prepared.lung_source == "none" and self.preprocessing.mask_lungs and not is_piece:
            logger.warning("%s: no lungs were found, so that the whole scan is searched; is it a chest CT in HU?", name)
        if prepared.lung_source == "threshold" and self.lung_method != LUNG_METHOD:
            logger.warning(
                "%s: lungs are found by another version of this project than the one that prepared the training scans, "
                "so that results may differ; preprocess and train anew to be sure",
                name,
            )
        lungs = "no lungs used" if prepared.lung_source == "none" else f"lungs by {prepared.lung_source}"
        if is_piece:
            lungs += f": a piece of a scan, below {PIECE_MM} mm, is taken as it is"
        if prepared.lung_note:
            lungs += f": {prepared.lung_note}"
        size = " x ".join(map(str, prepared.grid.shape_zyx))
        step = " x ".join(f"{mm:.2g}" for mm in prepared.grid.spacing_zyx)
        tell(f"{name}: {lungs}; grid of {size} voxels of {step} mm (z, y, x)")

    def run(
        self,
        input: list[Path] | None = None,
        series: str | None = None,
        names: bool = False,
        data_dir: Folders | None = None,
        subset: Subset | None = None,
    ) -> pd.DataFrame:
        """What ``python infer.py`` does: raw scans, or the scans of a processed folder.

        Args:
            input: Raw scans outside the data set, which need not be preprocessed: .mhd, .mha, .nii, .nii.gz or .nrrd
                files, DICOM series, and folders or .zip archives of all these.
            series: SeriesInstanceUID of the one DICOM series of the input to take; null takes all.
            names: Name the results of an input folder's scans by their files, not by number: such names are often those
                of patients.
            data_dir: Folder or folders that preprocess.py wrote; null takes data/LUNA16/processed. Not with an input.
            subset: 'validation', 'test', 'train' or 'all' scans of the split beside the checkpoint, or 'new' ones that
                training never saw; null takes 'validation'. Not with an input.

        Returns:
            One row a nodule of the raw scans, or one row a scan of the folder.

        Raises:
            InputError: Data set and raw scans are mixed up, or the only scan cannot be used.
        """
        given = {name: value for name, value in (("data_dir", data_dir), ("subset", subset)) if value is not None}
        if input is None:
            check(series is None and not names, "series and names are for raw scans; name them with input")
            return self.infer_dataset(**given)  # type: ignore[arg-type]
        check(not given, f"leave out {' and '.join(given)} with input: it is for the scans of a data set")
        if process_rank():
            return pd.DataFrame()  # raw scans are the first process's work
        return self.infer_scans(input, series, names)

    def check_prepared_alike(self, data_dir: Folders, seriesuids: Sequence[str]) -> None:
        """Raises InputError when processed scans were prepared otherwise than the checkpoint's training data.

        Scans without readable metadata are passed over; they fail when they are read.
        """
        if self.preprocessing is None:
            return
        wanted = self.preprocessing.to_dict()
        for uid in seriesuids:
            try:
                found = Preprocessing.from_dict(read_metadata(data_dir, uid).preprocessing).to_dict()
            except (InputError, OSError, TypeError):
                continue
            differing = describe_difference(found, wanted)
            check(not differing, f"{uid} was preprocessed otherwise than the training data ({differing})")

    @property
    def provenance(self) -> dict[str, Any]:
        """Whose results these are: the checkpoint and all settings that decide what is found."""
        told = {"about": self.about} | _describe_extras(self.settings)
        return {
            "checkpoint": str(self.checkpoint_path),
            "checkpoint_sha256": self.checkpoint_sha256,
            "threshold": self.settings.threshold,
            "min_score": self.settings.min_score,
            "mirrors": self.settings.mirrors,
            "computed_in": str(self.predictor.autocast_dtype or torch.float32).removeprefix("torch."),
        } | {name: text for name, text in told.items() if text}


def _describe_by_hand(trained: InferenceSettings, used: InferenceSettings) -> tuple[str, ...]:
    """What is to be said of settings that were not chosen by the training."""
    names = {"threshold": "threshold", "min_score": "lowest score", "mirrors": "number of mirror images"}
    told = tuple(
        f"The {text} is {getattr(used, name):.3g}, set by hand; the training chose {getattr(trained, name):.3g}."
        for name, text in names.items()
        if getattr(used, name) != getattr(trained, name)
    )
    ours, theirs = _describe_extras(used), _describe_extras(trained)
    return told + tuple(
        f"Set by hand: {EXTRAS[name]}: {text or 'as by default'} (the checkpoint: {theirs[name] or 'as by default'})."
        for name, text in ours.items()
        if text != theirs[name]
    )


def _describe_extras(settings: InferenceSettings) -> dict[str, str]:
    """What of EXTRAS is done, in words; empty where it is not."""
    return {
        "cleaning": "" if settings.cleaning == Cleaning() else str(settings.cleaning),
        "scales": ", ".join(f"{scale:g}" for scale in settings.scales),
        "everywhere": "all windows" if settings.looks_everywhere else "",
        "learnt_score": str(settings.learnt_score or ""),
    }


def _as_sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


@contextmanager
def warnings_told() -> Iterator[list[str]]:
    """Gathers the warnings that are logged meanwhile."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger().removeHandler(handler)


def _override(settings: InferenceSettings, given: dict[str, Any]) -> InferenceSettings:
    """The settings with those that a user gave, not None; a learnt min_score holds at its own threshold only."""
    threshold = given["threshold"]
    if given["min_score"] is None and settings.min_score and threshold not in (None, settings.threshold):
        logger.warning(
            "the min_score of %.2f was learnt at a threshold of %g, not %g: all nodules stay in the mask; "
            "set min_score to leave out doubtful ones",
            settings.min_score,
            settings.threshold,
            threshold,
        )
        given = given | {"min_score": 0.0}
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def map_scans(
    data_dir: Folders,
    seriesuids: Sequence[str],
    compute: Callable[[ProcessedScan], Any],
    finish: Callable[[ProcessedScan, Any], Any],
    desc: str,
    leave: bool = True,
    finishers: int = 1,
    failed: dict[str, str] | None = None,
) -> list[Any]:
    """``finish(scan, compute(scan))`` of processed scans, in their order, in every process.

    The processes share the scans out. In each, the next scan is read and the last ones are finished in threads of their
    own, while the network computes; no more than ``finishers`` + 2 scans are in memory.

    Args:
        data_dir: Folder or folders that preprocess.py wrote.
        seriesuids: The scans.
        compute: What the network does.
        finish: What is left to do with its result.
        desc: Title of the progress bar.
        leave: Whether the bar stays.
        finishers: Threads that finish scans; Matplotlib, where it is used, wants to be in one.
        failed: Takes {series UID: reason} of the scans that cannot be used, in every process; they have no result.
            None raises what the first of them raised.
    """
    mine = seriesuids[process_rank() :: process_count()]
    failures: dict[str, Exception] = {}
    finished: list[tuple[str, Future]] = []
    results: dict[str, Any] = {}
    read = partial(read_processed, data_dir, in_memory=True)
    with (
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(finishers) as finisher,
        Progress(len(mine), desc, "scan", leave) as progress,
    ):
        reading = [reader.submit(read, uid) for uid in mine[:1]]
        for index, uid in enumerate(mine):
            next_scan = reading.pop()
            reading += [reader.submit(read, other) for other in mine[index + 1 : index + 2]]
            with noting(failures, uid):
                scan = next_scan.result()
                computed = compute(scan)
                if len(finished) >= finishers:  # so that no more scans are in memory
                    wait([finished[-finishers][1]])
                finished.append((uid, finisher.submit(finish, scan, computed)))
            if failures and failed is None:
                break
            progress.advance()
        for uid, future in finished:
            with noting(failures, uid):
                results[uid] = future.result()
    for theirs, their_failures in gather_objects((results, failures)):
        results |= theirs
        failures |= their_failures
    for uid, error in failures.items():
        if failed is None:
            raise error
        failed[uid] = reason_of(error)
    return [results[uid] for uid in seriesuids if uid in results]


def tell_noise(found: Sequence[Segmentation]) -> None:
    """Says for how many scans the network's map is mostly noise."""
    if noisy := sum(scan.is_noise for scan in found):
        tell(
            f"the maps of {noisy} of {len(found)} scans are mostly noise (more than {MOST_COMPONENTS} spots, or more "
            "than a litre marked): the network has not learnt yet, or does not suit the data"
        )


def report_failures(failed: dict[str, str], output_dir: Path) -> int:
    """Prints how many scans could not be used, and returns the exit status."""
    if failed:
        print(
            f"{len(failed)} scan{'s' * (len(failed) > 1)} could not be used: {output_dir / 'failed_scans.csv'} says why"
        )
    return 1 if failed else 0


def _command(argv: list[str] | None) -> int:
    (options, run_options), _ = parse_command_line(NoduleInferencer, "run", argv=argv, skip=["model", "settings"])
    inferencer = NoduleInferencer(**options)
    found = inferencer.run(**run_options)
    if process_rank():
        return 0
    if run_options["input"] is None:
        print(format_scans(found))
    elif len(found) or not inferencer.failed:
        print(format_nodules(found))
    print(f"files and pictures: {inferencer.output_dir}")
    return report_failures(inferencer.failed, inferencer.output_dir)


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are NoduleInferencer's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
