"""Probability maps, nodules, files and pictures, from processed arrays or raw scans.

python infer.py
python infer.py --input scan.mhd --output_dir results
"""

from __future__ import annotations

import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import SimpleITK as sitk
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from torch import Tensor, nn
from torch.nn import functional

from model import SegmentationNetwork, build_network, load_checkpoint, place
from preprocess import PreparedScan, Preprocessing
from utils import (
    CANDIDATE_COLUMNS,
    Box,
    Geometry,
    InputError,
    ProcessedScan,
    Progress,
    Shape,
    UserError,
    Vector,
    append_csv,
    atomic_path,
    autocast_dtype,
    check,
    delete_files,
    do_once,
    folder_lock,
    free_memory,
    gather_objects,
    join_processes,
    noting,
    now,
    parse_command_line,
    process_count,
    process_rank,
    read_json,
    read_metadata,
    read_processed,
    read_processed_list,
    read_scan,
    read_split,
    reason_of,
    resample,
    run_main,
    scan_name,
    select_device,
    signed_distance,
    tell,
    write_array,
    write_csv,
    write_image,
    write_json,
    write_objects,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Subset = Literal["validation", "test", "train", "all", "new"]
THRESHOLD = 0.5  # probability from which a voxel counts as nodule; training chooses min_score with it
WINDOW_OVERLAP = 0.25  # of the window; 0.5 costs 2.7 times the windows
WINDOW_BATCH = 4
SCAN_BYTES = 64  # a voxel: image, logits, sums of windows and of further looks, and the loss of a validation
MEMORY_SHARE = 0.5  # of the GPU's free memory that these may take; the rest is for the windows
PROBABILITY_EPS = 1e-7  # keeps the logit of a mean probability finite
# Axes (z, y, x) that an image is flipped along for another look at it.
MIRRORS = ((), (2,), (1,), (0,), (1, 2), (0, 1), (0, 2), (0, 1, 2))
OUTSIDE_LOGIT = -20.0  # where no network looked: a probability of 2e-9
# Files of a run in output_dir, and of each scan.
RUN_FILES = (
    "inference_summary.npy",
    "inference_summary.json",
    "inference_summary.csv",
    "candidates.csv",
    "failed_scans.csv",
    "inference.json",
)
SCAN_FILES = (
    "predicted_masks/{}.npy",
    "predicted_masks/{}.nii.gz",
    "visualizations/{}.png",
    "{}_nodules.npy",
    "{}_nodules.json",
    "{}_nodules.csv",
)
SUMMARY_SHARE = 0.05  # a summary is written anew when so many of its scans are new
CANDIDATE_THRESHOLD = 0.1  # a spot that reaches it is a candidate
MAX_CANDIDATES = 100  # a scan, LUNA16's limit
LOOK_SIGMA = 0.25  # of the window, how far from its middle another look counts
SURROUNDINGS_MM = 3.0  # that a candidate is scored with
SURELY_BACKGROUND = 0.02  # probabilities up to this say nothing of how a candidate fades out
NECK_MM = 1.0  # a component is split where it is thinner by this than on both sides
SMALLEST_SPLIT = 30  # voxels
SMALLEST_NODULE_MM3 = 4.2  # a sphere of 2 mm, as LUNA16's nodules have 3 mm or more; nothing smaller stays in a mask
GRID_SLACK = 0.3  # of a voxel's squared edge, by which the grid may change how long a ball looks along it
ROUND = 0.92  # what is as round as this is one nodule
MOST_SPARSE_VOXELS = 2_000_000  # with more the array is labelled as a whole
LARGEST_NODULE_MM3 = 113_000  # a sphere of 60 mm; nothing larger is a nodule, and splitting it would take long
MOST_COMPONENTS = 1000  # that are looked at in a map; one that has more is noise
NOISE_MM3 = 1_000_000  # a map that marks more than a litre is noise, too
MOST_MEASURED = 1_000_000  # voxels of a component that its centre and shape are computed from
MAX_LISTED = 40  # scans on the console
SHORT_NAME = 34  # letters of a name on the console
REMEDY = "; name another output_dir, or replace them with overwrite=True (--overwrite true)"
MAX_PICTURED = 6  # rows drawn for a scan
VIEW_SHARE = 0.7  # of half the width of a view: what lies nearer to its middle is surely seen in it
LABEL_BOX = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.5}
TRUTH_COLOR, PREDICTION_COLOR = "#35d0ff", "#ff9f1c"


# ------------------------------------------------------------------------------------------------------- inferencer


@dataclass(frozen=True)
class ScanResult:
    """What was found in one scan.

    Args:
        seriesuid: Name of the scan.
        part: 'train', 'validation', 'test', 'new' or 'unknown'.
        source: File or folder that the scan was read from.
        found: All that was found.
        highest_probability: Of any voxel.
    """

    seriesuid: str
    part: str
    source: str
    found: Segmentation
    highest_probability: float

    def row(self) -> dict[str, Any]:
        """What the summary says of the scan."""
        nodules = self.found.nodules
        return {
            "part": self.part,
            "source": self.source,
            "nodules": nodules,
            "largest_diameter_mm": max((n["diameter_mm"] for n in nodules), default=None),
            "highest_score": max((n["probability"] for n in nodules), default=None),
            "nodule_volume_mm3": sum(n["volume_mm3"] for n in nodules),
            "faint_marks": len(self.found.candidates) - len(nodules),
            "highest_voxel_probability": self.highest_probability,
        }

    def __str__(self) -> str:
        """One line that tells a clean scan from a network that marks nothing, or everything."""
        nodules, marks = self.found.nodules, self.found.candidates
        kept = f"{len(nodules)} nodule{'s' * (len(nodules) != 1)}" if nodules else "no nodule found"
        faint = [mark["probability"] for mark in marks if mark not in nodules]
        if self.found.is_noise:
            return f"{kept}, but the map is mostly noise: the network has not learnt, or does not suit this scan"
        if not marks:
            return f"{kept}; no faint mark either: the highest probability of a voxel is {self.highest_probability:.2g}"
        more = f"; {len(faint)} fainter marks with scores up to {max(faint):.2f} in candidates.csv" if faint else ""
        return kept + (f", the highest score is {nodules[0]['probability']:.2f}" if nodules else "") + more


class NoduleInferencer:
    """Finds nodules in processed arrays and in raw scans.

    Args:
        checkpoint_path: Checkpoint of train.py; it carries the network and the preprocessing.
        output_dir: Where files and pictures go, whichever checkpoint is named.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
        threshold: Probability from which a voxel counts as nodule.
        min_score: Score from which a nodule stays in the mask, 0 to 1; null takes the one that the training chose on
            its validation scans at a threshold of 0.5, and 0 (all stay) for another threshold or a live network.
        mirrors: Mirror images, 0 to 7, whose probabilities are averaged with those of the scan itself; a network
            trained on patches looks again only at what may be a nodule. null takes the number that the training chose
            min_score with, and 0 for a live network.
        mixed_precision: Compute in half precision where the hardware gains by it.
        overwrite: Replace the results of another checkpoint, data set or setting in output_dir.
        model: A live network instead of a checkpoint.
        window: Shape (z, y, x) of the sliding window of a live network; None takes each scan whole. A checkpoint knows
            its own.
        grid_spacing: Voxel size (x, y, z) in mm by which size and shape of a live network's nodules are judged; None
            takes that of each scan, and lets nodules be as small as a voxel. A checkpoint knows its own, the median of
            its training scans.

    Raises:
        FileNotFoundError: There is no checkpoint.
        InputError: The checkpoint is damaged, or a value is out of its range.
    """

    def __init__(
        self,
        checkpoint_path: str | Path = "experiments/luna16_unet/checkpoints/best_model.pth",
        output_dir: str | Path = "experiments/luna16_unet/inference",
        device: str = "cuda",
        threshold: float = THRESHOLD,
        min_score: float | None = None,
        mirrors: int | None = None,
        mixed_precision: bool = True,
        overwrite: bool = False,
        model: nn.Module | None = None,
        window: Shape | None = None,
        grid_spacing: Vector | None = None,
    ) -> None:
        check(0 < threshold < 1, f"threshold must be between 0 and 1, not {threshold}")
        check(min_score is None or 0 <= min_score <= 1, f"min_score must be 0 to 1 or null, not {min_score}")
        check(mirrors is None or mirrors in range(len(MIRRORS)), f"mirrors must be 0 to 7 or null, not {mirrors}")
        self.checkpoint_path = Path(checkpoint_path)
        self.output_dir = Path(output_dir)
        self.threshold = threshold
        self.overwrite = overwrite
        self.preprocessing: Preprocessing | None = None
        self.checkpoint_sha256 = ""
        self.failed: dict[str, str] = {}  # {series UID: reason} of the last run
        self._new_scans: dict[str, dict[str, Any]] = {}  # raw ones that are not in the summary yet
        self._num_summarized = 0
        if model is None:
            checkpoint = load_checkpoint(self.checkpoint_path)
            self.checkpoint_sha256 = checkpoint["sha256"]
            self.preprocessing = Preprocessing.from_dict(checkpoint["preprocessing"])
            patch_size = checkpoint["training"]["patches.size"]
            window = tuple(patch_size) if patch_size else None
            grid_spacing = tuple(checkpoint["grid_spacing"])
            mirrors = checkpoint["training"]["validation.mirrors"] if mirrors is None else mirrors
            if min_score is None:
                min_score = self._learnt_score(checkpoint["min_score"])
        self.asked_device = device
        self.device = join_processes(select_device(device, warn=False))
        self.autocast_dtype = autocast_dtype(self.device, mixed_precision)
        self.min_score = min_score or 0.0
        self.mirrors = mirrors or 0
        self.model = model or place(build_network(checkpoint), self.device)
        self.window = window
        self.grid_spacing = grid_spacing
        weakref.finalize(self, _add_to_summary, self.output_dir, self.origin, self._new_scans)

    def _learnt_score(self, min_score: float) -> float:
        """The min_score of a checkpoint, which holds at the threshold that it was chosen with."""
        if min_score and self.threshold != THRESHOLD:
            logger.warning(
                "the min_score of %.2f was learnt at a threshold of %g, not %g: all nodules stay in the mask; "
                "set min_score to leave out doubtful ones",
                min_score,
                THRESHOLD,
                self.threshold,
            )
            return 0.0
        return min_score

    # ---- arrays

    def logits(self, image: Tensor, box: Box | None = None) -> Tensor:
        """The tensor tier: float32 logits (B, 1, Z, Y, X) of images (B, 1, Z, Y, X) in [0, 1], of any size.

        A network trained on patches slides over the image, or over ``box`` alone (half-open, z, y, x); the logits
        outside of it are OUTSIDE_LOGIT. The windows go to the device one batch at a time; the logits come to lie where
        the image does. With ``mirrors`` it looks again at what may be a nodule. The network's training mode is left as
        it was.
        """
        with evaluation_mode(self.model), torch.inference_mode():
            if self.window is None:
                return self._forward(image, self.mirrors)
            lower, upper = box or ((0, 0, 0), image.shape[2:])
            inside: Any = (..., *(slice(a, b) for a, b in zip(lower, upper, strict=True)))
            logits = torch.full_like(image, OUTSIDE_LOGIT, dtype=torch.float32)
            logits[inside] = sliding_window_inference(  # type: ignore[assignment]
                image[inside].float(),
                self.window,
                WINDOW_BATCH,
                self._forward,
                overlap=WINDOW_OVERLAP,
                mode="gaussian",
                sw_device=self.device,
                device=image.device,
            )
            if self.mirrors:
                for one, its_logits in zip(image[inside], logits[inside], strict=True):
                    self._refine_spots(one[None], its_logits[0])
            return logits

    def _refine_spots(self, image: Tensor, logits: Tensor) -> None:
        """Predicts possible nodules again, in the middle of a window and flipped, and averages all predictions.

        Args:
            image: (1, 1, Z, Y, X).
            logits: (Z, Y, X) of the first prediction, changed in place. Further ones count less towards the edges of
                their window.
        """
        assert self.window is not None
        size = np.minimum(self.window, logits.shape)
        weight = (1 + self.mirrors) * compute_importance_map(tuple(size), "gaussian", LOOK_SIGMA, logits.device)
        total, weights = logits.sigmoid(), torch.ones_like(logits)
        voxel_mm3 = math.prod(self.grid_spacing or (0.0,))
        for middle in _middles_of_spots(total.cpu().numpy(), size // 2, voxel_mm3):
            lower = np.clip(middle - size // 2, 0, logits.shape - size)
            crop = tuple(slice(a, a + n) for a, n in zip(lower, size, strict=True))
            again = self._forward(image[:, :, *crop], self.mirrors)[0, 0].to(logits.device)
            total[crop] += weight * again.sigmoid()
            weights[crop] += weight
        looked = weights > 1
        logits[looked] = torch.logit(total[looked] / weights[looked], eps=PROBABILITY_EPS)

    def _forward(self, image: Tensor, mirrors: int = 0) -> Tensor:
        """Logits of one batch, padded with air to a size that the network takes and cropped again.

        With ``mirrors``, returns the logit of the probability averaged over the image and its first so many flips.
        """
        divisor = self.model.divisor if isinstance(self.model, SegmentationNetwork) else 1
        shape = image.shape[2:]
        padding = [n for size in reversed(shape) for n in (0, -size % divisor)]
        image = functional.pad(image.to(self.device).float(), padding)
        logits = self._forward_flipped(image, ())
        if mirrors:
            total = logits.sigmoid()
            for axes in MIRRORS[1 : 1 + mirrors]:
                total += self._forward_flipped(image, axes).sigmoid()
            logits = torch.logit(total / (1 + mirrors), eps=PROBABILITY_EPS)
        return logits[..., : shape[0], : shape[1], : shape[2]]

    def _forward_flipped(self, image: Tensor, axes: Sequence[int]) -> Tensor:
        """float32 logits of images flipped along axes (z, y, x), flipped back."""
        dims = [axis + 2 for axis in axes]
        try:
            with self._autocast():
                logits = self.model(image.flip(dims) if dims else image)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"CUDA is out of memory for {' x '.join(map(str, image.shape[2:]))} voxels at a time; free the GPU of "
                "other programs, or set device='cpu' (--device cpu)"
            ) from error
        return logits.float().flip(dims) if dims else logits.float()

    def _autocast(self) -> torch.autocast:
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

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
            box: Half-open box (z, y, x) outside of which a network trained on patches need not look; None takes the
                box around all that is not air, and for a live network the whole array.
        """
        if box is None and self.preprocessing is not None:
            box = content_box(np.asarray(image))
        return torch.sigmoid(self.logits(self.to_tensor(image), box))[0, 0].cpu().numpy()

    def predict(self, image: npt.ArrayLike) -> np.ndarray:
        """Nodule mask, uint8 (z, y, x), of a processed array (z, y, x) of any float type in [0, 1].

        It is the mask that ``infer_dataset`` writes for the same array: what stays in it depends on the array and the
        checkpoint alone.
        """
        image = np.asarray(image)
        geometry = Geometry(image.shape, (0.0, 0.0, 0.0), self.grid_spacing or (1.0, 1.0, 1.0))
        return self.segment(self.predict_probability(image), geometry).mask

    def find_candidates(self, probability: np.ndarray, geometry: Geometry) -> Segmentation:
        """All that might be a nodule in a probability map, float (z, y, x), judged by this network's grid.

        With a live network of unknown grid a nodule may be as small as a voxel.
        """
        smallest_mm3 = SMALLEST_NODULE_MM3 if self.grid_spacing else 0.0
        return find_candidates(probability, geometry, self.threshold, self.grid_spacing, smallest_mm3)

    def segment(self, probability: np.ndarray, geometry: Geometry) -> Segmentation:
        """Mask, nodules and candidates of a probability map, float (z, y, x)."""
        return self.find_candidates(probability, geometry).keep(self.min_score)

    def extract_nodule_candidates(
        self,
        mask: np.ndarray,
        origin: Sequence[float],
        spacing: Sequence[float],
        probability: np.ndarray | None = None,
    ) -> list[dict[str, Any]]:
        """Nodules of a mask; see ``extract_nodules``. They are scored as those of this network's tables are."""
        x, y, z = map(float, origin)
        geometry = Geometry(np.shape(mask), (x, y, z), tuple(map(float, spacing)))  # type: ignore[arg-type]
        return extract_nodules(mask, geometry, probability, self.grid_spacing)

    # ---- scans and folders

    def infer_dataset(
        self, data_dir: str | Path = "data/LUNA16/processed", subset: Subset = "validation"
    ) -> pd.DataFrame:
        """Finds the nodules of processed scans and writes all files and pictures.

        Args:
            data_dir: Folder that preprocess.py wrote.
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
        parts = choose_scans(data_dir, self.checkpoint_path, subset)
        self.check_prepared_alike(data_dir, list(parts))
        source = str(Path(data_dir).resolve())
        do_once(lambda: self._claim_output(source, subset, dict.fromkeys(parts, source)))
        finish = partial(self._finish, parts, source)
        self.failed = {}
        results = map_scans(data_dir, list(parts), self._predict, finish, desc="inference", failed=self.failed)
        tell_noise([result.found for result in results])
        do_once(lambda: self._write_results(results))
        return summary_table({result.seriesuid: result.row() for result in results})

    def _write_results(self, results: Sequence[ScanResult]) -> None:
        """The tables of a data set."""
        write_failures(self.output_dir, self.failed)
        marks = [result.found.marks(result.seriesuid) for result in results] or [Segmentation.nothing().marks("")]
        write_csv(self.output_dir / "candidates.csv", pd.concat(marks))
        write_summary(self.output_dir, self.origin, {result.seriesuid: result.row() for result in results})

    def _predict(self, scan: ProcessedScan) -> np.ndarray:
        """Probability (z, y, x) of a processed scan."""
        return self.predict_probability(scan.image, content_box(scan.image))

    def _finish(self, parts: dict[str, str], source: str, scan: ProcessedScan, probability: np.ndarray) -> ScanResult:
        """Nodules, files and picture of a processed scan."""
        uid, found = scan.seriesuid, self.segment(probability, scan.geometry)
        result = ScanResult(uid, parts[uid], source, found, float(probability.max()))
        image, annotated = np.asarray(scan.image, np.float32), scan.metadata["nodules"]
        figure = draw_overlay(image, scan.geometry, found.mask, found.nodules, scan.mask, uid, annotated=annotated)
        self._write_scan(result, figure)
        return result

    def infer_scan(self, path: str | Path) -> list[dict[str, Any]]:
        """Finds the nodules of a raw scan, and writes files, picture and the mask in the scan's own grid.

        Args:
            path: .mhd, .mha, .nii, .nii.gz or .nrrd file of a chest CT in HU.

        Returns:
            The nodules, as ``extract_nodules`` gives them.

        Raises:
            FileExistsError: output_dir holds other results, or those of another scan of this name.
            InputError: The scan cannot be used.
            RuntimeError: This inferencer has a live model and so does not know how to prepare a scan.
        """
        if self.preprocessing is None:
            raise RuntimeError("a raw scan needs the preprocessing of a checkpoint; build NoduleInferencer from one")
        name, source = scan_name(path), str(Path(path).resolve())
        scan = read_scan(path)
        is_again = self._claim_output(None, None, {name: source})
        part = self._part_of(name)
        prepared = self.preprocessing.prepare(scan)
        self._tell_prepared(path, prepared)
        probability = self.predict_probability(prepared.array)
        found = self.segment(probability, prepared.grid)
        result = ScanResult(name, part, source, found, float(probability.max()))
        # The CT itself, not what the network sees of it: a radiologist wants to see what lies around the lungs.
        ct = self.preprocessing.window(scan, prepared.grid).astype(np.float32)
        self._write_scan(result, draw_overlay(ct, prepared.grid, found.mask, found.nodules, title=name))
        own_mask = resample(
            prepared.grid.image(found.mask), Geometry.from_image(scan), linear=False, pixel_type=sitk.sitkUInt8
        )
        write_image(self.output_dir / "predicted_masks" / f"{name}.nii.gz", own_mask)
        self._add_result(result, is_again)
        tell(f"{name}: {result}")
        return found.nodules

    def _part_of(self, name: str) -> str:
        """Part of the split that a raw scan of this name belongs to; a training scan is warned of."""
        path = self.checkpoint_path.parent / "split.json"
        split = read_split(path) if path.is_file() else {}
        part = next((part for part in ("train", "validation", "test") if name in split.get(part, [])), "new")
        if part == "train":
            logger.warning("%s is a training scan of this network: what it finds there says nothing of new scans", name)
        return part

    def _tell_prepared(self, path: str | Path, prepared: PreparedScan) -> None:
        """Says how the lungs were found and what grid the network sees."""
        if prepared.lung_source == "none" and self.preprocessing is not None and self.preprocessing.mask_lungs:
            logger.warning("%s: no lungs were found, so that the whole scan is searched; is it a chest CT in HU?", path)
        lungs = {"none": "no lungs used", "threshold": "lungs by threshold"}.get(prepared.lung_source, "lungs by mask")
        if prepared.lungs is not None:
            litres = np.count_nonzero(prepared.lungs) * prepared.grid.voxel_volume_mm3 / 1e6
            lungs += f" ({litres:.1f} litres with their margin)"
        size = " x ".join(map(str, prepared.grid.shape_zyx))
        step = " x ".join(f"{mm:.2g}" for mm in prepared.grid.spacing_zyx)
        tell(f"{Path(path).name}: {lungs}; grid of {size} voxels of {step} mm (z, y, x)")

    def run(
        self, input: Path | None = None, data_dir: str | Path | None = None, subset: Subset | None = None
    ) -> pd.DataFrame:
        """What ``python infer.py`` does: one raw scan, or the scans of a processed folder.

        Args:
            input: Raw scan (.mhd, .mha, .nii, .nii.gz, .nrrd) outside the data set; it need not be preprocessed.
            data_dir: Folder that preprocess.py wrote; null takes data/LUNA16/processed. Not with an input.
            subset: 'validation', 'test', 'train' or 'all' scans of the split beside the checkpoint, or 'new' ones that
                training never saw; null takes 'validation'. Not with an input.

        Returns:
            One row a nodule of the raw scan, or one row a scan of the folder.

        Raises:
            InputError: Data set and raw scan are mixed up.
        """
        given = {name: value for name, value in (("data_dir", data_dir), ("subset", subset)) if value is not None}
        if input is None:
            return self.infer_dataset(**given)  # type: ignore[arg-type]
        check(not given, f"leave out {' and '.join(given)} with input: it is for the scans of a data set")
        if process_rank():
            return pd.DataFrame()  # one scan is the first process's work
        return nodule_table(scan_name(input), self.infer_scan(input))

    def check_prepared_alike(self, data_dir: str | Path, seriesuids: Sequence[str]) -> None:
        """Raises InputError when processed scans were prepared otherwise than the checkpoint's training data.

        Scans without readable metadata are passed over; they fail when they are read.
        """
        if self.preprocessing is None:
            return
        wanted = self.preprocessing.to_dict()
        for uid in seriesuids:
            try:
                found = Preprocessing.from_dict(read_metadata(data_dir, uid)["preprocessing"]).to_dict()
            except (InputError, OSError, LookupError, TypeError):
                continue
            differing = ", ".join(f"{k}: {v} instead of {wanted[k]}" for k, v in found.items() if v != wanted[k])
            check(not differing, f"{uid} was preprocessed otherwise than the training data ({differing})")

    # ---- files

    @property
    def origin(self) -> dict[str, Any]:
        """Whose results these are: the checkpoint and all settings that decide what is found."""
        return {
            "checkpoint": str(self.checkpoint_path),
            "checkpoint_sha256": self.checkpoint_sha256,
            "threshold": self.threshold,
            "min_score": self.min_score,
            "mirrors": self.mirrors,
            "computed_in": str(self.autocast_dtype or torch.float32).removeprefix("torch."),
        }

    def _claim_output(self, data_dir: str | None, subset: str | None, scans: dict[str, str]) -> bool:
        """Notes in output_dir whose results it holds, so that those of two checkpoints or data sets never mix.

        Args:
            data_dir: Folder of the processed scans; None for raw scans.
            subset: Their subset; None for raw scans.
            scans: {name: path} of the scans; a raw one must not replace another of its name.

        Returns:
            Whether a result of one of them is there.
        """
        path, ours = self.output_dir / "inference.json", self.origin | {"data_dir": data_dir, "subset": subset}
        with folder_lock(self.output_dir):
            mismatch = claim(path, ours, self.overwrite)
            theirs = read_json(path) if path.is_file() and not mismatch else {}
            known: dict[str, str] = theirs.get("scans", {})
            others = [f"another {name}, {known[name]}" for name in scans if known.get(name, scans[name]) != scans[name]]
            if others and not self.overwrite:
                raise FileExistsError(f"{self.output_dir} holds results of {others[0]}{REMEDY}")
            if mismatch:
                delete_results(self.output_dir)
            write_json(path, ours | {"date": now(), "scans": known | scans})
            return any(name in known for name in scans)

    def _add_result(self, result: ScanResult, is_again: bool) -> None:
        """Adds a raw scan to the tables of output_dir.

        Rows are appended, and the summary's .json and .npy, which must be whole, are written anew when enough scans are
        new, so that the hundredth scan costs what the first one costs; what is missing then is written when the
        inferencer goes.
        """
        uid = result.seriesuid
        self._new_scans[uid] = result.row()
        rows, marks = summary_table({uid: self._new_scans[uid]}), result.found.marks(uid)
        with folder_lock(self.output_dir):
            for name, table in (("inference_summary.csv", rows), ("candidates.csv", marks)):
                path = self.output_dir / name
                if is_again and path.is_file():
                    old = pd.read_csv(path, dtype={"seriesuid": str})
                    write_csv(path, pd.concat([old[old["seriesuid"] != uid], table]))
                elif path.is_file():
                    append_csv(path, table)
                else:
                    write_csv(path, table)
        if is_again or len(self._new_scans) >= SUMMARY_SHARE * self._num_summarized:
            self.write_summary()

    def write_summary(self) -> None:
        """Brings inference_summary.json and .npy up to date with the raw scans of this inferencer."""
        self._num_summarized = _add_to_summary(self.output_dir, self.origin, self._new_scans)

    def _write_scan(self, result: ScanResult, figure: Figure) -> None:
        """Mask, nodules and picture of one scan."""
        uid, nodules = result.seriesuid, result.found.nodules
        write_array(self.output_dir / "predicted_masks" / f"{uid}.npy", result.found.mask)
        write_objects(self.output_dir / f"{uid}_nodules.npy", nodules)
        write_csv(self.output_dir / f"{uid}_nodules.csv", nodule_table(uid, nodules))
        with atomic_path(self.output_dir / "visualizations" / f"{uid}.png") as temporary:
            figure.savefig(temporary)


def summary_table(scans: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Rows of the summary as a table: the number of nodules instead of the nodules."""
    return pd.DataFrame([{"seriesuid": uid} | scan | {"nodules": len(scan["nodules"])} for uid, scan in scans.items()])


def write_summary(output_dir: Path, origin: dict[str, Any], scans: dict[str, dict[str, Any]]) -> None:
    """Writes inference_summary.npy, .json and .csv."""
    path = output_dir / "inference_summary.npy"
    write_objects(path, origin | {"date": now(), "scans": scans})
    write_csv(path.with_suffix(".csv"), summary_table(scans))


def _add_to_summary(output_dir: Path, origin: dict[str, Any], new: dict[str, dict[str, Any]]) -> int:
    """Moves rows into the summary, beside those of other processes; returns how many scans it has then."""
    if not new:
        return 0
    with folder_lock(output_dir):
        path = output_dir / "inference_summary.json"
        scans = (read_json(path)["scans"] if path.is_file() else {}) | new
        new.clear()
        # The table may hold rows of other processes that are not in their summary yet, so it stays as it is.
        write_objects(path.with_suffix(".npy"), origin | {"date": now(), "scans": scans})
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
    differing = [name for name in ours if name != "checkpoint" and theirs.get(name) != ours[name]]
    if not differing:
        return ""
    min_score, folder = theirs.get("min_score"), theirs.get("data_dir")
    of = f"of {theirs.get('checkpoint')} at threshold {theirs.get('threshold')}, min_score "
    of += f"{min_score if min_score is None else round(min_score, 4)} and {theirs.get('mirrors')} mirrors"
    if {"data_dir", "subset", "fold"} & set(differing):
        of += f", of the {theirs.get('subset')} scans of {folder}" if folder else ", of single scans"
    if theirs.get("checkpoint") == ours.get("checkpoint") and "checkpoint_sha256" in differing:
        of += ", which has changed since"
    names = ", ".join(name.removesuffix("_sha256") for name in differing)
    return f"{output_dir} holds results {of} (what differs: {names}){REMEDY}"


def report_failures(failed: dict[str, str], output_dir: Path) -> int:
    """Prints how many scans could not be used, and returns the exit status."""
    if failed:
        print(f"{len(failed)} scans could not be used: {output_dir / 'failed_scans.csv'} says why")
    return 1 if failed else 0


def write_failures(output_dir: Path, failed: dict[str, str]) -> None:
    """Writes failed_scans.csv, or deletes that of an earlier run where nothing failed."""
    path = output_dir / "failed_scans.csv"
    if failed:
        write_csv(path, pd.DataFrame(sorted(failed.items()), columns=["seriesuid", "reason"]))
    else:
        path.unlink(missing_ok=True)


def tell_noise(found: Sequence[Segmentation]) -> None:
    """Says for how many scans the network's map is mostly noise."""
    if noisy := sum(scan.is_noise for scan in found):
        tell(
            f"the maps of {noisy} of {len(found)} scans are mostly noise (more than {MOST_COMPONENTS} spots, or more "
            "than a litre marked): the network has not learnt yet, or does not suit the data"
        )


def map_scans(
    data_dir: str | Path,
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
        data_dir: Folder that preprocess.py wrote.
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
                if len(finished) >= finishers:
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
    """Half-open box (z, y, x) around all voxels of a processed array that are not air; None where there are none.

    Preprocessing sets everything outside the lungs to air, so that it is the box of the lungs.
    """
    filled = np.asarray(image) > 0
    spans = [np.flatnonzero(filled.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    if not len(spans[0]):
        return None
    lower, upper = [int(span[0]) for span in spans], [int(span[-1]) + 1 for span in spans]
    return tuple(lower), tuple(upper)  # type: ignore[return-value]


def choose_scans(data_dir: str | Path, checkpoint_path: Path, subset: Subset) -> dict[str, str]:
    """{series UID: part of the split} of the processed scans of a subset.

    'new' are scans of no part; without a split file 'all' of them are 'unknown'.

    Raises:
        FileNotFoundError: The split file is not beside the checkpoint.
        ValueError: There is no such scan.
    """
    check(subset in get_args(Subset), f"subset must be one of {', '.join(get_args(Subset))}, not {subset!r}")
    path = checkpoint_path.parent / "split.json"
    known = path.is_file() or subset != "all"
    split = read_split(path) if known else {}
    part_of = {uid: part for part in ("train", "validation", "test") for uid in split.get(part, [])}
    parts = {uid: part_of.get(uid, "new" if known else "unknown") for uid in read_processed_list(data_dir)}
    chosen = {uid: part for uid, part in parts.items() if subset in ("all", part)}
    check(
        bool(chosen) or subset != "new", f"all scans of {data_dir} stand in {path}: none is new; name another data_dir"
    )
    check(bool(chosen), f"{data_dir} has none of the {subset} scans of {path}; name another data_dir or subset")
    return chosen


# ---------------------------------------------------------------------------------------------------------- nodules


@dataclass(frozen=True)
class Segmentation:
    """What was found in a probability map, before or after ``keep``.

    Args:
        labels: int32 (z, y, x); every nodule of the mask has a number from 1, 0 is background.
        candidates: Nodule dicts, as ``extract_nodules`` gives them, of all that might be a nodule: those of the mask,
            and where these are fewer than MAX_CANDIDATES, the likeliest fainter spots.
        numbers: Label of each candidate in ``labels``; 0 for a candidate that is not in the mask.
        is_noise: Whether the map marks more spots or more volume than any scan can hold nodules.
    """

    labels: np.ndarray
    candidates: list[dict[str, Any]]
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
        scores[self.numbers] = [found["probability"] for found in self.candidates]
        scores[0] = -1.0
        return scores

    def keep(self, min_score: float) -> Segmentation:
        """The same with only those nodules in the mask whose score reaches ``min_score``."""
        kept = self.scores >= min_score
        numbers = [number if kept[number] else 0 for number in self.numbers]
        return replace(self, labels=np.where(kept[self.labels], self.labels, 0), numbers=numbers)

    @property
    def mask(self) -> np.ndarray:
        """uint8 (z, y, x), 1 = nodule."""
        return (self.labels > 0).astype(np.uint8)

    @property
    def nodules(self) -> list[dict[str, Any]]:
        """The candidates in the mask, the likeliest first."""
        return [found for found, number in zip(self.candidates, self.numbers, strict=True) if number]

    def marks(self, uid: str) -> pd.DataFrame:
        """The likeliest MAX_CANDIDATES candidates in LUNA16's submission format."""
        likeliest = sorted(self.candidates, key=lambda found: -found["probability"])[:MAX_CANDIDATES]
        return nodule_table(uid, likeliest)[list(CANDIDATE_COLUMNS)]


def extract_nodules(
    mask: np.ndarray,
    geometry: Geometry,
    probability: np.ndarray | None = None,
    grid_spacing: Vector | None = None,
) -> list[dict[str, Any]]:
    """Nodules of a mask: connected components (26 neighbours), touching nodules split; the likeliest first.

    The mask is taken as it is: holes stay, which ``find_candidates`` fills.

    Args:
        mask: (z, y, x), nodule where not 0.
        geometry: Where its voxels lie.
        probability: Float (z, y, x), or None.
        grid_spacing: Voxel size (x, y, z) in mm by which shape is judged; None takes that of ``geometry``.

    Returns:
        One dict a nodule: ``center_world`` [x, y, z] in LPS mm, ``center_voxel`` [x, y, z] as floats, ``diameter_mm``
        of the sphere of equal volume, ``volume_voxels``, ``volume_mm3``, half-open ``bbox`` (z_min, z_max, y_min,
        y_max, x_min, x_max), and ``probability``, its score (see ``_score``), NaN without a map.

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


def hits_of(found: Sequence[dict[str, Any]], annotated: Sequence[dict[str, Any]]) -> np.ndarray:
    """Bool (found, annotated): whether a centre lies nearer to an annotated one than its radius."""
    centers = np.asarray([n["center_world"] for n in found], float).reshape(-1, 3)
    truths = np.asarray([n["center_world"] for n in annotated], float).reshape(-1, 3)
    radii = np.asarray([n["diameter_mm"] / 2 for n in annotated], float)
    return np.linalg.norm(centers[:, None] - truths[None], axis=-1) < radii


def find_candidates(
    probability: np.ndarray,
    geometry: Geometry,
    threshold: float,
    grid_spacing: Vector | None = None,
    smallest_mm3: float = SMALLEST_NODULE_MM3,
) -> Segmentation:
    """All that might be a nodule: those of the mask, and fainter spots that do not reach the threshold.

    What a nodule encloses on all sides belongs to it, too. Of a map that is mostly noise the MOST_COMPONENTS largest
    components are kept as they are, so that it takes no longer than others.

    Args:
        probability: Float (z, y, x).
        geometry: Where its voxels lie.
        threshold: Probability from which a voxel belongs to the mask by itself.
        grid_spacing: Voxel size (x, y, z) in mm by which size and shape are judged; None takes that of ``geometry``. A
            network that sees all scans stretched to one grid judges them by one voxel size, too, so that the mask
            follows from the array alone.
        smallest_mm3: Volume that a nodule of the mask must have; what is smaller is a faint spot.
    """
    grid = replace(geometry, spacing=grid_spacing or geometry.spacing)
    voxel_mm3 = grid.voxel_volume_mm3
    parts, is_noise = _main_components(probability, threshold, voxel_mm3)
    if not is_noise:
        parts = _nodule_voxels(_fill_holes(parts, probability.shape, grid), grid)
    parts = [voxels for voxels in parts if len(voxels) * voxel_mm3 >= smallest_mm3]
    labels = np.zeros(probability.shape, np.int32)
    for number, voxels in enumerate(parts, start=1):
        labels[tuple(voxels.T)] = number
    found = _describe(parts, geometry, probability, grid)
    spots, spots_are_noise = _main_components(probability, min(CANDIDATE_THRESHOLD, threshold), voxel_mm3)
    spots = [voxels for voxels in spots if not labels[tuple(voxels.T)].any()]
    faint = _describe(spots, geometry, probability, grid)[: max(0, MAX_CANDIDATES - len(found))]
    numbers = [number for number, _ in found] + [0] * len(faint)
    return Segmentation(labels, [nodule for _, nodule in found + faint], numbers, is_noise or spots_are_noise)


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
    """Flat indices of the voxels of a bool mask, ascending, and the number from 0 of the component of each.

    A mask of nodules is nearly empty, and looking at its voxels alone is many times faster than labelling the array.
    """
    flat = np.flatnonzero(mask)
    if len(flat) > MOST_SPARSE_VOXELS:
        return flat, ndimage.label(mask, np.ones((3, 3, 3)))[0].ravel()[flat] - 1
    # Numbered on a grid that is wider by one on every side, so that no neighbour is one around a corner.
    steps = np.array([(mask.shape[1] + 2) * (mask.shape[2] + 2), mask.shape[2] + 2, 1])
    numbers = np.stack(np.unravel_index(flat, mask.shape), axis=1) @ steps
    ahead = (np.argwhere(np.ones((3, 3, 3)))[14:] - 1) @ steps  # 13 of the 26 neighbours, the others are behind
    pairs = [_positions_of(numbers, numbers + step) for step in ahead]
    first, second = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    links = sparse.coo_matrix((np.ones(len(first), bool), (first, second)), (len(flat), len(flat)))
    return flat, csgraph.connected_components(links, directed=False)[1]


def _split_by_label(flat: np.ndarray, labels: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Voxels (m, 3) (z, y, x) of each label, by their flat indices in an array of this shape."""
    if not len(flat):
        return []
    order = np.argsort(labels, kind="stable")
    voxels = np.stack(np.unravel_index(flat[order], shape), axis=1)
    return np.split(voxels, np.flatnonzero(np.diff(labels[order])) + 1)


def _middles_of_spots(probability: np.ndarray, step: np.ndarray, voxel_mm3: float = 0.0) -> np.ndarray:
    """Middles, int (n, 3), of up to MAX_CANDIDATES spots that may be a nodule in a map (z, y, x), the likeliest first.

    What is wider than ``step`` voxels is divided into boxes that are not, and each that is not empty has a middle. A
    map that is noise has none.
    """
    spots, is_noise = _main_components(probability, CANDIDATE_THRESHOLD, voxel_mm3)
    if is_noise:
        return np.empty((0, 3), int)
    spots.sort(key=lambda voxels: -probability[tuple(voxels.T)].max())
    middles = np.empty((0, 3))
    for voxels in spots[:MAX_CANDIDATES]:
        lower, width = voxels.min(axis=0), np.ptp(voxels, axis=0) + 1
        parts = -(-width // np.maximum(step, 1))
        boxes = ((voxels - lower) / width * parts).astype(int)
        filled = np.unravel_index(np.unique(np.ravel_multi_index(tuple(boxes.T), parts)), parts)
        middles = np.concatenate([middles, lower + (np.stack(filled, axis=1) + 0.5) / parts * width])
    return middles[:MAX_CANDIDATES].astype(int)


def _positions_of(numbers: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in ``wanted``, places in ``numbers``) of the wanted numbers that are there; ``numbers`` ascend."""
    place = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    there = numbers[place] == wanted if len(numbers) else np.zeros(0, bool)
    return np.flatnonzero(there), place[there]


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
    places = (voxels - voxels.mean(axis=0)) * geometry.spacing_zyx
    spread = places.T @ places / len(voxels) + np.eye(3) * squared.max() / 12
    variances, axes = np.linalg.eigh(spread)  # ascending; the axes are columns
    doubt = slack * squared @ axes**2
    shortest, longest = variances[0] + doubt[0], variances[2] - doubt[2]
    return math.sqrt(shortest / max(shortest, longest))


def _describe(
    parts: Sequence[np.ndarray], geometry: Geometry, probability: np.ndarray | None, grid: Geometry
) -> list[tuple[int, dict[str, Any]]]:
    """(number from 1, dict) of nodules, given by their voxels (m, 3); the likeliest and then the largest first.

    They are measured by ``geometry`` and scored by ``grid``.
    """
    nodules = []
    for number, voxels in enumerate(parts, start=1):
        sample = voxels[:: 1 + len(voxels) // MOST_MEASURED]
        center = geometry.world(sample.mean(axis=0))
        edges = zip(voxels.min(axis=0).tolist(), (voxels.max(axis=0) + 1).tolist(), strict=True)
        nodule = {
            "center_world": center.tolist(),
            "center_voxel": geometry.index_xyz(center).tolist(),
            "diameter_mm": sphere_diameter(len(voxels) * geometry.voxel_volume_mm3),
            "volume_voxels": len(voxels),
            "volume_mm3": len(voxels) * geometry.voxel_volume_mm3,
            "bbox": tuple(edge for side in edges for edge in side),
            "probability": math.nan if probability is None else _score(sample, grid, probability),
        }
        nodules.append((number, nodule))
    return sorted(nodules, key=lambda n: (0 if probability is None else -n[1]["probability"], -n[1]["volume_mm3"]))


def _score(voxels: np.ndarray, geometry: Geometry, probability: np.ndarray) -> float:
    """How likely a candidate is a nodule, in [0, 1]: the mean probability in and around it, times its roundness.

    Voxels up to SURELY_BACKGROUND do not count. Where the network hesitates, it is often at a vessel: the probability
    fades out slowly around it, and the candidate is longer than thick. The highest probability tells neither.

    Args:
        voxels: (m, 3) indices (z, y, x) of the candidate.
        geometry: Where the voxels lie.
        probability: Float (z, y, x).
    """
    margins = np.ceil(SURROUNDINGS_MM / np.asarray(geometry.spacing_zyx)).astype(int)
    lower, upper = np.maximum(voxels.min(axis=0) - margins, 0), voxels.max(axis=0) + 1 + margins
    values = probability[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))].astype(np.float32)
    values = values[values > SURELY_BACKGROUND]
    certainty = float(values.mean()) if len(values) else 0.0
    return min(1.0, certainty * _roundness(voxels, geometry, GRID_SLACK))


def sphere_diameter(volume: float) -> float:
    """Diameter of the sphere of a volume."""
    return (6 * volume / math.pi) ** (1 / 3)


def nodule_table(uid: str, nodules: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Nodule dicts as rows; the first columns are LUNA16's."""
    columns = [*CANDIDATE_COLUMNS, "diameter_mm", "volume_mm3", "volume_voxels", "voxelX", "voxelY", "voxelZ"]
    rows = [
        (
            uid,
            *n["center_world"],
            n["probability"],
            n["diameter_mm"],
            n["volume_mm3"],
            n["volume_voxels"],
            *n["center_voxel"],
        )
        for n in nodules
    ]
    return pd.DataFrame(rows, columns=columns)


# --------------------------------------------------------------------------------------------------------- pictures


def draw_overlay(
    image: np.ndarray,
    geometry: Geometry,
    mask: np.ndarray,
    nodules: Sequence[dict[str, Any]],
    truth: np.ndarray | None = None,
    title: str = "",
    most: int = MAX_PICTURED,
    annotated: Sequence[dict[str, Any]] | None = None,
) -> Figure:
    """Axial slice and three zoomed views of each finding, with truth and prediction as contours.

    Findings that lie in the view of a surer one share its row.

    Args:
        image: Float (z, y, x) in [0, 1].
        geometry: Where its voxels lie.
        mask: Predicted mask (z, y, x).
        nodules: Predicted nodules, as ``extract_nodules`` gives them.
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
    findings = [(f"{i}: {n['diameter_mm']:.1f} mm, score {n['probability']:.2f}", n) for i, n in enumerate(nodules, 1)]
    counted = f"{len(nodules)} predicted"
    if annotated is not None:
        hits = hits_of(nodules, annotated)
        missed = [nodule for number, nodule in enumerate(annotated) if not hits[:, number].any()]
        findings = [(f"missed, {n['diameter_mm']:.1f} mm", n) for n in missed] + findings
        counted += f", {len(annotated)} annotated, {len(missed)} missed"
    rows = _share_rows(findings)
    shown = rows[:most] or [("axial, no nodule found", _placeholder_finding(image.shape))]
    figure = Figure(figsize=(15, 0.9 + 3.9 * len(shown)), dpi=100, layout="constrained", facecolor="white")
    more = f" (the first {most} of {len(rows)} findings)" if len(rows) > most else ""
    figure.suptitle(f"{title}\n{counted}{more}", fontsize=12)
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


def _share_rows(findings: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """(label, nodule) of each row of a picture: a finding, and how many more lie in its view."""
    rows: list[tuple[str, dict[str, Any], int]] = []
    for label, nodule in findings:
        for number, (first, shown, others) in enumerate(rows):
            reach = VIEW_SHARE * _reach_mm(shown)
            if np.linalg.norm(np.subtract(nodule["center_world"], shown["center_world"])) < reach:
                rows[number] = first, shown, others + 1
                break
        else:
            rows.append((label, nodule, 0))
    return [(label + (f", and {others} more here" if others else ""), shown) for label, shown, others in rows]


def _reach_mm(nodule: dict[str, Any]) -> float:
    """Half the width of the zoomed views of a finding."""
    return max(20.0, 1.2 * nodule["diameter_mm"])


def _placeholder_finding(shape_zyx: Sequence[int]) -> dict[str, Any]:
    """What is drawn where nothing was found: whole slices, the sagittal one through a lung."""
    z, y, x = shape_zyx
    return {"center_voxel": [(x - 1) / 4, (y - 1) / 2, (z - 1) / 2], "diameter_mm": 0.0}


def _draw_finding(
    row: Sequence[Axes],
    label: str,
    finding: dict[str, Any],
    image: np.ndarray,
    geometry: Geometry,
    mask: np.ndarray,
    truth: np.ndarray | None,
) -> None:
    center_zyx = finding["center_voxel"][::-1]
    index = np.clip(np.rint(center_zyx), 0, np.asarray(image.shape) - 1).astype(int)
    center_mm = np.asarray(center_zyx) * geometry.spacing_zyx
    reach = _reach_mm(finding)
    views = [(0, None, label), (0, reach, f"axial, {2 * reach:.0f} mm"), (1, reach, "coronal"), (2, reach, "sagittal")]
    if not finding["diameter_mm"]:  # nothing to look at closely
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
        elif finding["diameter_mm"]:
            _point_at(axes, columns, rows, finding["diameter_mm"], label)


def _name_sides(axes: Axes, sides: str) -> None:
    """The patient's right and left, or front and back, as letters at the sides of a slice."""
    for x, letter in zip((0.02, 0.98), sides, strict=True):
        align = "left" if x < 0.5 else "right"
        place: dict[str, Any] = {"ha": align, "va": "center", "transform": axes.transAxes, "bbox": LABEL_BOX}
        axes.text(x, 0.5, letter, color="white", fontsize=10, **place)


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


def format_nodules(nodules: pd.DataFrame) -> str:
    """The table of ``nodule_table`` as a person reads it on the console."""
    if nodules.empty:
        return "no nodule found"
    columns = {"coordX": "x mm", "coordY": "y mm", "coordZ": "z mm", "diameter_mm": "diameter mm", "volume_mm3": "mm3"}
    shown = nodules[list(columns)].rename(columns=columns).round(1)
    shown.insert(0, "nodule", range(1, len(nodules) + 1))
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


def _command(argv: list[str] | None) -> int:
    (options, run_options), _ = parse_command_line(
        NoduleInferencer, "run", argv=argv, skip=["model", "window", "grid_spacing"]
    )
    inferencer = NoduleInferencer(**options)
    found = inferencer.run(**run_options)
    if process_rank():
        return 0
    print(format_nodules(found) if run_options["input"] else format_scans(found))
    print(f"files and pictures: {inferencer.output_dir}")
    return report_failures(inferencer.failed, inferencer.output_dir)


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are NoduleInferencer's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
