"""What patches, batches, losses and networks learn in ten minutes of two cores; rows in screening.csv.

python tests/bench/screening.py --real_dir FOLDER --luna16_dir FOLDER

Each training sees three quarters of the real nodules and scans of ``real.py`` and six phantoms. It is scored on what it
never saw: the fourth quarter and 16 phantoms of many makers. Networks at full resolution, which take up to 16 times as
long for a scan, are scored on the quarter alone. A command that was stopped goes on where it was; rows that
are there are not made again: delete them to repeat them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import real
from jsonargparse import auto_cli
from real import ALL_VOXELS, LUNA16_SCANS, MOST_MARKS, Trial, options

from infer import NoduleInferencer
from model import load_checkpoint
from utils import check, read_json, read_processed, read_processed_list, write_csv
from validate import ExaminedScan, Validator

RESULTS = Path(__file__).with_name("screening.csv")
QUARTER = 0  # left out: it has a scan of LUNA16 with an annotated nodule
EPOCHS = 6
FEW = "few for validation"  # of networks at full resolution
# (epochs, patches of each scan in an epoch) of networks at full resolution, in the same time; others take 47 patches.
FULL_RESOLUTION = {
    "nnunet": (6, 7),
    "attention_unet": (6, 7),
    "segresnet": (8, 3),
    "nnunet_residual": (8, 3),
    "vnet": (2, 3),
}


def trial(
    *more: str, size: int = 32, per_scan: int = 47, epochs: int = EPOCHS, validation: str = "validation"
) -> Trial:
    """Ten minutes of ``both`` of ``real.py`` on cubic patches of a size."""
    warm_up = ("--patches.warmup_epochs", f"{epochs // 3}")
    training = options(epochs, *warm_up, *ALL_VOXELS, *more, size=size, per_scan=per_scan)
    return Trial("few phantoms", True, training, validation=validation)


CHOICES = {
    "patches of 48": trial(size=48, per_scan=14),
    "patches of 48, batches of four": trial("--batch_size", "4", size=48, per_scan=14),
    "patches of 32": trial(),
    "patches of 24": trial(size=24, per_scan=112),
    "hardest voxels": trial("--loss.hardest_share", "0.01"),
    **{name: trial("--loss.name", name) for name in ("dice_focal", "focal", "tversky", "boundary")},
    **{
        name: trial("--network", name, per_scan=per_scan, epochs=epochs, validation=FEW)
        for name, (epochs, per_scan) in FULL_RESOLUTION.items()
    },
}
TRIALS = {f"ten minutes, {name}": trial for name, trial in CHOICES.items()}


def row_of(bench: real.Bench, name: str, seed: int) -> dict[str, Any]:
    """Trains, where that is still to be done, and scores; returns the row."""
    path, folder = bench.train(name, QUARTER, seed), bench.folder(name, QUARTER, seed)
    log, progress = pd.read_csv(folder / "log.csv"), load_checkpoint(path).progress
    steps = int(next(iter(progress["optimizer"]["state"].values()))["step"])
    seconds = float(log["training_seconds"].sum())
    row = {"trial": name, "seed": seed, "threads": progress["threads"], "steps": steps}
    row |= {"minutes": seconds / 60, "seconds_a_step": seconds / steps}
    row["seconds_a_scan"] = seconds_a_scan(path, bench.real(QUARTER), bench.device)
    if TRIALS[name].validation != FEW:
        row |= phantom_figures(bench, path, folder / "phantoms")
    row |= real_figures(bench.examine(name, QUARTER, seed))
    return {key: round(float(value), 4) if isinstance(value, float) else value for key, value in row.items()}


def seconds_a_scan(checkpoint_path: Path, data_dir: Path, device: str) -> float:
    """Seconds that one look at the scan of LUNA16 takes, until its candidates are known."""
    inferencer = NoduleInferencer(checkpoint_path, device=device)
    uid = next(uid for uid in read_processed_list(data_dir) if uid.rpartition(".")[2] in LUNA16_SCANS)
    scan, seconds = read_processed(data_dir, uid), 0.0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        inferencer.find_candidates(inferencer.predict_probability(scan.image), scan.geometry, scan.image)
        seconds = time.perf_counter() - start
    return seconds


def phantom_figures(bench: real.Bench, checkpoint_path: Path, output_dir: Path) -> dict[str, Any]:
    """Figures of the phantoms, at the ``min_score`` that training chose on others."""
    data_dir = bench.phantoms("phantoms")
    validator = Validator(data_dir, checkpoint_path, output_dir, bench.device, overwrite=True)
    validator.run_validation("new", excluded_path=data_dir.parent / "annotations_excluded.csv")
    check(not validator.failed, f"phantoms could not be scored: {validator.failed}")
    summary = read_json(output_dir / "validation_summary.json")
    return {
        "phantoms_dice_per_scan": summary["dice"]["mean"],
        "phantoms_cpm": summary["cpm"]["value"],
        "phantoms_nodules": summary["nodules"],
        "phantoms_found": summary["nodules_found"],
        "phantoms_false": summary["false_positive_nodules"],
    }


def real_figures(scans: Sequence[ExaminedScan]) -> dict[str, Any]:
    """Figures of the quarter: of all candidates, and at the score that leaves few other marks in the scan of LUNA16."""
    whole = [scan for scan in scans if scan.seriesuid.rpartition(".")[2] in LUNA16_SCANS]
    scores = np.linspace(0, 1, 101)
    marks = np.array([sum(real.other_marks(scan, score) for scan in whole) for score in scores])
    sparing = float(scores[marks <= MOST_MARKS * len(whole)].min(initial=1.0))
    figures: dict[str, Any] = {}
    for which, score in (("all", 0.0), ("few_marks", sparing)):
        row = real.row_of(scans, score)
        figures |= {f"{which}_{key}": row[key] for key in ("cubes_found", "dice_per_cube")}
    return figures | {"cubes": sum(map(real.is_cube, scans)), "other_marks_in_luna16": int(marks[0])}


def main(
    real_dir: Path,
    luna16_dir: Path,
    trials: list[str] = list(TRIALS),  # noqa: B006 - never changed
    seeds: list[int] = [0],  # noqa: B006 - never changed
    work_dir: Path = Path("data/real"),
    device: str = "cuda",
) -> None:
    """Trains and scores the trials whose rows are missing.

    Args:
        real_dir: Folder of cubes, scans and excluded.csv.
        luna16_dir: Folder of two scans of LUNA16, its annotations and its excluded findings.
        trials: Names in TRIALS.
        seeds: Seeds of the training.
        work_dir: Folder for prepared data and trainings; that of ``real.py`` serves both.
        device: 'cuda' or 'cpu'.
    """
    unknown = [name for name in trials if name not in TRIALS]
    check(not unknown, f"trials must be among {', '.join(TRIALS)}, not {', '.join(unknown)}")
    real.TRIALS.update(TRIALS)
    bench = real.Bench(work_dir.resolve(), real_dir.resolve(), luna16_dir.resolve(), device)
    for name in trials:
        for seed in seeds:
            done = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=["trial", "seed"])
            if ((done["trial"] == name) & (done["seed"] == seed)).any():
                continue
            new = pd.DataFrame([row_of(bench, name, seed)])
            write_csv(RESULTS, pd.concat([done, new], ignore_index=True) if len(done) else new)
            print(new.T.to_string(header=False), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
