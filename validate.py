"""Metrics of a trained network: Dice of scans and nodules, and LUNA16's official FROC.

``python validate.py`` scores the validation scans of a training; ``--fold k`` the held-out fold of one that was trained
with it; ``--predictions FILE.csv`` anyone's marks, without a network; ``--compare A B`` holds two results against each
other; ``--tune FILE.pth`` chooses threshold, cleaning and score on the validation scans. The FROC's rules are those of
the challenge (Setio et al. 2017, arXiv:1612.08012) and, where the paper is silent, those of
``noduleCADEvaluationLUNA16.py``.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from utils import set_up_torch

    set_up_torch()

import glob
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn

from data.command_line import parse_command_line, refuse_options, run_main
from data.rescoring import Features, LearntScore, fit_score
from data.validation_page import (
    CHOSEN_HERE,
    DICE_KINDS,
    FEWEST_IN_BAND,
    Finding,
    interval_text,
    picture_findings,
    write_page,
)
from dataset import ignore_excluded
from infer import (
    REMEDY,
    Cleaning,
    FoundNodule,
    InferenceSettings,
    NoduleInferencer,
    Segmentation,
    claim,
    content_box,
    delete_results,
    draw_overlay,
    hits_of,
    is_hit,
    map_scans,
    report_failures,
    tell_noise,
    write_failures,
)
from utils import (
    ANNOTATION_COLUMNS,
    CANDIDATE_COLUMNS,
    LEARNT_FROM,
    POSITION_COLUMNS,
    TUNED_FILE,
    AnnotatedNodule,
    Box,
    Folders,
    Geometry,
    InputError,
    Nodule,
    ProcessedScan,
    Subset,
    as_folders,
    check,
    choose_scans,
    count_cores,
    delete_files,
    do_once,
    folder_lock,
    name_folders,
    now,
    process_count,
    process_rank,
    read_json,
    read_metadata,
    read_processed,
    read_seriesuids,
    read_split,
    read_table,
    readable_metadata,
    resolve_folders,
    sphere_diameter,
    split_path,
    without_repeats,
    write_csv,
    write_figure,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

VALIDATION_FILES = (
    "validation_results.csv",
    "nodule_results.csv",
    "candidates.csv",
    "failed_scans.csv",
    "metrics_distribution.png",
    "validation_summary.json",
    "validation.json",
    "froc.csv",
    "froc.png",
    "froc.json",
    "diameters.png",
    "report.html",
    "excluded_findings.csv",
)
EXCLUDED_PATH = "data/LUNA16/annotations_excluded.csv"
PREDICTIONS_DIR = "experiments/predictions"  # for the score of anyone's marks
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # that tuning chooses from, and what it tries beside
FEWEST_LEARNT = 5  # candidates of a kind that a score is learnt from
CLEANINGS = (
    Cleaning(),
    Cleaning(crf=True),
    Cleaning(opening_mm=1.0),
    Cleaning(closing_mm=2.0),
    Cleaning(smallest_mm=4.0),
    Cleaning(in_lungs=True),
)
METRICS = ("dice", "sensitivity", "precision", "recall")
COUNTS = (
    "tp_voxels",
    "fp_voxels",
    "fn_voxels",
    "nodules",
    "nodules_found",
    "false_positive_nodules",
    "on_excluded_findings",
)
NODULE_RESULT_COLUMNS = (*ANNOTATION_COLUMNS, "dice", "grid_diameter_mm", "found_diameter_mm")
AGREEMENT_SIZES_MM = {"all": (0.0, math.inf), "< 6 mm": (0.0, 6.0), "6 mm and more": (6.0, math.inf)}
SIZES_MM = {"< 6 mm": (0.0, 6.0), "6-10 mm": (6.0, 10.0 + 1e-9), "> 10 mm": (10.0 + 1e-9, math.inf)}
CROP_MARGIN_MM = 5.0  # around an annotated nodule, for its own Dice
NEARLY_AS_GOOD = 0.005  # of mean Dice, when a score or settings are chosen
EXPECTED_MIN_SCORE = 0.5  # where the validation scans leave open which is best
MOST_FINISHERS = 4  # threads that score scans beside the network, one for every four cores
FROC_FILES = ("froc.csv", "froc.png")
FP_PER_SCAN = 2.0 ** np.arange(-3, 4)  # 1/8 ... 8, where LUNA16 reads the curve
_GRID = 2.0 ** (np.arange(-48, 49) / 16)  # the same range in finer steps, for the picture
_POINTS = np.append(np.arange(0, 97, 16), 97)  # in what _read_curve returns: FP_PER_SCAN, then the CPM
_XYZ = list(POSITION_COLUMNS)


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
    return Overlap.of((prediction != 0).astype(np.uint8), truth, 1).metrics(np.array([False, True]))


@dataclass(frozen=True)
class Overlap:
    """How far labelled nodules cover a true mask; gives the metrics of any choice of them without another look.

    Args:
        voxels: (n + 1,) voxels of each label; the background, 0, comes first.
        hits: (n + 1,) those of them that are nodule in truth.
    """

    voxels: np.ndarray
    hits: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, truth: np.ndarray, count: int) -> Overlap:
        """Counts labels 0 to ``count`` (z, y, x) against a truth of the same shape, nodule where not 0."""
        named = labels[labels != 0]  # counting the background one by one would take most of the time
        voxels, hits = (np.bincount(part, minlength=count + 1) for part in (named, labels[truth != 0]))
        voxels[0] = labels.size - named.size
        return cls(voxels, hits)

    def metrics(self, chosen: np.ndarray) -> dict[str, float]:
        """Metrics, as ``voxel_metrics`` gives them, of the mask of the chosen labels, bool (n + 1,)."""
        tp = int(self.hits[chosen].sum())
        fp, fn = int(self.voxels[chosen].sum()) - tp, int(self.hits.sum()) - tp
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


def match_nodules(found: Sequence[Nodule], annotated: Sequence[Nodule]) -> tuple[int, int]:
    """Counts (annotated nodules that are found, found ones that are no annotated nodule), by ``is_hit``."""
    hits = hits_of(found, annotated)
    return int(hits.any(axis=0).sum()), int((~hits.any(axis=1)).sum())


# --------------------------------------------------------------------------------------------------------- validator


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found.

    Args:
        table: One row a scan, as in ``validation_results.csv``.
        nodules: One row an annotated nodule, as in ``nodule_results.csv``.
        candidates: Scored marks in LUNA16's submission format.
        summary: The figures of ``validation_summary.json``.
        loss: Mean loss over the scans, NaN without a loss function.
        min_score: Score from which nodules stayed in the masks.
        scans: What was found and what is there, a scan each, to be scored at other values of min_score.
    """

    table: pd.DataFrame
    nodules: pd.DataFrame
    candidates: pd.DataFrame
    summary: dict[str, Any]
    loss: float
    min_score: float
    scans: list[ExaminedScan]

    @property
    def dice(self) -> float:
        """Mean Dice of the scans where it is defined; NaN where there is none."""
        return self.summary["dice"]["mean"]


class Validator:
    """Scores exactly the masks and marks that ``infer.py`` produces.

    Args:
        data_dir: Folder or folders that preprocess.py wrote.
        checkpoint_path: Checkpoint of train.py.
        output_dir: Where the tables and pictures go; with predictions experiments/predictions, unless it is named.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
        threshold: Probability from which a voxel counts as nodule; null takes the checkpoint's, 0.5 unless it is tuned.
        min_score: Score from which a nodule stays in the mask, 0 to 1; null takes the checkpoint's, and 0 (all stay)
            for another threshold than the checkpoint's; for a live network ``choose_min_score`` chooses it.
        mirrors: Mirror images, and from the 8th on quarter turns, 0 to 15, whose probabilities are averaged with those
            of the scan itself; null takes the training's, and 0 for a live network.
        mixed_precision: Compute in half precision where the hardware gains by it.
        overwrite: Replace the results of another checkpoint, data set or setting in output_dir.
        model: A live network instead of a checkpoint; then no files are written.
        settings: How a live network looks at a scan, where the arguments above say nothing; a checkpoint knows its own.
        seriesuids: Scans to score with a live network.
        loss: Function of logits and target (B, 1, Z, Y, X) to average over the scans.
        cleaning: What is done to the mask besides the threshold, as infer.py takes it; null takes the checkpoint's.
        scales: Magnifications of further looks, as infer.py takes them; null takes the checkpoint's.
        everywhere: Whether further looks are at all windows, as infer.py takes it; null takes the checkpoint's.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        data_dir: Folders = "data/LUNA16/processed",
        checkpoint_path: str | Path = "experiments/luna16_unet/checkpoints/best_model.pth",
        output_dir: str | Path = "experiments/luna16_unet/validation",
        device: str = "cuda",
        threshold: float | None = None,
        min_score: float | None = None,
        mirrors: int | None = None,
        mixed_precision: bool = True,
        overwrite: bool = False,
        model: nn.Module | None = None,
        settings: InferenceSettings | None = None,
        seriesuids: Sequence[str] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        cleaning: Cleaning | None = None,
        scales: tuple[float, ...] | None = None,
        everywhere: bool | None = None,
    ) -> None:
        check(model is None or seriesuids is not None, "a live model needs the seriesuids to score")
        self.data_dir = as_folders(data_dir)
        self.output_dir = Path(output_dir)
        self.writes_files = model is None
        self.loss = loss
        self.seriesuids = seriesuids
        self.chooses_min_score = model is not None and min_score is None
        self.inferencer = NoduleInferencer(
            checkpoint_path,
            output_dir,
            device,
            threshold,
            min_score,
            mirrors,
            mixed_precision,
            overwrite,
            model=model,
            settings=settings,
            cleaning=cleaning,
            scales=scales,
            everywhere=everywhere,
        )
        self.overwrite = overwrite
        self.min_score = self.inferencer.settings.min_score
        self.failed: dict[str, str] = {}  # {series UID: reason} of the last run
        self._example: tuple[ProcessedScan, Segmentation] | None = None

    def run_validation(
        self,
        subset: Subset = "validation",
        fold: int | None = None,
        excluded_path: str | Path = EXCLUDED_PATH,
    ) -> ValidationResult:
        """Scores every scan; with a checkpoint, writes tables, summary and pictures.

        Args:
            subset: 'validation' or 'test' scans of the split beside the checkpoint, 'all', which marks each row with
                its part and still scores no training scan, or 'new' for a data set that training never saw.
            fold: Score the fold that the training held out (``train.py --validation.fold``), which must be this one.
            excluded_path: LUNA16's annotations_excluded.csv: findings on which marks do not count as wrong, nor
                predicted nodules in ``dice_without_excluded``. They are added to those that preprocess.py noted, which
                never count as wrong.

        Scans that cannot be used stand in ``failed`` and failed_scans.csv, each with its reason; with a live network
        they are an error.

        Returns:
            Tables, summary and loss.

        Raises:
            FileExistsError: output_dir holds other results.
            InputError: There is no scan to score, or none that can be used.
        """
        subset = subset if fold is None else "test"
        parts = self._choose(subset, fold)
        scored = [uid for uid, part in parts.items() if part not in LEARNT_FROM]
        self.inferencer.check_prepared_alike(self.data_dir, scored)
        excluded = excluded_findings(self.data_dir, scored, excluded_path if self.writes_files else None)
        provenance: dict[str, Any] = {}
        if self.writes_files:
            provenance = self.inferencer.provenance | {"data_dir": resolve_folders(self.data_dir), "subset": subset}
            provenance |= {"fold": fold, "excluded": _source_of(excluded, excluded_path), "date": now()}
            do_once(lambda: self._claim(provenance))
        scans = self._examine_scans(scored, excluded)
        if self.chooses_min_score:
            self.min_score = choose_min_score(scans)
        parts = {uid: part for uid, part in parts.items() if uid not in self.failed}
        result = self._result(scans, parts, provenance)
        if self.writes_files:
            do_once(lambda: self._write(result, excluded, {scan.seriesuid: scan.findings for scan in scans}))
        return result

    def tune(self, tune: str | Path | None = None, excluded_path: str | Path = EXCLUDED_PATH) -> pd.DataFrame:
        """Chooses threshold, cleaning, score and min_score on the validation scans; writes a checkpoint with them.

        Args:
            tune: Name of that checkpoint, tuned.pth or the like, in the folder of the one that is tuned. It carries
                the further looks (mirrors, scales, everywhere), too. Nothing is scored then nor written to
                output_dir, since scores of these scans would flatter; null scores.
            excluded_path: LUNA16's annotations_excluded.csv; what is found on such findings does not count.

        Returns:
            Of each choice its ``threshold``, ``cleaning``, ``score``, ``min_score``, and mean Dice and CPM of these
            scans; ``chosen`` is true of the one that the checkpoint carries. The choices are THRESHOLDS, and at the
            present threshold each of CLEANINGS that can do something on this grid. Of those with a Dice within
            NEARLY_AS_GOOD of the best the present settings are chosen, or else the nearest threshold, or the first
            cleaning. A further row has the score that is learnt from the candidates of this choice (``fit_score``),
            each half of the scans scored by what was learnt from the other one. It is chosen where its CPM is no lower,
            and its Dice by no more than NEARLY_AS_GOOD.

        Raises:
            FileExistsError: There is such a file, and ``overwrite`` is false.
            InputError: It would not lie beside the checkpoint, the network is none of a training, or no scan has a
                nodule or can be used.
        """
        path, source = Path(tune or ""), self.inferencer.checkpoint_path
        check(
            self.writes_files and split_path(source).is_file(),
            f"{source.parent} has no split.json: only the checkpoint of a training can be tuned, by its own "
            "validation scans",
        )
        check(
            re.fullmatch(TUNED_FILE, path.name) is not None and path.resolve().parent == source.resolve().parent,
            f"tune must name a file in {source.parent} that is called tuned.pth or tuned-NAME.pth, not {path}",
        )
        if path.exists() and not self.overwrite:
            raise FileExistsError(f"{path} exists; name another file for tune, or set overwrite=True")
        uids = [uid for uid, part in self._choose("validation", None).items() if part not in LEARNT_FROM]
        self.inferencer.check_prepared_alike(self.data_dir, uids)
        present = self.inferencer.settings
        choices = [replace(present, threshold=threshold) for threshold in sorted({*THRESHOLDS, present.threshold})]
        choices += [replace(present, cleaning=cleaning) for cleaning in self._cleanings()]
        choices = list(dict.fromkeys(replace(choice, learnt_score=None) for choice in choices))
        examine = partial(self._examine_choices, choices, excluded_findings(self.data_dir, uids, excluded_path))
        self.failed = {}
        scans: list[list[ExaminedScan]] = map_scans(
            self.data_dir, uids, self._predict, examine, desc="tuning", failed=self.failed
        )
        for uid, reason in self.failed.items():
            logger.warning("%s is left out: %s", uid, reason)
        check(bool(scans), "no validation scan can be used; run preprocess.py on them again")
        settings, table = choose_settings(choices, scans, present)
        if present.learnt_score is not None and settings.learnt_score is None:
            logger.warning("the checkpoint's learnt score is left out: these scans teach none that is better than none")
        do_once(lambda: self.inferencer.save_checkpoint(path, settings))
        return table

    def _cleanings(self) -> Iterator[Cleaning]:
        """Those that tuning tries: none, and each of CLEANINGS that can do something on this network's grid."""
        grid, preprocessing = self.inferencer.settings.grid_spacing or (0.0,), self.inferencer.preprocessing
        for cleaning in CLEANINGS:
            radius = max(cleaning.opening_mm, cleaning.closing_mm)
            masked = preprocessing is not None and preprocessing.mask_lungs
            if not 0 < radius < min(grid) and (masked or not cleaning.in_lungs):
                yield cleaning

    def _examine_choices(
        self,
        choices: Sequence[InferenceSettings],
        excluded: pd.DataFrame | None,
        scan: ProcessedScan,
        predicted: tuple[Tensor, Any],
    ) -> list[ExaminedScan]:
        """What is found in a scan by each choice of settings."""
        probability = predicted[0].cpu().numpy()
        find = partial(self.inferencer.find_candidates, probability, scan.geometry, scan.image, most=None)
        return [ExaminedScan.of(scan, find(choice), excluded=excluded) for choice in choices]

    def _examine_scans(self, seriesuids: Sequence[str], excluded: pd.DataFrame | None) -> list[ExaminedScan]:
        """Compares each scan with the truth, and tells which cannot be scored or are mostly noise."""
        self._example = None
        self.failed = {}
        scans: list[ExaminedScan] = map_scans(
            self.data_dir,
            seriesuids,
            self._predict,
            partial(self._examine, excluded),
            desc="validation",
            leave=self.writes_files,
            finishers=max(1, min(MOST_FINISHERS, count_cores() // 4)),
            failed=self.failed if self.writes_files else None,
        )
        if self.writes_files:
            do_once(lambda: write_failures(self.output_dir, self.failed))
        reason = next(iter(self.failed.values()), "")
        check(bool(scans), f"no scan could be scored ({reason}); {self.output_dir / 'failed_scans.csv'} lists all")
        tell_noise([scan.found for scan in scans])
        return scans

    def _result(self, scans: list[ExaminedScan], parts: dict[str, str], provenance: dict[str, Any]) -> ValidationResult:
        """Tables and summary of the examined scans."""
        min_score = self.min_score
        rows = {scan.seriesuid: scan.row(min_score) for scan in scans}
        table = pd.DataFrame([{"seriesuid": uid, "part": part} | rows.get(uid, {}) for uid, part in parts.items()])
        nodules = [row for scan in scans for row in scan.nodule_rows(min_score)]
        settings = {
            "threshold": self.inferencer.settings.threshold,
            "min_score": min_score,
            "mirrors": self.inferencer.settings.mirrors,
            "chosen_on_these_scans": bool(provenance) and "validation" in parts.values(),
            "training_scans_left_out": sum(part in LEARNT_FROM for part in parts.values()),
            "failed_scans": len(self.failed),
        }
        return ValidationResult(
            table,
            pd.DataFrame(nodules, columns=NODULE_RESULT_COLUMNS),
            pd.concat([scan.found.marks(scan.seriesuid) for scan in scans], ignore_index=True),
            summarize(table) | settings | provenance,
            float(np.mean([scan.loss for scan in scans])),
            min_score,
            scans,
        )

    def _claim(self, provenance: dict[str, Any]) -> None:
        """Notes whose results will stand in output_dir; refuses one that holds others, or clears it."""
        path = self.output_dir / "validation.json"
        with folder_lock(self.output_dir):
            lasting = {name: value for name, value in provenance.items() if name != "date"}
            if claim(path, lasting, self.overwrite):
                delete_files(self.output_dir, VALIDATION_FILES)
            write_json(path, provenance)

    def _choose(self, subset: Subset, fold: int | None) -> dict[str, str]:
        """{series UID: part} of the scans to go through."""
        if self.seriesuids is not None:
            return dict.fromkeys(self.seriesuids, "validation")
        checkpoint_path = self.inferencer.checkpoint_path
        if fold is not None:
            held_out = read_split(split_path(checkpoint_path)).fold
            theirs = "no fold" if held_out is None else f"fold {held_out}"
            check(held_out == fold, f"{checkpoint_path} was trained with {theirs} held out, not fold {fold}")
        parts = choose_scans(self.data_dir, checkpoint_path, subset, self.inferencer.seen)
        unknown = [uid for uid, part in parts.items() if part == "unknown"]
        check(not unknown, f"{checkpoint_path} does not say what it learnt from; keep its split.json beside it")
        if all(part in LEARNT_FROM for part in parts.values()):
            raise InputError(
                f"the {subset} scans of {name_folders(self.data_dir)} are all training scans, which are never scored; "
                "name a data_dir with others, or another subset"
            )
        return parts

    def _predict(self, scan: ProcessedScan) -> tuple[Tensor, Tensor | float]:
        """Probability (z, y, x), and loss, which the device may still be at."""
        image = self.inferencer.predictor.to_tensor(scan.image)
        truth = ignore_excluded(torch.from_numpy(scan.mask), scan.metadata.excluded_voxels())[None, None]
        if self.loss is not None:
            truth = truth.to(image.device)  # sent later, it would wait for the network
        logits = self.inferencer.predictor.logits(image, content_box(scan.image))
        with torch.inference_mode():
            loss = math.nan if self.loss is None else self.loss(logits, truth.to(logits.device))
        return torch.sigmoid(logits)[0, 0], loss

    def _examine(
        self, excluded: pd.DataFrame | None, scan: ProcessedScan, predicted: tuple[Tensor, Tensor | float]
    ) -> ExaminedScan:
        """Compares all that was found in a scan with the truth."""
        probability, loss = predicted
        found = self.inferencer.find_candidates(probability.cpu().numpy(), scan.geometry, scan.image)
        if not self.writes_files and scan.seriesuid == self._example_uid:
            self._example = scan, found
        examined = ExaminedScan.of(scan, found, float(loss), excluded)
        if not self.writes_files:
            return examined
        return replace(examined, findings=picture_findings(scan, found.keep(self.min_score), examined.on_excluded))

    @cached_property
    def _example_uid(self) -> str:
        """Of the scans that the first process looks at, the one with the most nodule voxels."""
        assert self.seriesuids is not None
        ours = self.seriesuids[:: process_count()]
        return max(ours, key=lambda uid: sum(n.voxels for n in read_metadata(self.data_dir, uid).nodules))

    def draw_example(self) -> Figure:
        """Overlay of the scan with the most nodule voxels, to follow a training by eye."""
        if self._example is None:
            scan = read_processed(self.data_dir, self._example_uid)
            probability = self.inferencer.predictor.predict_probability(scan.image, content_box(scan.image))
            self._example = scan, self.inferencer.find_candidates(probability, scan.geometry, scan.image)
        scan, found = self._example[0], self._example[1].keep(self.min_score)
        image, truth = np.asarray(scan.image, np.float32), np.asarray(scan.mask)
        annotated, title = scan.metadata.nodules, scan.seriesuid
        return draw_overlay(image, scan.geometry, found.mask, found.nodules, truth, title, most=1, annotated=annotated)

    def _write(
        self,
        result: ValidationResult,
        excluded: pd.DataFrame | None,
        findings: dict[str, Sequence[Finding]],
    ) -> None:
        """Tables, pictures, summary and page."""
        scored = _scored(result.table)
        counts = dict.fromkeys(COUNTS, "Int64")  # whole numbers; of training scans there are none
        write_csv(self.output_dir / "validation_results.csv", result.table.astype(counts))
        write_csv(self.output_dir / "nodule_results.csv", result.nodules)
        write_csv(self.output_dir / "candidates.csv", result.candidates)
        figures = {"distribution": draw_distribution(result.table)}
        write_figure(self.output_dir / "metrics_distribution.png", figures["distribution"])
        if excluded is not None:
            write_csv(
                self.output_dir / "excluded_findings.csv", excluded[excluded["seriesuid"].isin(scored["seriesuid"])]
            )
        result.summary["by_size"], curve = [], None
        if len(result.nodules):
            curve = froc(result.candidates, result.nodules, excluded, list(scored["seriesuid"]))
            figures = {"froc": write_froc(curve, self.output_dir)} | figures
            result.summary["cpm"] = {"value": curve.cpm, "interval": curve.intervals[-1].tolist()}
            result.summary["by_size"] = table_by_size(result.nodules, curve).to_dict("records")
            result.summary["diameters"] = size_agreement(result.nodules)
        else:
            logger.warning("no scan has a nodule: there is no FROC")
            delete_files(self.output_dir, FROC_FILES)  # of an earlier run
        delete_files(self.output_dir, ["diameters.png"])
        if result.summary.get("diameters"):
            figures["diameters"] = draw_agreement(result.nodules)
            write_figure(self.output_dir / "diameters.png", figures["diameters"])
        write_json(self.output_dir / "validation_summary.json", result.summary)
        write_page(self.output_dir, result.summary, scored, findings, curve, figures, self.failed)


def delete_results_of_run(output_dir: Path) -> None:
    """Deletes what validate.py and infer.py left of a training in its folder, and no file of anyone else.

    Results of other weights, as of ``--checkpoint_path pretrained``, stay, too.
    """
    for name, delete in (("validation", partial(delete_files, names=VALIDATION_FILES)), ("inference", delete_results)):
        folder, made_by = output_dir / name, None
        with suppress(InputError, OSError):
            made_by = read_json(folder / f"{name}.json").get("checkpoint")
        if made_by is None or Path(made_by).resolve().parent == (output_dir / "checkpoints").resolve():
            delete(folder)
        else:
            logger.warning("%s holds results of %s, and stays", folder, made_by)


@dataclass(frozen=True)
class ExaminedScan:
    """What was found in a scan and what is there, ready to be scored at any ``min_score``.

    Args:
        seriesuid: Name of the scan.
        annotated: Its annotated nodules, as in the metadata.
        found: All candidates, without the labels.
        whole: Overlap over the whole scan.
        crops: Overlap in a crop around each annotated nodule.
        grid_diameters_mm: Of the sphere of as many voxels as each annotated nodule has in the mask, NaN without any.
        excluded: (m, 4) centre (x, y, z) and diameter in mm of the excluded findings.
        loss: Loss of the scan, NaN without a loss function.
        findings: What was found and missed, with pictures, where a page is made of them.
        patient: Whose scan it is, where that is known.
    """

    seriesuid: str
    annotated: Sequence[AnnotatedNodule]
    found: Segmentation
    whole: Overlap
    crops: list[Overlap]
    grid_diameters_mm: Sequence[float]
    excluded: np.ndarray
    loss: float
    findings: Sequence[Finding] = ()
    patient: str | None = None

    @classmethod
    def of(
        cls, scan: ProcessedScan, found: Segmentation, loss: float = math.nan, excluded: pd.DataFrame | None = None
    ) -> ExaminedScan:
        """Counts what ``find_candidates`` found in a scan against its mask, and against excluded findings."""
        annotated, truth, count = scan.metadata.nodules, np.asarray(scan.mask), len(found.scores) - 1
        boxes = [nodule_crop(scan.geometry, nodule).slices for nodule in annotated]
        crops = [Overlap.of(found.labels[box], truth[box], count) for box in boxes]
        unlabelled = replace(found, labels=found.labels[:0].copy())  # counted; a scan's array is too large to be kept
        findings = np.zeros((0, 4))
        if excluded is not None:
            findings = excluded.loc[excluded["seriesuid"] == scan.seriesuid, [*_XYZ, "diameter_mm"]].to_numpy(float)
        whole = Overlap.of(found.labels, truth, count)
        volumes = [nodule.voxels * scan.geometry.voxel_volume_mm3 for nodule in annotated]
        diameters = [sphere_diameter(volume) if volume else math.nan for volume in volumes]
        return cls(
            scan.seriesuid,
            annotated,
            unlabelled,
            whole,
            crops,
            diameters,
            findings,
            loss,
            patient=scan.metadata.patient,
        )

    @cached_property
    def is_nodule(self) -> np.ndarray:
        """(candidates,) whether it hits an annotated nodule."""
        return np.asarray(hits_of(self.found.candidates, self.annotated).any(axis=1))

    @cached_property
    def is_excluded(self) -> np.ndarray:
        """(candidates,) whether it lies on an excluded finding and on no annotated nodule."""
        centers = np.reshape([mark.center_xyz for mark in self.found.candidates], (-1, 1, 3))
        on_finding = is_hit(centers, self.excluded[None, :, :3], self.excluded[:, 3]).any(axis=1)
        return np.asarray(on_finding & ~self.is_nodule)

    @property
    def judged(self) -> list[tuple[FoundNodule, bool]]:
        """The candidates, and whether each is a nodule, without those on excluded findings."""
        flags = zip(self.found.candidates, self.is_nodule, self.is_excluded, strict=True)
        return [(found, bool(is_nodule)) for found, is_nodule, is_excluded in flags if not is_excluded]

    @cached_property
    def on_excluded(self) -> np.ndarray:
        """(n + 1,) whether that number's nodule lies on an excluded finding and on no annotated nodule."""
        on_excluded = np.zeros(len(self.found.scores), bool)
        on_excluded[self.found.numbers] = self.is_excluded
        on_excluded[0] = False
        return on_excluded

    def rescored(self, score: Callable[[Features], float]) -> ExaminedScan:
        """The same with other scores."""
        return replace(self, found=self.found.rescored(score))

    def row(self, min_score: float) -> dict[str, Any]:
        """Metrics of the scan, and its nodules found and not."""
        hit, false = match_nodules(self.found.keep(min_score).nodules, self.annotated)
        kept = self.found.scores >= min_score
        counts = {
            "nodules": len(self.annotated),
            "nodules_found": hit,
            "false_positive_nodules": false,
            "on_excluded_findings": int((kept & self.on_excluded).sum()),
        }
        dice = {"dice_without_excluded": self.dice_without_excluded(min_score)}
        return self.whole.metrics(kept) | dice | counts

    def dice_without_excluded(self, min_score: float) -> float:
        """Dice of the whole scan; what was found on excluded findings is neither right nor wrong."""
        return self.whole.metrics((self.found.scores >= min_score) & ~self.on_excluded)["dice"]

    def nodule_rows(self, min_score: float) -> list[dict[str, Any]]:
        """One row of NODULE_RESULT_COLUMNS an annotated nodule.

        They are its annotation, the Dice in its crop, and the diameters of its voxels in the true mask and of the
        surest found nodule that hits it, and no other one; NaN where there is none.
        """
        kept, nodules = self.found.scores >= min_score, self.found.keep(min_score).nodules
        hits = hits_of(nodules, self.annotated)
        hits &= hits.sum(axis=1, keepdims=True) == 1  # of two nodules in one it has the size of neither
        rows = []
        for nodule, crop, on_grid, is_hit_by in zip(
            self.annotated, self.crops, self.grid_diameters_mm, hits.T, strict=True
        ):
            mine = [found for found, is_its in zip(nodules, is_hit_by, strict=True) if is_its]
            size = max(mine, key=lambda found: found.score).diameter_mm if mine else math.nan
            values = (*nodule.center_xyz, nodule.diameter_mm, crop.metrics(kept)["dice"], on_grid, size)
            rows.append(dict(zip(NODULE_RESULT_COLUMNS, (self.seriesuid, *values), strict=True)))
        return rows


def choose_min_score(scans: Sequence[ExaminedScan]) -> float:
    """The score from which nodules should stay in the mask, for a high mean Dice per scan where it is defined.

    The highest mean Dice of a few scans is a matter of a few candidates. Of all scores whose mean is within a standard
    error of it (paired by scan; Breiman et al. 1984), or within NEARLY_AS_GOOD, the choice is the one nearest to
    EXPECTED_MIN_SCORE; without any Dice it is 0.
    """
    scores = np.linspace(0, 1, 101)
    dice = np.array([[scan.dice_without_excluded(score) for score in scores] for scan in scans])
    numbers = np.maximum(np.isfinite(dice).sum(axis=0), 1)
    means = np.nansum(dice, axis=0) / numbers
    if not means.any():
        return 0.0
    best = means.argmax()
    # Shares of each scan in the error of the mean. They are not corrected by n / (n - 1), by which one scan that says
    # otherwise would lie just within the error.
    shares = np.nan_to_num(dice - means) / numbers
    errors = np.linalg.norm(shares - shares[:, [best]], axis=0)
    good = scores[means >= means[best] - np.maximum(errors, NEARLY_AS_GOOD)]
    return float(good[np.abs(good - EXPECTED_MIN_SCORE).argmin()])


def choose_settings(
    choices: Sequence[InferenceSettings], scans: Sequence[Sequence[ExaminedScan]], present: InferenceSettings
) -> tuple[InferenceSettings, pd.DataFrame]:
    """The settings that ``Validator.tune`` chooses, and the table of all, of scans examined by each choice.

    Raises:
        InputError: No nodule is found by any choice.
    """
    by_choice = list(zip(*scans, strict=True))
    rows = [_tuning_row(choice, examined) for choice, examined in zip(choices, by_choice, strict=True)]
    table = pd.DataFrame(rows)
    check(bool((table["dice"] > 0).any()), "no nodule of the validation scans is found by any choice")
    good = table[table["dice"] >= table["dice"].max() - NEARLY_AS_GOOD]
    changes = (good["threshold"] - present.threshold).abs() + (good["cleaning"] != str(present.cleaning))
    chosen = int(changes.idxmin())
    settings = choices[chosen]
    if (learnt := learn_score(by_choice[chosen])) is None:
        logger.warning(
            "no score is learnt: each half of the scans needs %d candidates that are nodules, and %d others",
            FEWEST_LEARNT,
            FEWEST_LEARNT,
        )
    else:
        with_score, before = replace(settings, learnt_score=learnt[0]), table.iloc[chosen]
        table.loc[len(table)] = after = pd.Series(_tuning_row(with_score, learnt[1]))
        if after["cpm"] >= before["cpm"] and after["dice"] >= before["dice"] - NEARLY_AS_GOOD:
            chosen, settings = len(table) - 1, with_score
    settings = replace(settings, min_score=float(table["min_score"].iloc[chosen]))
    return settings, table.assign(chosen=table.index == chosen)


def _tuning_row(choice: InferenceSettings, scans: Sequence[ExaminedScan]) -> dict[str, Any]:
    """What ``Validator.tune`` tells of a choice."""
    min_score = choose_min_score(scans)
    return {
        "threshold": choice.threshold,
        "cleaning": str(choice.cleaning),
        "score": "learnt" if choice.learnt_score else "as it is",
        "min_score": min_score,
        "dice": float(pd.Series([scan.dice_without_excluded(min_score) for scan in scans]).mean()),
        "cpm": cpm_of(scans),
    }


def cpm_of(scans: Sequence[ExaminedScan]) -> float:
    """LUNA16's score of all candidates; NaN without a nodule."""
    findings = [(scan.seriesuid, *n.center_xyz, n.diameter_mm) for scan in scans for n in scan.annotated]
    if not findings:
        return math.nan
    excluded = [(scan.seriesuid, *finding) for scan in scans for finding in scan.excluded]
    nodules, others = (pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS)) for rows in (findings, excluded))
    marks = pd.concat([scan.found.marks(scan.seriesuid) for scan in scans], ignore_index=True)
    return froc(marks, nodules, others, [scan.seriesuid for scan in scans], num_bootstraps=0).cpm


def learn_score(scans: Sequence[ExaminedScan]) -> tuple[LearntScore, list[ExaminedScan]] | None:
    """The score that is learnt from the candidates of all scans, and how good such a score is.

    Returns:
        It, and the scans rescored, those of every other patient by what was learnt from the rest; None where either
        half has fewer than FEWEST_LEARNT candidates that are nodules, or that are none.
    """
    half_of = halves_by_patient(scans)
    even, odd = (
        fit_candidates([scan for scan, own in zip(scans, half_of, strict=True) if own == half])
        for half in (False, True)
    )
    learnt = fit_candidates(scans)
    if even is None or odd is None or learnt is None:
        return None
    return learnt, [scan.rescored(even if half else odd) for scan, half in zip(scans, half_of, strict=True)]


def halves_by_patient(scans: Sequence[ExaminedScan]) -> list[bool]:
    """Whether each scan is of the second half, that of every other patient."""
    owners = [scan.patient or scan.seriesuid for scan in scans]
    is_odd = {owner: bool(number % 2) for number, owner in enumerate(dict.fromkeys(owners))}
    return [is_odd[owner] for owner in owners]


def fit_candidates(scans: Sequence[ExaminedScan]) -> LearntScore | None:
    """The score of the candidates of some scans, but for those on excluded findings; None where there are too few."""
    judged = [pair for scan in scans for pair in scan.judged]
    known = [found.features for found, _ in judged if found.features is not None]
    nodules = sum(is_nodule for _, is_nodule in judged)
    if min(nodules, len(judged) - nodules) < FEWEST_LEARNT:
        return None
    return fit_score(known, [is_nodule for _, is_nodule in judged])


def nodule_crop(geometry: Geometry, nodule: Nodule) -> Box:
    """The box around one annotated nodule: its diameter and CROP_MARGIN_MM on every side."""
    reach = (nodule.diameter_mm / 2 + CROP_MARGIN_MM) / np.asarray(geometry.spacing_zyx)
    lower = np.maximum(np.floor(nodule.index_zyx - reach), 0).astype(int)
    upper = np.maximum(np.ceil(nodule.index_zyx + reach) + 1, lower).astype(int)
    return Box.between(lower, upper)


def table_by_size(nodules: pd.DataFrame, curve: FROC) -> pd.DataFrame:
    """Number, Dice per nodule, share found by any mark, and CPM of the nodules of each size."""
    rows = []
    for name, (lower, upper) in SIZES_MM.items():
        chosen = (nodules["diameter_mm"] >= lower) & (nodules["diameter_mm"] < upper)
        if chosen.any():
            rows.append(
                {
                    "diameter": name,
                    "nodules": int(chosen.sum()),
                    "dice_per_nodule": float(nodules.loc[chosen, "dice"].mean()),
                    "found": float(curve.nodules.loc[chosen, "probability"].notna().mean()),
                    "cpm": curve.cpm_of(chosen.to_numpy()),
                }
            )
    return pd.DataFrame(rows)


def size_agreement(nodules: pd.DataFrame) -> list[dict[str, Any]]:
    """How found diameters agree with annotated ones, by size (Bland & Altman 1986).

    Args:
        nodules: Rows of NODULE_RESULT_COLUMNS.

    Returns:
        For each of AGREEMENT_SIZES_MM that has found nodules: ``diameter``, ``found`` (their number), ``bias_mm`` (mean
        of found less annotated diameter), ``bias_interval_mm`` (its 95 % interval), ``limits_mm`` (within which a
        further difference lies with 95 % probability), and ``grid_bias_mm``, the bias of the true mask on the grid.
        Both take differences for normal, by Student's t; of fewer than two nodules they are NaN.
    """
    found = nodules[nodules["found_diameter_mm"].notna()]
    rows = []
    for name, (lower, upper) in AGREEMENT_SIZES_MM.items():
        chosen = found[(found["diameter_mm"] >= lower) & (found["diameter_mm"] < upper)]
        if chosen.empty:
            continue
        differences = chosen["found_diameter_mm"] - chosen["diameter_mm"]
        count, bias = len(chosen), float(differences.mean())
        quantile = float(stats.t.ppf(0.975, count - 1)) * float(differences.std())
        error, spread = quantile / math.sqrt(count), quantile * math.sqrt(1 + 1 / count)
        rows.append(
            {
                "diameter": name,
                "found": count,
                "bias_mm": bias,
                "bias_interval_mm": [bias - error, bias + error],
                "limits_mm": [bias - spread, bias + spread],
                "grid_bias_mm": float((chosen["grid_diameter_mm"] - chosen["diameter_mm"]).mean()),
            }
        )
    return rows


def draw_agreement(nodules: pd.DataFrame) -> Figure:
    """Found less annotated diameter of each found nodule, and bias and limits below and from 6 mm on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    found = nodules[nodules["found_diameter_mm"].notna()]
    true = found["diameter_mm"]
    axes.axhline(0, color="0.6", lw=1)
    grid, ours = found["grid_diameter_mm"] - true, found["found_diameter_mm"] - true
    axes.scatter(true, grid, s=12, color="0.6", label="true mask on the grid")
    axes.scatter(true, ours, s=18, color="C0", alpha=0.7, label="found")
    for row in size_agreement(nodules)[1:]:
        lower, upper = np.clip(AGREEMENT_SIZES_MM[row["diameter"]], true.min(), true.max())
        axes.plot([lower, upper], [row["bias_mm"]] * 2, color="C0", lw=2)
        top = row["bias_mm"]
        if row["found"] >= FEWEST_IN_BAND:
            axes.fill_between([lower, upper], *row["limits_mm"], color="C0", alpha=0.12, lw=0)
            top = row["limits_mm"][1]
        axes.annotate(
            f"{row['bias_mm']:+z.2f} mm",
            ((lower + upper) / 2, top),
            (0, 4),
            textcoords="offset points",
            ha="center",
        )
    axes.set(xlabel="annotated diameter (mm)", ylabel="found less annotated diameter (mm)")
    axes.grid(color="0.9")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)  # beside the points
    return figure


def _scored(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of scans that the network has not learnt from, which alone are scored."""
    return table[~table["part"].isin(LEARNT_FROM)]


def summarize(table: pd.DataFrame) -> dict[str, Any]:
    """Mean and standard deviation of each metric where it is defined, and what a mean hides.

    Args:
        table: One row a scan; training scans have no metrics and are not counted.
    """
    scored = _scored(table)
    empty = scored[scored["nodules"] == 0]
    tp, fp, fn = (float(scored[f"{kind}_voxels"].sum()) for kind in ("tp", "fp", "fn"))
    summary: dict[str, Any] = {
        name: {
            "mean": float(scored[name].mean()),
            "std": float(scored[name].std(ddof=0)),
            "scans": int(scored[name].notna().sum()),
        }
        for name in METRICS
    }
    return summary | {
        "dice_without_excluded": float(scored["dice_without_excluded"].mean()),
        "dice_of_scans_with_nodules": float(scored.loc[scored["nodules"] > 0, "dice"].mean()),
        "dice_pooled": _ratio(2 * tp, 2 * tp + fp + fn),
        "scans": len(scored),
        "nodules": int(scored["nodules"].sum()),
        "nodules_found": int(scored["nodules_found"].sum()),
        "false_positive_nodules": int(scored["false_positive_nodules"].sum()),
        "on_excluded_findings": int(scored["on_excluded_findings"].sum()),
        "scans_without_nodules": len(empty),
        "scans_without_nodules_but_predicted": int((empty["fp_voxels"] > 0).sum()),
        "false_positive_nodules_there": int(empty["false_positive_nodules"].sum()),
        "false_positive_voxels_there": int(empty["fp_voxels"].sum()),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a person reads it on the console."""
    scans, without = summary["scans"], summary["scans_without_nodules"]
    lines = [f"{scans} scans, {scans - without} of them with {summary['nodules']} nodules"]
    if left_out := summary.get("training_scans_left_out"):
        lines[0] += f"; {left_out} training scans left out"
    defined = [name for name in METRICS if summary[name]["scans"]]
    if defined:
        lines.append(f"{'per scan':<14}{'mean ± std':>16}   scans where it is defined")
    for name in defined:
        value = summary[name]
        figures = f"{value['mean']:.3f}" + (f" ± {value['std']:.3f}" if value["scans"] > 1 else "")
        lines.append(f"{name:<14}{figures:>16}   {value['scans']} of {scans}")
    if len(defined) < len(METRICS):
        names = ", ".join(name for name in METRICS if name not in defined)
        lines.append(f"undefined: {names} (there is nothing to compare: no nodule, or nothing predicted)")
    lines += [f"{text}: {summary[name]:.3f}" for name, text in DICE_KINDS.items() if math.isfinite(summary[name])]
    lines.append(
        f"nodules found: {summary['nodules_found']} of {summary['nodules']}, "
        f"false-positive nodules: {summary['false_positive_nodules']}, of which "
        f"{summary['on_excluded_findings']} on excluded findings"
    )
    if without:
        lines.append(
            f"scans without nodules: {without}, of which {summary['scans_without_nodules_but_predicted']} with a "
            f"prediction ({summary['false_positive_nodules_there']} nodules, "
            f"{summary['false_positive_voxels_there']} voxels)"
        )
    lines.append(
        f"the masks hold voxels with a probability of {summary['threshold']:g} or more, in nodules with a score of "
        f"{summary['min_score']:.2f} or more"
    )
    if summary.get("by_size"):
        lines.append(f"FROC: CPM {summary['cpm']['value']:.3f}{interval_text(summary['cpm']['interval'])}")
        lines.append(pd.DataFrame(summary["by_size"]).round(3).to_string(index=False))
    for row in summary.get("diameters", ()):
        limits = "{:+.1f} to {:+.1f}".format(*row["limits_mm"])
        spread = f", 95 % of further differences within {limits} mm" * (row["found"] >= FEWEST_IN_BAND)
        lines.append(
            f"found less annotated diameter, {row['diameter']} ({row['found']}): {row['bias_mm']:+z.2f} mm{spread}"
        )
    if summary.get("chosen_on_these_scans"):
        lines.append(CHOSEN_HERE)
    return "\n".join(lines)


def draw_distribution(table: pd.DataFrame) -> Figure:
    """Box and points of each metric over the scans where it is defined, and the false positives of each scan."""
    from matplotlib.figure import Figure

    scored = _scored(table)
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
    right.set_ylim(-0.3, max(1.0, right.get_ylim()[1]))
    right.yaxis.get_major_locator().set_params(integer=True)
    right.grid(axis="y", alpha=0.3)
    right.set_title("false-positive nodules of each scan", fontsize=11)
    return figure


# -------------------------------------------------------------------------------------------------------------- FROC


@dataclass(frozen=True, eq=False)
class FROC:
    """A FROC curve and what was counted for it, as ``froc`` returns it.

    Args:
        sensitivities: (7,) share of the nodules found at ``FP_PER_SCAN`` false positives per scan.
        cpm: Mean of the seven, the competition performance metric.
        intervals: (8, 2) ends of the 95 % bootstrap intervals of the seven and of ``cpm``; NaN without bootstraps, and
            where fewer than two scans have nodules, so that no draw says how much these differ.
        band: Curve from 1/8 to 8: columns fp_per_scan, sensitivity, and the bootstraps' mean, lower and upper.
        thresholds: (k,) ``inf`` and the distinct probabilities, falling.
        fps: (k,) false positives in all scans together that are at least that probable.
        tps: (k,) nodules found by marks at least that probable.
        nodules: One row a nodule, in the order of the annotations: seriesuid, coordX, coordY, coordZ (world, mm),
            diameter_mm, and probability of its best hit, NaN if missed.
        counts: scans, nodules, tp, fp, fn (over all thresholds); marks ignored as unlisted (their scan), over_limit,
            repeated (hits) and on_excluded.
        cpm_draws: (n,) CPM of each bootstrap. Two results for the same ``seriesuids`` in the same order, nodules, seed
            and number of bootstraps drew the same scans, so the difference of their draws is paired.
    """

    sensitivities: np.ndarray
    cpm: float
    intervals: np.ndarray
    band: pd.DataFrame
    thresholds: np.ndarray
    fps: np.ndarray
    tps: np.ndarray
    nodules: pd.DataFrame
    counts: dict[str, int]
    cpm_draws: np.ndarray

    def table(self) -> pd.DataFrame:
        """Rows 0.125 ... 8 and cpm; columns fp_per_scan (text), sensitivity, lower, upper."""
        table = pd.DataFrame(self.intervals, columns=["lower", "upper"])
        table.insert(0, "fp_per_scan", [*(f"{fp_per_scan:g}" for fp_per_scan in FP_PER_SCAN), "cpm"])
        table.insert(1, "sensitivity", [*self.sensitivities, self.cpm])
        return table

    def cpm_of(self, nodule_mask: npt.ArrayLike) -> float:
        """CPM over some of the nodules, against the false positives of all marks.

        Args:
            nodule_mask: One boolean a row of ``nodules``, such as ``result.nodules["diameter_mm"] < 6``.

        Raises:
            ValueError: It is no boolean mask of that length or selects no nodule.
        """
        mask = np.asarray(nodule_mask)
        if mask.dtype != bool or mask.shape != (len(self.nodules),) or not mask.any():
            got = f"{np.count_nonzero(mask)} set in {mask.dtype} {mask.shape}"
            raise InputError(
                f"nodule_mask must be one boolean a row of .nodules and select some, not {got}; rebuild it"
            )
        best = np.sort(self.nodules["probability"].to_numpy()[mask])  # missed ones, NaN, go last
        tps = np.count_nonzero(np.isfinite(best)) - np.searchsorted(best, self.thresholds)
        return float(_read_curve(self.fps, tps, self.counts["scans"], len(best))[-1])


def froc(
    predictions: pd.DataFrame,
    annotations: pd.DataFrame,
    excluded: pd.DataFrame | None = None,
    seriesuids: Iterable[str] | pd.DataFrame | None = None,
    *,
    num_bootstraps: int = 1000,
    seed: int = 0,
    max_marks: int = 100,
) -> FROC:
    """Scores marks by LUNA16's rules.

    A mark hits a nodule if it is nearer to the centre than the radius. A nodule counts once, by its most probable hit;
    further hits are ignored, and so are other marks on excluded findings. The rest are false positives.

    Args:
        predictions: Columns seriesuid, coordX, coordY, coordZ (world, mm), probability (any score, higher is surer).
        annotations: Columns seriesuid, coordX, coordY, coordZ, diameter_mm (below 0: unknown, taken as 10 mm).
        excluded: Findings that are neither nodules nor mistakes; columns as in ``annotations``.
        seriesuids: The scans searched, with or without nodules: a list or a table of one column. Marks elsewhere are
            ignored with a warning. None takes the scans that ``predictions`` and ``annotations`` name.
        num_bootstraps: How often the scans are drawn anew, with replacement, for the intervals.
        seed: Seed of those draws.
        max_marks: Most marks a scan; of more, those surer than the first one too many stay, so ties with it go.

    Raises:
        ValueError: A table lacks a column or has a missing, infinite or non-numeric value; ``seriesuids`` is empty,
            repeats a scan or has several columns; no listed scan has a nodule; ``max_marks`` is below 1.
    """
    if max_marks < 1:
        raise InputError(f"max_marks must be at least 1, not {max_marks}; LUNA16 uses 100")
    marks = _check_points(predictions, "predictions", "probability")
    nodules = without_repeats(_check_points(annotations, "annotations", "diameter_mm"), "annotations")
    findings = _check_points(annotations[:0] if excluded is None else excluded, "excluded", "diameter_mm")
    scans = _check_scans(pd.concat([marks, nodules])["seriesuid"].unique() if seriesuids is None else seriesuids)
    marks, nodules, findings = (_in_scans(points, scans) for points in (marks, nodules, findings))
    if nodules.empty:
        listed = f"none of the {len(annotations)} lies in the {len(scans)} scans of seriesuids"
        raise InputError(f"there must be an annotation in a listed scan, but {listed}; compare their seriesuid columns")
    if unlisted := len(predictions) - len(marks):
        check(
            len(marks) > 0,
            f"none of the {len(predictions)} marks lies in a listed scan: theirs is "
            f"{predictions['seriesuid'].iloc[0]!r}, the list's {scans[0]!r}; compare their seriesuid columns",
        )
        logger.warning("ignored %d of %d marks: their scans are not in seriesuids", unlisted, len(predictions))
    kept = _most_probable(marks, max_marks)
    nodules["probability"], is_fp, counts = _match_marks(kept, nodules, findings)
    counts |= {"scans": len(scans), "unlisted": unlisted, "over_limit": len(marks) - len(kept)}
    return _build_curve(nodules, kept[is_fp], counts, num_bootstraps, seed)


def draw_froc(result: FROC) -> Figure:
    """Draws the curve, its seven points and, after bootstraps, its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), dpi=100, layout="constrained")
    axes, band, title = figure.subplots(), result.band, f"CPM {result.cpm:.3f}"
    axes.plot(_GRID, band["sensitivity"], label="FROC")
    axes.plot(FP_PER_SCAN, result.sensitivities, "o", color="C0", clip_on=False)
    if interval := interval_text(result.intervals[-1]):
        title += interval
        axes.fill_between(_GRID, band["lower"], band["upper"], alpha=0.2, lw=0, label="95 % interval over scans")
    for x, y, ends in zip(FP_PER_SCAN, result.sensitivities, result.intervals, strict=False):
        edge, shift = (np.nanmin([y, *ends]), -16) if y > 0.5 else (np.nanmax([y, *ends]), 8)
        axes.annotate(f"{y:.3f}", (x, edge), (0, shift), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(FP_PER_SCAN, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set(xlim=(0.1, 10), ylim=(0, 1.04), ylabel="sensitivity", title=title)
    axes.set_xlabel("false positives per scan ({scans} scans, {nodules} nodules)".format(**result.counts))
    axes.grid(color="0.9")
    axes.legend(loc="lower right" if result.cpm > 0.5 else "upper left", frameon=False)
    return figure


def _check_points(points: pd.DataFrame, name: str, value: str) -> pd.DataFrame:
    columns = ["seriesuid", *_XYZ, value]
    if len(points) and (missing := [column for column in columns if column not in points]):
        raise InputError(f"{name} must have the columns {columns}, but {missing} are missing; rename or add them")
    points = points.reindex(columns=columns)
    checked = points[columns[1:]].apply(pd.to_numeric, errors="coerce").astype(float)
    bad = points[points["seriesuid"].isna() | ~np.isfinite(checked).all(axis=1)]
    if len(bad):
        got = f"{len(bad)} of {len(points)} rows have not, the first is {bad.iloc[0].to_dict()}"
        raise InputError(f"{name} must have a seriesuid and finite numbers in each row; {got}; mend or drop them")
    checked.insert(0, "seriesuid", points["seriesuid"].astype(str))
    return checked


def _check_scans(seriesuids: Iterable[str] | pd.DataFrame) -> pd.Index:
    table = seriesuids if isinstance(seriesuids, pd.DataFrame) else pd.DataFrame({"seriesuid": list(seriesuids)})
    # Read as if it had a heading, LUNA16's list would silently lose its first scan to the column's name.
    if list(table.columns) not in (["seriesuid"], [0]):
        got = f"the columns {list(table.columns)}; read a file without heading by header=None"
        raise InputError(f"seriesuids must be a list or a table of the one column seriesuid, not {got}")
    scans = pd.Index(table.iloc[:, 0])
    wrong = scans[scans.duplicated() | scans.isna()]
    if scans.empty or len(wrong):
        got = f"{len(scans)} names, of which repeated or missing: {list(wrong[:3])}"
        raise InputError(f"seriesuids must name some scan and none twice, not {got}; drop or add rows")
    return scans.astype(str)


def _in_scans(points: pd.DataFrame, scans: pd.Index) -> pd.DataFrame:
    """The points in these scans, with a column ``scan``, the scan's position in the list."""
    points = points.assign(scan=scans.get_indexer(pd.Index(points["seriesuid"])))
    return points[points["scan"] >= 0].reset_index(drop=True)


def _most_probable(marks: pd.DataFrame, max_marks: int) -> pd.DataFrame:
    """Marks sorted by scan, at most ``max_marks`` in each."""
    marks = marks.sort_values(["scan", "probability"], ascending=[True, False])
    first_too_many = marks[marks.groupby("scan").cumcount() == max_marks].set_index("scan")["probability"]
    # Scans within the limit get NaN here, and nothing is <= NaN.
    return marks[~(marks["probability"] <= marks["scan"].map(first_too_many))]


def _pair_hits(findings: pd.DataFrame, marks: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Rows (finding, mark) of all hits, (hits,) both; ``marks`` are sorted by scan."""
    start, stop = (np.searchsorted(marks["scan"], findings["scan"], side=side) for side in ("left", "right"))
    finding = np.repeat(np.arange(len(findings)), stop - start)
    mark = np.arange(len(finding)) + np.repeat(stop - np.cumsum(stop - start), stop - start)
    marked, centers = marks[_XYZ].to_numpy()[mark], findings[_XYZ].to_numpy()[finding]
    hit = is_hit(marked, centers, findings["diameter_mm"].to_numpy()[finding])
    return finding[hit], mark[hit]


def _match_marks(
    marks: pd.DataFrame, nodules: pd.DataFrame, excluded: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Each nodule's best hit (nodules,), NaN if missed; which marks are false positives (marks,); the counts."""
    nodule, mark = _pair_hits(nodules, marks)
    best = np.full(len(nodules), np.nan)
    np.fmax.at(best, nodule, marks["probability"].to_numpy()[mark])
    on_nodule, on_excluded = np.zeros((2, len(marks)), bool)
    on_nodule[mark] = True
    on_excluded[_pair_hits(excluded, marks)[1]] = True
    is_fp, tp = ~(on_nodule | on_excluded), int(np.isfinite(best).sum())
    counts = {"nodules": len(nodules), "tp": tp, "fn": len(nodules) - tp, "fp": int(is_fp.sum())}
    return best, is_fp, counts | {"repeated": len(mark) - tp, "on_excluded": int((on_excluded & ~on_nodule).sum())}


def _build_curve(
    nodules: pd.DataFrame, false_positives: pd.DataFrame, counts: dict[str, int], draws: int, seed: int
) -> FROC:
    marks = pd.concat([nodules.dropna(), false_positives])[["scan", "probability"]]
    marks["is_nodule"] = np.arange(len(marks)) < counts["tp"]
    marks = marks.sort_values("probability", ascending=False)
    last = np.flatnonzero(~marks.duplicated("probability", keep="last"))  # equal marks enter the curve together
    events = marks["scan"].to_numpy(), marks["is_nodule"].to_numpy(), last
    nodules_per_scan = np.bincount(nodules["scan"], minlength=counts["scans"])
    scans, rng, curves = len(nodules_per_scan), np.random.default_rng(seed), []
    for _ in range(draws):
        scan_weights = np.bincount(rng.integers(scans, size=scans), minlength=scans)
        if total := int(scan_weights @ nodules_per_scan):  # without a nodule there is no sensitivity
            curves.append(_read_curve(*_cumulate(events, scan_weights), scans, total))
    fps, tps = _cumulate(events, np.ones(scans, int))
    curve = _read_curve(fps, tps, scans, len(nodules))
    cpm_draws = np.array([drawn[-1] for drawn in curves])
    samples = np.sort(curves or [np.full_like(curve, np.nan)], axis=0)
    lower, upper = samples[len(samples) // 40], samples[len(samples) * 39 // 40]  # the official script's ranks for 95 %
    if np.count_nonzero(nodules_per_scan) < 2:
        lower = upper = np.full_like(curve, np.nan)
    grid = {"sensitivity": curve, "mean": samples.mean(axis=0), "lower": lower, "upper": upper}
    band = pd.DataFrame({"fp_per_scan": _GRID, **{name: values[:-1] for name, values in grid.items()}})
    intervals = np.column_stack([lower, upper])[_POINTS]
    thresholds = np.append(np.inf, marks["probability"].to_numpy()[last])
    at_points, cpm = curve[_POINTS[:-1]], float(curve[-1])
    return FROC(at_points, cpm, intervals, band, thresholds, fps, tps, nodules.drop(columns="scan"), counts, cpm_draws)


def _cumulate(events: tuple[np.ndarray, ...], scan_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fps, tps) from each threshold on if scan i occurs ``scan_weights[i]`` times; events are sorted once for all."""
    scan, is_nodule, last = events
    weights = scan_weights[scan]
    fps, tps = (np.append(0, np.cumsum(weights * kind)[last]) for kind in (~is_nodule, is_nodule))
    return fps, tps


def _read_curve(fps: np.ndarray, tps: np.ndarray, scans: int, nodules: int) -> np.ndarray:
    """Sensitivity at each point of ``_GRID``, then the CPM; (98,). Past its end the curve is level."""
    # The official script scales a ROC curve, so its fps are rounded; at 111 / 888 = 1/8 exactly that decides which end
    # of a vertical step is read. Hence the idle-looking product.
    total = max(fps[-1], 1)
    sensitivity = np.interp(_GRID, fps / total * total / scans, tps / nodules)
    return np.append(sensitivity, sensitivity[_POINTS[:-1]].mean())


def write_froc(curve: FROC, output_dir: str | Path) -> Figure:
    """Writes FROC_FILES, and returns the picture."""
    table, picture = (Path(output_dir) / name for name in FROC_FILES)
    write_csv(table, curve.table())
    figure = draw_froc(curve)
    write_figure(picture, figure)
    return figure


def read_excluded(path: str | Path) -> pd.DataFrame | None:
    """LUNA16's excluded findings, or None where the file is absent, and the log says so."""
    if not Path(path).is_file():
        logger.warning("%s does not exist: marks on excluded findings count as false positives", path)
        return None
    return read_table(path, ANNOTATION_COLUMNS)


def excluded_findings(data_dir: Folders, seriesuids: Sequence[str], path: str | Path | None) -> pd.DataFrame | None:
    """The excluded findings that preprocess.py noted of scans, and those of a table; None where there are neither."""
    metadata = [scan for uid in seriesuids if (scan := readable_metadata(data_dir, uid)) is not None]
    rows = [(scan.seriesuid, *finding) for scan in metadata for finding in scan.excluded]
    return _with_excluded(pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS)) if rows else None, path)


def _with_excluded(noted: pd.DataFrame | None, path: str | Path | None) -> pd.DataFrame | None:
    """Excluded findings that are known of scans, and those of a table; None where there are neither."""
    if path is None:
        return noted
    if noted is not None and not Path(path).is_file():
        if Path(path) != Path(EXCLUDED_PATH):
            logger.warning("%s does not exist: only findings that preprocess.py noted are excluded", path)
        return noted
    table = read_excluded(path)
    if table is None or noted is None:
        return noted if table is None else table
    return pd.concat([table, noted]).drop_duplicates(ignore_index=True)


def _source_of(excluded: pd.DataFrame | None, path: str | Path | None) -> str | None:
    """Where excluded findings come from: a table, beside what preprocess.py noted, or this alone."""
    if excluded is None:
        return None
    return str(path) if path is not None and Path(path).is_file() else "noted by preprocess.py"


def _matching(pattern: str) -> list[Path]:
    """The file or folder of that very name or, where there is none, all that match it as a pattern."""
    if Path(pattern).exists():
        return [Path(pattern)]
    return [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207 - a pattern may be absolute


def score_predictions(
    predictions: str | None = None,
    annotations_path: str | Path = "data/LUNA16/annotations.csv",
    excluded_path: str | Path = EXCLUDED_PATH,
    seriesuids_path: str | Path | None = None,
    output_dir: str | Path = PREDICTIONS_DIR,
    overwrite: bool = False,
) -> FROC:
    """Scores marks by LUNA16's rules and writes ``froc.csv``, ``froc.png`` and ``froc.json``; needs no network.

    Args:
        predictions: CSV file of marks (seriesuid, coordX, coordY, coordZ, probability), or a pattern of several, such
            as 'experiments/fold*/validation/candidates.csv', to join the folds of a cross-validation.
        annotations_path: LUNA16's annotations.csv.
        excluded_path: LUNA16's annotations_excluded.csv.
        seriesuids_path: File of the scans that were searched, one a line. null takes those of the
            validation_results.csv beside each predictions file.
        output_dir: Where the three files go.
        overwrite: Replace the score of other marks in output_dir.

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: output_dir holds the scores of a network or of other marks.
        InputError: A table is unusable, or two files have marks in the same scan.
    """
    paths = _matching(str(predictions))
    if not paths:
        raise FileNotFoundError(f"no file matches {predictions}")
    _refuse_scores_of_others(Path(output_dir), paths, overwrite)
    tables = [read_table(path, CANDIDATE_COLUMNS) for path in paths]
    scans = _read_scans(seriesuids_path, paths)
    marked = [uid for table in tables for uid in table["seriesuid"].unique()]
    for uids, what in ((marked, "marks in"), (scans, "a result for")):
        twice = pd.Index(uids)[pd.Index(uids).duplicated()]
        check(twice.empty, f"two files have {what} the scan {next(iter(twice), None)}; each fold must be there once")
    annotations = _annotations_of(annotations_path, scans)
    # Beside marks that validate.py wrote stands what they were scored with, of which a table may know nothing.
    beside = {} if seriesuids_path is not None else {path.with_name("excluded_findings.csv") for path in paths}
    noted = [read_table(path, ANNOTATION_COLUMNS) for path in sorted(beside) if path.is_file()]
    excluded = _with_excluded(pd.concat(noted, ignore_index=True) if noted else None, excluded_path)
    curve = froc(pd.concat(tables), annotations, excluded, scans)
    write_froc(curve, output_dir)
    provenance: dict[str, Any] = {
        "predictions": [str(path.resolve()) for path in paths],
        "annotations": str(annotations_path),
        "excluded": _source_of(excluded, excluded_path),
        "seriesuids": str(seriesuids_path or "beside the predictions"),
    }
    cpm = {"value": curve.cpm, "interval": curve.intervals[-1].tolist()}
    write_json(Path(output_dir) / "froc.json", provenance | {"date": now(), "cpm": cpm, "counts": curve.counts})
    return curve


def _read_scans(seriesuids_path: str | Path | None, predictions: Sequence[Path]) -> list[str]:
    """Series UIDs of the scans that were searched."""
    if seriesuids_path is None:
        return [uid for path in predictions for uid in _scans_beside(path)]
    return read_seriesuids(seriesuids_path)


def _annotations_of(path: str | Path, scans: Sequence[str]) -> pd.DataFrame:
    """LUNA16's annotations, of which some must lie in the scans."""
    annotations = read_table(path, ANNOTATION_COLUMNS)
    annotated = set(annotations["seriesuid"])
    check(
        bool(annotated & set(scans)),
        f"{path} has no annotation in any of the {len(scans)} scans that were searched; name the annotations of these "
        "scans by annotations_path (--annotations_path)",
    )
    if elsewhere := annotated - set(scans):
        logger.warning(
            "%d scans with nodules of %s were not searched, and their nodules are not counted; is a fold missing?",
            len(elsewhere),
            path,
        )
    return annotations


def _refuse_scores_of_others(output_dir: Path, predictions: Sequence[Path], overwrite: bool) -> None:
    """The FROC of a network is replaced by that of its own marks alone, and that of other marks when told to."""
    provenance = output_dir / "froc.json"
    theirs = read_json(provenance)["predictions"] if provenance.is_file() else None
    if theirs not in (None, [str(path.resolve()) for path in predictions]) and not overwrite:
        raise FileExistsError(f"{output_dir} holds the score of {', '.join(theirs)}{REMEDY}")
    own = [path.parent.resolve() for path in predictions] == [output_dir.resolve()]
    if (output_dir / "validation_results.csv").is_file() and not own:
        raise FileExistsError(
            f"{output_dir} holds the scores of a network, which those of {predictions[0]} would replace; name another "
            "output_dir (--output_dir)"
        )


def _scans_beside(predictions: Path) -> list[str]:
    """Scans that ``validate.py`` scored, with or without a mark, by the table beside its candidates.csv."""
    path = predictions.with_name("validation_results.csv")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: name the scans that were searched by seriesuids_path, LUNA16's seriesuids.csv "
            "for all of them; scans without a mark count, too"
        )
    table = read_table(path, ["seriesuid"])
    check("part" in table, f"{path} must have the column part, which validate.py writes; name seriesuids_path instead")
    return _scored(table)["seriesuid"].tolist()


def format_froc(curve: FROC) -> str:
    """The curve's table and counts as a person reads them on the console."""
    counts, table = curve.counts, curve.table().round(6)
    if not np.isfinite(curve.intervals[-1]).all():
        table = table.drop(columns=["lower", "upper"])
    left_out = {
        "on excluded findings": counts["on_excluded"],
        "further hits on a nodule": counts["repeated"],
        "beyond the limit of marks a scan": counts["over_limit"],
        "in scans that are not listed": counts["unlisted"],
    }
    ignored = ", ".join(f"{count} {why}" for why, count in left_out.items() if count) or "none"
    return (
        f"{table.to_string(index=False)}\n"
        f"{counts['nodules']} nodules in {counts['scans']} scans: {counts['tp']} found, {counts['fn']} missed\n"
        f"{counts['fp']} false positives; marks that count neither way: {ignored}"
    )


# ------------------------------------------------------------------------------------------------------ two results

COMPARED_COLUMNS = (
    "dice",
    "dice_without_excluded",
    "nodules",
    "nodules_found",
    "false_positive_nodules",
    "on_excluded_findings",
)


@dataclass(frozen=True)
class ScoredScans:
    """What validate.py wrote of one network, to be held against another one's.

    Args:
        table: Rows of the scored scans, by series UID.
        nodules: Rows of their annotated nodules, by series UID and place.
        candidates: Scored marks.
        excluded: Findings that count neither way.
    """

    table: pd.DataFrame
    nodules: pd.DataFrame
    candidates: pd.DataFrame
    excluded: pd.DataFrame

    @classmethod
    def read(cls, folders: str | Path, excluded: pd.DataFrame | None = None) -> ScoredScans:
        """Reads a folder that validate.py wrote, or several that a pattern names, such as those of ten folds.

        Args:
            folders: Folder or pattern.
            excluded: Excluded findings; None takes those that stand there.

        Raises:
            FileNotFoundError: There is no such folder, or not what validate.py writes.
            InputError: A scan was scored twice.
        """
        paths = [path for path in _matching(str(folders)) if path.is_dir()]
        if not paths:
            raise FileNotFoundError(f"there is no folder {folders}; name one that validate.py wrote")

        def joined(name: str, columns: Sequence[str]) -> pd.DataFrame:
            """The tables of a name of all folders."""
            return pd.concat([read_table(path / name, columns) for path in paths], ignore_index=True)

        table = joined("validation_results.csv", ["seriesuid"])  # a scan may have no Dice
        missing = {"part", *COMPARED_COLUMNS} - set(table.columns)
        check(
            not missing,
            f"validation_results.csv of {folders} has no column {', '.join(sorted(missing))}; score the scans anew",
        )
        table = _scored(table)
        twice = table.loc[table["seriesuid"].duplicated(), "seriesuid"]
        check(twice.empty, f"{folders} has two results of the scan {next(iter(twice), None)}; leave one out")
        nodules = joined("nodule_results.csv", ANNOTATION_COLUMNS)
        if excluded is None:
            files = [path / "excluded_findings.csv" for path in paths]
            listed = [read_table(path, ANNOTATION_COLUMNS) for path in files if path.is_file()]
            excluded = pd.concat(listed, ignore_index=True) if listed else nodules[:0]
        return cls(
            table.sort_values("seriesuid", ignore_index=True),
            nodules.sort_values(["seriesuid", *_XYZ], ignore_index=True),
            joined("candidates.csv", CANDIDATE_COLUMNS),
            excluded,
        )

    @property
    def by_scan(self) -> dict[str, np.ndarray]:
        """(scans,) what each scan brings to each figure but the CPM; NaN where it brings nothing."""
        columns = {
            "Dice per scan": self.table["dice"],
            "Dice without excluded findings": self.table["dice_without_excluded"],
            SENSITIVITY: self.table["nodules_found"],
            FALSE_NODULES: self.table["false_positive_nodules"] - self.table["on_excluded_findings"],
        }
        return {figure: column.to_numpy(float) for figure, column in columns.items()}

    def draws(self, seed: int = 0) -> dict[str, np.ndarray]:
        """(1 + n,) values of each figure: of all scans, then of n draws of them with replacement.

        Two results of the same scans draw the same ones with the same seed.
        """
        count = len(self.table)
        drawn = np.random.default_rng(seed).integers(count, size=(NUM_DRAWS, count))
        drawn = np.vstack([np.arange(count), drawn])
        by_scan = {figure: values[drawn] for figure, values in self.by_scan.items()}
        nodules = self.table["nodules"].to_numpy(float)[drawn]
        with np.errstate(invalid="ignore"):  # a draw may have no scan with a Dice, or without nodules
            values = {name: np.nansum(one, axis=1) / np.isfinite(one).sum(axis=1) for name, one in by_scan.items()}
            values[SENSITIVITY] = by_scan[SENSITIVITY].sum(axis=1) / nodules.sum(axis=1)
        if len(self.nodules):
            curve = froc(self.candidates, self.nodules, self.excluded, list(self.table["seriesuid"]), seed=seed)
            values["CPM"] = np.array([curve.cpm, *curve.cpm_draws])
        return values


NUM_DRAWS = 1000
SENSITIVITY = "sensitivity of the masks"
FALSE_NODULES = "false-positive nodules a scan (those on excluded findings not counted)"
FEWER_IS_BETTER = (FALSE_NODULES,)
FEWEST_DIFFERENT = 6  # scans, without which no sign test reaches 5 %


def compare_results(compare: list[Path] | None = None) -> pd.DataFrame:
    """Holds two results of validate.py against each other: differences with paired 95 % bootstrap intervals.

    Args:
        compare: Two folders that validate.py wrote, of the same scans; or two patterns of folders, in quotes, such as
            'a/fold*/validation', to join those of several folds.

    Returns:
        One row a figure: first, second, difference (first less second), lower and upper end of its interval, and the
        number of scans that differ in it (of the CPM those with nodules). Scans are drawn anew, the same of both; how
        much trainings differ among themselves is not in the interval. Of few scans it is wider than the draws are (the
        expanded percentile interval of Hesterberg 2015, doi 10.1080/00031305.2015.1089789).

    Raises:
        FileNotFoundError: There is no such folder.
        InputError: They are not two, or of other scans or annotations.
    """
    names = list(map(str, compare or []))
    check(len(names) == 2, f"compare takes two folders that validate.py wrote, not {len(names)}")
    first, second = (ScoredScans.read(name) for name in names)
    check_same_scans(first, second, *names)
    for name, scored in zip(names, (first, second), strict=True):
        if (scored.table["part"] == "validation").any():
            logger.warning("%s: the network was chosen on these very scans, so its figures are too good", name)
    rows, count = [], len(first.table)
    pairs = zip(first.by_scan.items(), second.by_scan.values(), strict=True)
    different = {figure: int((~np.isclose(one, two, 0, 0, equal_nan=True)).sum()) for (figure, one), two in pairs}
    different["CPM"] = int((first.table["nodules"] > 0).sum())
    tail = stats.norm.cdf(stats.t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1))) if count > 1 else 0.0
    for (figure, ours), theirs in zip(first.draws().items(), second.draws().values(), strict=True):
        drawn = (ours - theirs)[1:]
        interval = np.nanquantile(drawn, [tail, 1 - tail]) if np.isfinite(drawn).any() else (math.nan, math.nan)
        rows.append((figure, ours[0], theirs[0], ours[0] - theirs[0], *interval, different[figure]))
    return pd.DataFrame(
        rows, columns=["figure", "first", "second", "difference", "lower", "upper", "scans_that_differ"]
    )


def format_tuning(table: pd.DataFrame, path: str | Path) -> str:
    """What ``Validator.tune`` chose, as a person reads it."""
    chosen = table[table["chosen"]].iloc[0]
    return (
        f"{table.drop(columns='chosen').round(3).to_string(index=False)}\n"
        f"{path} carries a threshold of {chosen['threshold']:g} and a min_score of {chosen['min_score']:.2f}; "
        f"cleaning: {chosen['cleaning']}; score: {chosen['score']}. Dice and CPM are those of the scans that they were "
        "chosen on, and say nothing of others."
    )


def check_same_scans(first: ScoredScans, second: ScoredScans, *names: str) -> None:
    """Raises InputError where two results are not of the same scans, annotations and excluded findings."""
    uids = [set(scored.table["seriesuid"]) for scored in (first, second)]
    for own, other, name in ((0, 1, names[0]), (1, 0, names[1])):
        alone = sorted(uids[own] - uids[other])
        check(
            not alone,
            f"{len(alone)} scans were scored in {name} alone, such as {next(iter(alone), '')}; score both networks on "
            "the same scans",
        )
    for kind in ("nodules", "excluded"):
        places = [getattr(scored, kind)[list(ANNOTATION_COLUMNS)].round(2) for scored in (first, second)]
        same = {frozenset(map(tuple, table.to_numpy())) for table in places}
        what = "annotated nodules" if kind == "nodules" else "excluded findings"
        check(len(same) == 1, f"{' and '.join(names)} differ in their {what}; score both with the same")
    # Files of earlier versions do not say the diameters on the grid.
    ours, theirs = (scored.nodules.get("grid_diameter_mm", scored.nodules["diameter_mm"]) for scored in (first, second))
    if not np.allclose(ours.astype(float), theirs.astype(float), atol=0.01, equal_nan=True):
        logger.warning(
            "%s were scored on other true masks, or on other grids: their Dice are not of the same", " and ".join(names)
        )


def format_comparison(table: pd.DataFrame, names: Sequence[str]) -> str:
    """The table of ``compare_results`` and what it means, in plain words."""
    lines = [f"first:  {names[0]}", f"second: {names[1]}", table.round(4).to_string(index=False)]
    told: dict[str, list[str]] = {"first": [], "second": [], "same": [], "few": [], "undefined": []}
    for row in table.to_dict("records"):
        is_first = (row["difference"] > 0) != (row["figure"] in FEWER_IS_BETTER)
        if not np.isfinite([row["lower"], row["upper"]]).all():
            kind = "undefined"
        elif row["lower"] <= 0 <= row["upper"]:
            kind = "same"
        elif row["scans_that_differ"] < FEWEST_DIFFERENT:
            kind = "few"
        else:
            kind = "first" if is_first else "second"
        told[kind].append(row["figure"])
    sentences = {
        "first": "The first is better in {}.",
        "second": "The second is better in {}.",
        "same": "No difference is shown in {}: the interval holds 0.",
        "few": f"No difference is shown in {{}}: fewer than {FEWEST_DIFFERENT} scans differ.",
        "undefined": "Nothing can be said of {}: too few scans have a nodule.",
    }
    lines += [sentence.format(", ".join(told[kind])) for kind, sentence in sentences.items() if told[kind]]
    lines.append("The intervals draw scans anew. They do not hold how much trainings differ among themselves.")
    return "\n".join(lines)


def _command(argv: list[str] | None) -> int:
    skipped = ["model", "settings", "seriesuids", "loss"]
    (options, run_options, tune_options, score_options, compare_options), given = parse_command_line(
        Validator, "run_validation", "tune", score_predictions, compare_results, argv=argv, skip=skipped
    )
    if compare_options["compare"] is not None:
        refuse_options(given - {"compare"}, "they are for scoring; leave them out with compare")
        print(format_comparison(compare_results(**compare_options), list(map(str, compare_options["compare"]))))
        return 0
    if score_options["predictions"] is not None:
        refuse_options(given - set(score_options), "they are for scoring a network; leave them out with predictions")
        if "output_dir" not in given:
            score_options["output_dir"] = PREDICTIONS_DIR
        print(format_froc(score_predictions(**score_options)))
        print(f"table and picture: {score_options['output_dir']}")
        return 0
    if tune_options["tune"] is not None:
        taken = (set(options) | set(tune_options)) - {"min_score"}  # which tuning chooses
        refuse_options(given - taken, "they are for scoring; leave them out with tune")
        validator = Validator(**options)
        table = validator.tune(**tune_options)
        if not process_rank():
            print(format_tuning(table, tune_options["tune"]))
        return 1 if validator.failed else 0
    refuse_options(given - set(options) - set(run_options), "they are for scoring marks; name these by predictions")
    check(not {"fold", "subset"} <= given, "--subset would be ignored: --fold scores the held-out scans; leave one out")
    validator = Validator(**options)
    summary = validator.run_validation(**run_options).summary
    if process_rank():
        return 0
    print(format_summary(summary))
    print(f"tables and pictures: {validator.output_dir}")
    return report_failures(validator.failed, validator.output_dir)


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are Validator's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
