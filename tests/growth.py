"""How time, memory and disk grow with scans and voxels, measured at three sizes each and drawn.

python tests/growth.py --output growth.png
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from jsonargparse import auto_cli

from data.phantom import write_phantoms
from tests.benchmark import NETWORK, WINDOW, enlarge, make_marks

SLICES = (100, 200, 400)  # of 512 x 512
SCANS = (4, 8, 16)
GRIDS = (96, 192, 288)  # voxels along each side
MARKED_SCANS = (222, 444, 888)


def preprocess_slices(folder: Path, slices: int) -> tuple[float, float]:
    """Seconds and disk (MB) of one scan of 512 x 512 x ``slices`` on the 1 mm grid."""
    from preprocess import LUNA16Preprocessor
    from utils import find_scans, read_scan, write_image

    uid, path = next(iter(find_scans(folder / "raw").items()))
    for name in ("raw", "seg-lungs-LUNA16"):
        image = read_scan(folder / name / path.name, constant=name != "raw")
        write_image(folder / f"{slices}" / name / path.name, enlarge(image, (512, 512, slices), linear=name == "raw"))
    maker = LUNA16Preprocessor(
        folder / f"{slices}" / "raw",
        folder / "annotations.csv",
        folder / f"{slices}" / "seg-lungs-LUNA16",
        folder / f"{slices}" / "processed",
        target_size=None,
        crop_to_lungs=True,
        num_processes=1,
    )
    start = time.perf_counter()
    maker.process_single_scan(uid)
    return time.perf_counter() - start, disk_mb(maker.output_dir)


def preprocess_scans(folder: Path, scans: int) -> tuple[float, float]:
    """Seconds and disk (MB) of so many scans of 128 x 128 x 60, on two processes."""
    from preprocess import LUNA16Preprocessor

    write_phantoms(folder / f"{scans} scans", num_scans=scans, size_xyz=(128, 128, 60), min_diameter_mm=8)
    source = folder / f"{scans} scans"
    maker = LUNA16Preprocessor(
        source / "raw",
        source / "annotations.csv",
        source / "seg-lungs-LUNA16",
        source / "processed",
        target_size=None,
        crop_to_lungs=True,
        num_processes=2,
    )
    start = time.perf_counter()
    maker.process_all()
    return time.perf_counter() - start, disk_mb(maker.output_dir)


def infer_grid(folder: Path, size: int) -> tuple[float, float]:
    """Seconds, and disk (MB) of the mask, of the nodules of a grid of ``size`` along each side."""
    from infer import NoduleInferencer
    from model import LungNodule3DUNet

    inferencer = NoduleInferencer(device="cpu", model=LungNodule3DUNet(**NETWORK).eval(), window=WINDOW)
    image = np.random.default_rng(0).random((size,) * 3, np.float32).astype(np.float16)
    start = time.perf_counter()
    mask = inferencer.predict(image)
    return time.perf_counter() - start, mask.nbytes / 1e6


def score_scans(folder: Path, scans: int) -> tuple[float, float]:
    """Seconds, and disk (MB) of the marks, of the FROC of so many scans with 56 marks each."""
    from validate import froc

    marks, nodules, uids = make_marks(scans)
    marks.to_csv(folder / f"marks{scans}.csv")
    start = time.perf_counter()
    froc(marks, nodules, None, uids)
    return time.perf_counter() - start, disk_mb(folder / f"marks{scans}.csv")


PANELS: dict[str, tuple[Callable, tuple[int, ...], str]] = {
    "preprocessing of one scan": (preprocess_slices, SLICES, "slices of 512 x 512"),
    "preprocessing of a data set": (preprocess_scans, SCANS, "scans of 128 x 128 x 60"),
    "nodules of one grid": (infer_grid, GRIDS, "voxels along each side"),
    "FROC with 1000 bootstraps": (score_scans, MARKED_SCANS, "scans"),
}


def disk_mb(path: Path) -> float:
    """Size of a file, or of all files below a folder."""
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()) / 1e6


def measure(work: Callable, folder: Path, size: int) -> tuple[float, float, float]:
    """Seconds, peak memory (MB, of the process and its largest child) and disk (MB), in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, folder, size))


def _measured(work: Callable, folder: Path, size: int) -> tuple[float, float, float]:
    seconds, disk = work(folder, size)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return seconds, max(peaks) / 1000, disk


def draw(table: pd.DataFrame, path: Path) -> None:
    """One panel a step: time, memory and disk over size, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained", facecolor="white")
    for axes, (step, rows) in zip(figure.subplots(2, 2).flat, table.groupby("step", sort=False), strict=True):
        axes.set_title(step)
        for column, color in (("seconds", "C0"), ("memory_mb", "C1"), ("disk_mb", "C2")):
            axes.plot(rows["size"], rows[column], "o-", color=color, label=column.replace("_mb", ", MB"))
            for size, value in zip(rows["size"], rows[column], strict=True):
                axes.annotate(f"{value:.3g}", (size, value), (0, 6), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(rows["size"], [str(size) for size in rows["size"]])
        axes.minorticks_off()
        axes.margins(0.12, 0.15)
        axes.set_xlabel(PANELS[step][2])
        axes.grid(color="0.9")
        axes.legend(frameon=False)
    figure.savefig(path)


def main(output: Path = Path("growth.png")) -> None:
    """Measures, prints the table and draws it.

    Args:
        output: Picture to write.
    """
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantoms(folder, num_scans=1, size_xyz=(256, 256, 120), min_diameter_mm=8)
        for step, (work, sizes, _) in PANELS.items():
            for size in sizes:
                rows.append((step, size, *measure(work, folder, size)))
                print(
                    f"{step:<30}{size:>6}{rows[-1][2]:>10.2f} s{rows[-1][3]:>8.0f} MB{rows[-1][4]:>9.2f} MB", flush=True
                )
    draw(pd.DataFrame(rows, columns=["step", "size", "seconds", "memory_mb", "disk_mb"]), output)


if __name__ == "__main__":
    auto_cli(main)
