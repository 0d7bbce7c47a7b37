"""The whole pipeline on phantoms, as a user would run it: a few minutes on two cores, no data set needed.

python data/demo.py
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
NETWORK = "[16,32,64,128]"  # a small network for two cores; the default one wants a GPU
DECIMALS = {"coordX": 1, "coordY": 1, "coordZ": 1, "diameter_mm": 1, "probability": 2}  # mm, and the score


def run(script: str, **options: object) -> None:
    """Prints and runs one command from the project's folder; stops at the first that fails."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    print(f"\n$ python {script} {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, script, *words], cwd=ROOT, check=True)


def main() -> int:
    """Makes phantoms, runs the four scripts and prints what came out; returns the exit status."""
    ArgumentParser(description="Runs the whole pipeline on phantoms, anew in data/demo.").parse_args()
    start = time.perf_counter()
    folder = Path("data/demo")
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    raw, processed, experiment = folder / "phantom", folder / "processed", folder / "experiment"
    checkpoint = experiment / "checkpoints" / "best_model.pth"
    try:
        run("data/phantom.py", output_dir=raw, num_scans=18, size_xyz="[160,160,64]", min_diameter_mm=10)
        run(
            "preprocess.py",
            raw_data_dir=raw / "raw",
            annotations_path=raw / "annotations.csv",
            lung_masks_dir=raw / "seg-lungs-LUNA16",
            output_dir=processed,
            target_size="null",
            target_spacing="[2,2,2]",
            crop_to_lungs="true",
        )
        run(
            "train.py",
            data_dir=processed,
            output_dir=experiment,
            channels=NETWORK,
            strides="[2,2,2]",
            **{"patches.size": "[48,48,48]", "patches.per_scan": 12, "patches.warmup_epochs": 0},
            batch_size=4,
            num_epochs=24,
            learning_rate=0.02,
            dropout=0,
            **{"validation.interval": 4},
        )
        common = {"data_dir": processed, "checkpoint_path": checkpoint}
        excluded = raw / "annotations_excluded.csv"
        run("validate.py", **common, output_dir=experiment / "validation", excluded_path=excluded)
        run("infer.py", **common, output_dir=experiment / "inference", report="true")
    except subprocess.CalledProcessError as error:
        print(f"{error.cmd[1]} failed with exit status {error.returncode}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    report(experiment, time.perf_counter() - start)
    return 0


def read_nodules(inference: Path) -> pd.DataFrame:
    """Nodules of the scans that inference_summary.csv lists; mm with one decimal, scores with two."""
    scans = pd.read_csv(inference / "inference_summary.csv", dtype={"seriesuid": str})["seriesuid"]
    tables = [pd.read_csv(inference / f"{uid}_nodules.csv", dtype={"seriesuid": str}) for uid in scans]
    tables = [table for table in tables if len(table)]  # the columns of an empty table are no numbers
    columns = ["seriesuid", *DECIMALS]
    if not tables:
        return pd.DataFrame(columns=columns)
    return pd.concat(tables)[columns].astype(dict.fromkeys(DECIMALS, float)).round(DECIMALS)


def report(experiment: Path, seconds: float) -> None:
    """Prints Dice, nodules and pictures of a finished demo.

    Args:
        experiment: Its folder, relative to the project's.
        seconds: How long it took.
    """
    validation, inference = experiment / "validation", experiment / "inference"
    summary = json.loads((ROOT / validation / "validation_summary.json").read_text())
    nodules = read_nodules(ROOT / inference)
    print(f"\nThe demo took {seconds / 60:.1f} minutes.")
    print(f"Whole-scan Dice on the {summary['scans']} validation scans: {summary['dice']['mean']:.3f}")
    print(f"Scans with nodules alone: {summary['dice_of_scans_with_nodules']:.3f}")
    print(f"Nodules found: {summary['nodules_found']} of {summary['nodules']}")
    print("infer.py marked no nodule" if nodules.empty else nodules.to_string(index=False))
    print("Pages to open in a browser, and pictures:")
    pages = [validation / "report.html", inference / "report.html"]
    for path in [*pages, *sorted((ROOT / inference).glob("visualizations/[!.]*.png"))]:
        print(f"  {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


if __name__ == "__main__":
    sys.exit(main())
