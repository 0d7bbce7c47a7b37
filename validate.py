"""Metrics of a trained network on its validation scans.

python validate.py
python validate.py --checkpoint_path experiments/luna16_unet/checkpoints/checkpoint_epoch_50.pth
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from infer import NoduleInferencer, Subset, choose_scans, draw_overlay, extract_nodules
from utils import (
    ProcessedScan,
    Shape,
    atomic_path,
    check,
    parse_command_line,
    read_processed,
    run_main,
    write_csv,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

METRICS = ("dice", "sensitivity", "precision", "recall")


# ----------------------------------------------------------------------------------------------------- voxel metrics


def voxel_metrics(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Overlap of two masks of one scan.

    Args:
        prediction: (z, y, x), nodule where not 0.
        truth: The same shape.

    Returns:
        ``dice`` = 2 TP / (2 TP + FP + FN), ``sensitivity`` = ``recall`` = TP / (TP + FN), ``precision`` =
        TP / (TP + FP), each NaN where its denominator is 0, and the counts ``tp_voxels``, ``fp_voxels``, ``fn_voxels``.

    Raises:
        ValueError: The shapes differ.
    """
    check(prediction.shape == truth.shape, f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    predicted, true = prediction != 0, truth != 0
    tp = int(np.count_nonzero(predicted & true))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
    sensitivity = _ratio(tp, tp + fn)
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "sensitivity": sensitivity,
        "precision": _ratio(tp, tp + fp),
        "recall": sensitivity,
        "tp_voxels": tp,
        "fp_voxels": fp,
        "fn_voxels": fn,
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def match_nodules(found: Sequence[dict[str, Any]], annotated: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Counts (annotated nodules that are found, found ones that are no annotated nodule).

    LUNA16's rule: a nodule is found by a centre that lies nearer to its own than its radius.
    """
    centers = np.asarray([n["center_world"] for n in found], float).reshape(-1, 3)
    truths = np.asarray([n["center_world"] for n in annotated], float).reshape(-1, 3)
    radii = np.asarray([n["diameter_mm"] / 2 for n in annotated], float)
    hits = np.linalg.norm(centers[:, None] - truths[None], axis=-1) < radii
    return int(hits.any(axis=0).sum()), int((~hits.any(axis=1)).sum())


# --------------------------------------------------------------------------------------------------------- validator


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found.

    Args:
        table: One row a scan, as in ``validation_results.csv``.
        summary: The figures of ``validation_summary.json``.
        loss: Mean loss over the scans, NaN without a loss function.
    """

    table: pd.DataFrame
    summary: dict[str, Any]
    loss: float

    @property
    def dice(self) -> float:
        """Mean Dice of the scans where it is defined; NaN where there is none."""
        return self.summary["dice"]["mean"]


class Validator:
    """Scores exactly the masks that ``infer.py`` produces.

    Args:
        data_dir: Folder that preprocess.py wrote.
        checkpoint_path: Checkpoint of train.py.
        output_dir: Where the table and the picture go.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
        threshold: Probability from which a voxel counts as nodule.
        mixed_precision: Compute in half precision where the hardware gains by it.
        model: A live network instead of a checkpoint; then no files are written.
        window: Shape (z, y, x) of the sliding window of a live network; None takes each scan whole.
        seriesuids: Scans to score with a live network.
        loss: Function of logits and target (B, 1, Z, Y, X) to average over the scans.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        data_dir: str | Path = "data/LUNA16/processed",
        checkpoint_path: str | Path = "experiments/luna16_unet/checkpoints/best_model.pth",
        output_dir: str | Path = "experiments/luna16_unet/validation",
        device: str = "cuda",
        threshold: float = 0.5,
        mixed_precision: bool = True,
        model: nn.Module | None = None,
        window: Shape | None = None,
        seriesuids: Sequence[str] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        check(model is None or seriesuids is not None, "a live model needs the seriesuids to score")
        self.data_dir = Path(data_dir)
        self.output_dir = Path(output_dir)
        self.writes_files = model is None
        self.loss = loss
        self.seriesuids = seriesuids
        self.inferencer = NoduleInferencer(
            checkpoint_path, output_dir, device, threshold, mixed_precision, model=model, window=window
        )

    def run_validation(self, subset: Subset = "validation") -> ValidationResult:
        """Scores every scan; with a checkpoint, writes the table, the summary and the picture.

        Args:
            subset: 'validation' scans, or 'all', which marks each row with its part and still scores no training scan.

        Returns:
            Table, summary and loss.
        """
        if self.seriesuids is not None:
            parts = dict.fromkeys(self.seriesuids, "validation")
        else:
            parts = choose_scans(self.data_dir, self.inferencer.checkpoint_path, subset)
        if all(part == "train" for part in parts.values()):
            raise ValueError(
                f"{self.data_dir} holds no validation scan of this checkpoint; name the training's data_dir"
            )
        rows, losses = [], []
        for uid, part in tqdm(parts.items(), desc="validation", unit="scan", disable=None, leave=self.writes_files):
            if part == "train":
                rows.append({"seriesuid": uid, "part": part})
                continue
            row, loss = self._score(read_processed(self.data_dir, uid))
            rows.append({"seriesuid": uid, "part": part} | row)
            losses.append(loss)
        table = pd.DataFrame(rows)
        result = ValidationResult(table, summarize(table), float(np.mean(losses)) if losses else math.nan)
        if self.writes_files:
            self._write(result)
        return result

    def _score(self, scan: ProcessedScan) -> tuple[dict[str, Any], float]:
        self.inferencer.check_prepared_alike(scan)
        logits = self.inferencer.logits(self.inferencer.to_tensor(scan.image), scan.lung_box)
        probability = torch.sigmoid(logits)[0, 0].cpu().numpy()
        loss = math.nan
        if self.loss is not None:
            target = torch.from_numpy(np.array(scan.mask)).to(logits.device)[None, None]
            with torch.inference_mode():
                loss = float(self.loss(logits, target))
        mask = self.inferencer.mask_of(probability)
        found = extract_nodules(mask, scan.geometry, probability)
        annotated = scan.metadata["nodules"]
        hit, false = match_nodules(found, annotated)
        counts = {"nodules": len(annotated), "nodules_found": hit, "false_positive_nodules": false}
        return voxel_metrics(mask, np.asarray(scan.mask)) | counts, loss

    def draw_example(self) -> Figure:
        """Overlay of the scan with the most nodule voxels, to follow a training by eye."""
        assert self.seriesuids is not None
        scans = [read_processed(self.data_dir, uid) for uid in self.seriesuids]
        scan = max(scans, key=lambda s: sum(nodule["voxels"] for nodule in s.metadata["nodules"]))
        probability = self.inferencer.predict_probability(scan.image, scan.lung_box)
        mask = self.inferencer.mask_of(probability)
        nodules = extract_nodules(mask, scan.geometry, probability)[:1]
        return draw_overlay(
            np.asarray(scan.image, np.float32), scan.geometry, mask, nodules, np.asarray(scan.mask), scan.seriesuid
        )

    def _write(self, result: ValidationResult) -> None:
        write_csv(self.output_dir / "validation_results.csv", result.table)
        write_json(self.output_dir / "validation_summary.json", result.summary)
        with atomic_path(self.output_dir / "metrics_distribution.png") as temporary:
            draw_distribution(result.table).savefig(temporary)


def summarize(table: pd.DataFrame) -> dict[str, Any]:
    """Mean and standard deviation of each metric where it is defined, and what a mean hides.

    Args:
        table: One row a scan; training scans have no metrics and are not counted.
    """
    scored = table[table["part"] != "train"]
    empty = scored[scored["nodules"] == 0]
    summary: dict[str, Any] = {
        name: {
            "mean": float(scored[name].mean()),
            "std": float(scored[name].std(ddof=0)),
            "scans": int(scored[name].notna().sum()),
        }
        for name in METRICS
    }
    return summary | {
        "dice_of_scans_with_nodules": float(scored.loc[scored["nodules"] > 0, "dice"].mean()),
        "scans": len(scored),
        "nodules": int(scored["nodules"].sum()),
        "nodules_found": int(scored["nodules_found"].sum()),
        "false_positive_nodules": int(scored["false_positive_nodules"].sum()),
        "scans_without_nodules": len(empty),
        "scans_without_nodules_but_predicted": int((empty["fp_voxels"] > 0).sum()),
        "false_positive_nodules_there": int(empty["false_positive_nodules"].sum()),
        "false_positive_voxels_there": int(empty["fp_voxels"].sum()),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a person reads it on the console."""
    lines = [f"{'per scan':<14}{'mean ± std':>16}   scans where it is defined"]
    for name in METRICS:
        value = summary[name]
        figures = f"{value['mean']:.3f} ± {value['std']:.3f}" if value["scans"] else "undefined"
        lines.append(f"{name:<14}{figures:>16}   {value['scans']} of {summary['scans']}")
    lines += [
        f"Dice of the scans with nodules alone: {summary['dice_of_scans_with_nodules']:.3f}",
        f"nodules found: {summary['nodules_found']} of {summary['nodules']}, "
        f"false-positive nodules: {summary['false_positive_nodules']}",
        f"scans without nodules: {summary['scans_without_nodules']}, of which "
        f"{summary['scans_without_nodules_but_predicted']} with a prediction ("
        f"{summary['false_positive_nodules_there']} nodules, {summary['false_positive_voxels_there']} voxels)",
    ]
    return "\n".join(lines)


def draw_distribution(table: pd.DataFrame) -> Figure:
    """Box and points of each metric over the scans where it is defined, and the false positives of each scan."""
    from matplotlib.figure import Figure

    scored = table[table["part"] != "train"]
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    jitter = np.random.default_rng(0)
    names = METRICS[:3]  # recall is sensitivity
    for position, name in enumerate(names):
        values = scored[name].dropna().to_numpy(float)
        if len(values):
            left.boxplot(values, positions=[position], widths=0.5, showfliers=False, medianprops={"color": "black"})
            left.scatter(position + jitter.uniform(-0.12, 0.12, len(values)), values, s=18, alpha=0.6)
            left.plot(position, values.mean(), "D", color="black", markersize=6)
    left.set_xticks(
        range(len(names)), [f"{n}{' (recall)' * (n == 'sensitivity')}\nn = {scored[n].notna().sum()}" for n in names]
    )
    left.set_ylim(-0.03, 1.03)
    left.set_xlim(-0.6, len(names) - 0.4)
    left.grid(axis="y", alpha=0.3)
    left.set_title("per scan, where defined (diamond: mean, line: median)", fontsize=11)
    groups = {"with nodules": scored["nodules"] > 0, "without": scored["nodules"] == 0}
    for position, chosen in enumerate(groups.values()):
        values = scored.loc[chosen, "false_positive_nodules"].to_numpy(float)
        right.scatter(position + jitter.uniform(-0.12, 0.12, len(values)), values, s=18, alpha=0.6)
    right.set_xticks(range(2), [f"{name}\nn = {int(chosen.sum())}" for name, chosen in groups.items()])
    right.set_xlim(-0.6, 1.6)
    right.yaxis.get_major_locator().set_params(integer=True)
    right.grid(axis="y", alpha=0.3)
    right.set_title("false-positive nodules of each scan", fontsize=11)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are Validator's arguments. Returns the exit status."""

    def work() -> int:
        options, run_options = parse_command_line(
            Validator, "run_validation", argv, skip=["model", "window", "seriesuids", "loss"]
        )
        validator = Validator(**options)
        print(format_summary(validator.run_validation(**run_options).summary))
        print(f"table and picture: {validator.output_dir}")
        return 0

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
