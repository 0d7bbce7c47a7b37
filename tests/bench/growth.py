"""How time, memory and disk grow with scans and voxels, measured at three sizes each and drawn.

python tests/bench/growth.py --output tests/bench/growth.png
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import psutil
from jsonargparse import auto_cli

from data.phantom import write_phantoms
from preprocess import LUNA16Preprocessor, find_scans
from tests.bench.benchmark import SMALL_NETWORK, WINDOW, enlarge, make_marks
from utils import read_scan, write_image

LOOK_EVERY = 0.02  # seconds between two looks at the memory


def preprocessor(folder: Path, num_processes: int) -> LUNA16Preprocessor:
    """Onto the 1 mm grid, cropped to the lungs."""
    return LUNA16Preprocessor(
        folder / "raw",
        folder / "annotations.csv",
        folder / "seg-lungs-LUNA16",
        folder / "processed",
        target_size=None,
        crop_to_lungs=True,
        num_processes=num_processes,
    )


def prepare_slices(folder: Path, slices: int) -> None:
    """One scan of 512 x 512 x ``slices``."""
    write_phantoms(folder, num_scans=1, size_xyz=(256, 256, 120), min_diameter_mm=8)
    for name in ("raw", "seg-lungs-LUNA16"):
        for path in find_scans(folder / name).values():
            image = read_scan(path, constant=name != "raw")
            write_image(path, enlarge(image, (512, 512, slices), linear=name == "raw"))


def preprocess_slices(folder: Path, slices: int) -> Path:
    """Prepares it in this process."""
    maker = preprocessor(folder, num_processes=1)
    maker.process_single_scan(next(iter(maker.scans)))
    return maker.output_dir


def prepare_scans(folder: Path, scans: int) -> None:
    """So many scans of 128 x 128 x 60."""
    write_phantoms(folder, num_scans=scans, size_xyz=(128, 128, 60), min_diameter_mm=8)


def preprocess_scans(folder: Path, scans: int) -> Path:
    """Prepares them in two processes."""
    maker = preprocessor(folder, num_processes=2)
    maker.process_all()
    return maker.output_dir


def prepare_grid(folder: Path, size: int) -> None:
    """A grid of ``size`` voxels along each side."""
    np.save(folder / "grid.npy", np.random.default_rng(0).random((size,) * 3, np.float32).astype(np.float16))


def infer_grid(folder: Path, size: int) -> Path:
    """Its probability map."""
    import torch

    from infer import NoduleInferencer
    from model import InferenceSettings, LungNodule3DUNet, to_device

    network = to_device(LungNodule3DUNet(**SMALL_NETWORK).eval(), torch.device("cpu"))
    inferencer = NoduleInferencer(device="cpu", model=network, settings=InferenceSettings(window=WINDOW))
    np.save(folder / "map.npy", inferencer.predict_probability(np.load(folder / "grid.npy")))
    return folder / "map.npy"


def prepare_marks(folder: Path, scans: int) -> None:
    """The marks of so many scans, 56 each."""
    for name, table in zip(("marks", "nodules"), make_marks(scans), strict=False):
        table.to_csv(folder / f"{name}.csv", index=False)


def score_marks(folder: Path, scans: int) -> Path:
    """Their FROC."""
    from validate import froc, write_froc

    marks, nodules = (pd.read_csv(folder / f"{name}.csv", dtype={"seriesuid": str}) for name in ("marks", "nodules"))
    write_froc(froc(marks, nodules, None, [f"1.2.{index}" for index in range(scans)]), folder / "froc")
    return folder / "froc"


class Panel(NamedTuple):
    """A step of the work: what is made ready for it, what is measured, at which sizes."""

    title: str
    prepare: Callable[[Path, int], None]
    work: Callable[[Path, int], Path]
    sizes: tuple[int, int, int]
    unit: str


PANELS = (
    Panel("preprocessing of one scan", prepare_slices, preprocess_slices, (100, 200, 400), "slices of 512 x 512"),
    Panel("preprocessing of a data set", prepare_scans, preprocess_scans, (8, 16, 32), "scans of 128 x 128 x 60"),
    Panel("probability map of a grid", prepare_grid, infer_grid, (96, 192, 288), "voxels along each side"),
    Panel("FROC with 1000 bootstraps", prepare_marks, score_marks, (222, 444, 888), "scans"),
)


def measure(panel: Panel, size: int) -> tuple[float, float, float]:
    """Seconds, memory (MB, the most that the process and its own took together) and disk (MB) of what it wrote."""
    context, peak = multiprocessing.get_context("spawn"), 0.0
    with tempfile.TemporaryDirectory() as name:
        panel.prepare(Path(name), size)
        with ProcessPoolExecutor(1, context) as pool:
            future = pool.submit(_timed, panel.work, Path(name), size)
            while not future.done():
                peak = max(peak, _memory_of_children())
                time.sleep(LOOK_EVERY)
            seconds, result = future.result()
        files = [result] if result.is_file() else [path for path in result.rglob("*") if path.is_file()]
        return seconds, peak / 1e6, sum(path.stat().st_size for path in files) / 1e6


def _timed(work: Callable[[Path, int], Path], folder: Path, size: int) -> tuple[float, Path]:
    start = time.perf_counter()
    result = work(folder, size)
    return time.perf_counter() - start, result


def _memory_of_children() -> float:
    """Bytes of all processes below this one; what several share is counted once."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def draw(table: pd.DataFrame, path: Path) -> None:
    """One row a step; time, memory and disk over size on an axis each, from 0, so that linear growth is a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 11), dpi=90, layout="constrained", facecolor="white")
    for row, panel in zip(figure.subplots(len(PANELS), 3), PANELS, strict=True):
        measured = table[table["step"] == panel.title]
        for axes, column, color in zip(row, ("seconds", "memory, MB", "disk, MB"), ("C0", "C1", "C2"), strict=True):
            axes.plot(measured["size"], measured[column], "o-", color=color)
            for size, value in zip(measured["size"], measured[column], strict=True):
                text = f"{value:.0f}" if value >= 100 else f"{value:.2g}"
                axes.annotate(text, (size, value), (0, 7), textcoords="offset points", ha="center")
            axes.set_xlim(0, 1.1 * measured["size"].max())
            axes.set_ylim(0, 1.25 * measured[column].max())
            axes.set_xticks(measured["size"])
            axes.set_ylabel(column)
            axes.set_xlabel(panel.unit)
            axes.grid(color="0.9")
        row[1].set_title(panel.title)
    figure.savefig(path)


def main(output: Path = Path("tests/bench/growth.png")) -> None:
    """Measures, prints the table and draws it.

    Args:
        output: Picture to write.
    """
    rows = []
    for panel in PANELS:
        for size in panel.sizes:
            seconds, memory, disk = measure(panel, size)
            print(f"{panel.title:<30}{size:>6}{seconds:>10.2f} s{memory:>8.0f} MB{disk:>9.2f} MB on disk", flush=True)
            rows.append((panel.title, size, seconds, memory, disk))
    draw(pd.DataFrame(rows, columns=["step", "size", "seconds", "memory, MB", "disk, MB"]), output)


if __name__ == "__main__":
    auto_cli(main)
