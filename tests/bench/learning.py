"""What the networks learn: trains each trial, scores it on scans that it never saw, and adds rows to results.csv.

python tests/bench/learning.py --trials '[defaults]' --seeds '[0,1,2]'
python tests/bench/learning.py --compare '["defaults", "plain MONAI"]'

It goes on where it was stopped: a row that is there is not made again, and a training resumes. To repeat a row, delete
it and name another ``--work_dir``. What is compared must have been scored in the same ``--work_dir``. Trainings run one
after the other, since two at a time slow each other many times over.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from benchmark import plain_loader
from jsonargparse import auto_cli
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.utils import set_determinism
from tqdm import tqdm

from dataset import make_split
from model import InferenceSettings, LungNodule3DUNet, load_checkpoint
from preprocess import find_scans
from utils import (
    Geometry,
    atomic_path,
    autocast,
    autocast_dtype,
    check,
    read_json,
    read_metadata,
    read_processed,
    read_processed_list,
    read_scan,
    resample,
    select_device,
    write_csv,
)
from validate import ScoredScans, Validator, check_same_scans, froc, read_excluded, table_by_size

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.csv")
RECIPE = "data/full_resolution_small"
PLAIN = "plain MONAI"
SMALL = ["--channels", "[16,32,64,128]", "--strides", "[2,2,2]"]  # a network for two cores

# Sets of phantoms: options of data/phantom.py. Training and test sets never share a seed.
PHANTOMS = {
    "train": ["--num_scans", "48", "--seed", "1"],
    "test8": ["--num_scans", "80", "--seed", "8"],
    "test11": ["--num_scans", "80", "--seed", "11"],
    "test12": ["--num_scans", "80", "--seed", "12"],
    "test13": ["--num_scans", "80", "--seed", "13"],
    # Two halves of the makers: scanners and hands that differ in noise, kernel, slices, nodules, vessels, breathing.
    "train A": ["--num_scans", "48", "--seed", "21", "--makers", "[0,1,2,3,4,5,6,7]"],
    "test A": ["--num_scans", "80", "--seed", "31", "--makers", "[0,1,2,3,4,5,6,7]"],
    "train of twelve": ["--num_scans", "12", "--seed", "41"],
    "test of 24": ["--num_scans", "24", "--seed", "42"],
    "test B": ["--num_scans", "80", "--seed", "32", "--makers", "[8,9,10,11,12,13,14,15]"],
}
NAMED_BEFOREHAND = ("test11", "test12", "test13")  # never looked at while a recipe was chosen
GRIDS: dict[str, list[str]] = {
    "default": [],
    "1 mm": ["--config", f"{RECIPE}/preprocess.yaml"],
}


@dataclass(frozen=True)
class Trial:
    """One way to train.

    Args:
        grid: Name in GRIDS.
        training: Options of train.py.
        train: Set of phantoms to learn from.
        tests: Sets of phantoms to be scored on.
        seeds: Seeds of the training.
        weights_of: Trial whose weights it takes instead of training.
        tuned: Whether ``validate.py --tune`` chooses threshold, cleaning and score of these weights.
        joined: Whether the networks of all seeds of ``weights_of`` are joined to one; its only row has the first seed.
        scoring: Options of validate.py.
    """

    grid: str
    training: list[str]
    train: str = "train"
    tests: tuple[str, ...] = ("test8",)
    seeds: tuple[int, ...] = (0,)
    weights_of: str = ""
    tuned: bool = False
    joined: bool = False
    scoring: tuple[str, ...] = ()


def defaults(*changes: str, rate: str = "1e-3", epochs: int = 86, **more: Any) -> Trial:
    """The default grid, loss and dropout; 12 steps an epoch."""
    options = [*SMALL, "--learning_rate", rate, "--num_epochs", str(epochs), "--validation.fraction", "0.5"]
    return Trial("default", [*options, "--validation.interval", str(max(epochs // 4, 1)), *changes], **more)


def recipe(*changes: str, **more: Any) -> Trial:
    """The recipe for two cores; 405 steps an epoch."""
    return Trial("1 mm", ["--config", f"{RECIPE}/train.yaml", *changes], **more)


def earlier_recipe(*changes: str, epochs: int = 20, threshold: float = 0.5, **more: Any) -> Trial:
    """The recipe with patches of 48; 120 steps an epoch. Most choices were made with these, at a threshold of 0.5."""
    length = ("--num_epochs", str(epochs), "--validation.interval", str(epochs))
    patches = ("--patches.size", "[48,48,48]", "--patches.per_scan", "40")
    return recipe(*length, *patches, "--validation.threshold", str(threshold), *changes, **more)


def same_weights(of: str, **more: Any) -> Trial:
    """The networks of a recipe's trial, scored on what was named beforehand."""
    return earlier_recipe(weights_of=of, tests=NAMED_BEFOREHAND, **more)


HALVES = {"train": "train A", "tests": ("test A", "test B")}
TWELVE: dict[str, Any] = {"train": "train of twelve", "tests": ("test of 24",)}
FIVE_MINUTES = ("--validation.fraction", "0.2", "--patches.warmup_epochs", "1")
MIRRORS = ("--validation.mirrors", "3")  # as the recipe had them when its choices were screened
NO_PASTING = ("--augmentation.paste_prob", "0")
ALL_VOXELS = ("--loss.hardest_share", "1")
SCREENING = 39  # epochs in ten minutes

TRIALS = {
    "screening": earlier_recipe(*MIRRORS, epochs=SCREENING, **HALVES),
    "screening, no mirrors": earlier_recipe(weights_of="screening", scoring=("--mirrors", "0"), **HALVES),
    "screening, nothing pasted": earlier_recipe(*MIRRORS, *NO_PASTING, epochs=SCREENING, **HALVES),
    "twelve scans": earlier_recipe(*FIVE_MINUTES, epochs=9, **TWELVE),
    "twelve scans, from pretrained": earlier_recipe(
        *FIVE_MINUTES, "--initial_weights", "pretrained", epochs=9, **TWELVE
    ),
    "20 epochs": earlier_recipe(seeds=(0, 1, 2)),
    "20 epochs, mirrors": earlier_recipe(*MIRRORS, seeds=(0, 1, 2)),
    "20 epochs, nothing pasted": earlier_recipe(*NO_PASTING, seeds=(0, 1, 2)),
    "20 epochs, all voxels": earlier_recipe(*ALL_VOXELS, seeds=(0, 1, 2)),
    "20 epochs, more patches on nodules": earlier_recipe("--patches.nodule_share", "0.5"),
    "20 epochs, dropout 0.1": earlier_recipe("--dropout", "0.1"),
    "20 epochs, subpixel": earlier_recipe("--network", "subpixel"),
    "20 epochs, subpixel, dropout 0.1": earlier_recipe("--dropout", "0.1", "--network", "subpixel"),
    "76 epochs, patches of 48": earlier_recipe(epochs=76, tests=NAMED_BEFOREHAND, seeds=(0, 1, 2)),
    "recipe, patches of 32": recipe(tests=("test8", *NAMED_BEFOREHAND), seeds=(0, 1, 2)),
    "20 epochs, patches of 48": earlier_recipe(threshold=0.4, tests=NAMED_BEFOREHAND, seeds=(0, 1, 2)),
    "20 epochs, threshold 0.5": earlier_recipe(tests=NAMED_BEFOREHAND, seeds=(0, 1, 2)),
    "20 epochs, tuned": same_weights("20 epochs, patches of 48", tuned=True, seeds=(0, 1, 2)),
    "20 epochs, three joined": same_weights("20 epochs, threshold 0.5", joined=True),
    "20 epochs, three tuned and joined": same_weights("20 epochs, tuned", joined=True),
    "defaults, subpixel": defaults("--network", "subpixel"),
    PLAIN: defaults(),
    "defaults": defaults(seeds=(0, 1, 2)),
    "defaults at 1e-4": defaults("--validation.interval", "20", rate="1e-4", epochs=400),
    "defaults, nothing pasted": defaults("--augmentation.paste_per_scan", "0"),
}


def run_script(script: str, *words: object) -> None:
    """Prints and runs one script; raises CalledProcessError where it fails."""
    command = [sys.executable, script, *map(str, words)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


class Bench:
    """Makes what trials need, in one folder.

    Args:
        work_dir: Folder for phantoms and trainings; what is there is used.
        device: 'cuda' or 'cpu'.
    """

    def __init__(self, work_dir: Path, device: str) -> None:
        self.work_dir, self.device = work_dir, device

    run = staticmethod(run_script)

    def phantoms(self, name: str) -> Path:
        """Folder of a set of phantoms."""
        folder = self.work_dir / name
        if not (folder / "seriesuids.csv").is_file():  # the last that is written
            self.run("data/phantom.py", "--output_dir", folder, "--overwrite", "true", *PHANTOMS[name])
        return folder

    def processed(self, name: str, grid: str) -> Path:
        """Folder of a set that is prepared for a grid; scans that are done are not done again."""
        raw = self.phantoms(name)
        folder = raw / f"processed {grid}"
        if not (folder / "done").is_file():
            paths = ["--raw_data_dir", raw / "raw", "--annotations_path", raw / "annotations.csv"]
            paths += ["--lung_masks_dir", raw / "seg-lungs-LUNA16", "--output_dir", folder]
            self.run("preprocess.py", *GRIDS[grid], *paths)
            (folder / "done").touch()
        return folder

    def folder(self, name: str, seed: int) -> Path:
        """Folder of one training of a trial, and of its results."""
        return self.work_dir / "runs" / name.replace(" ", "_").replace(",", "") / str(seed)

    def train(self, name: str, seed: int) -> Path:
        """Trains a trial, or goes on with it; returns its folder."""
        trial, folder = TRIALS[name], self.folder(name, seed)
        if not (folder / "done").is_file():
            data = ["--data_dir", self.processed(trial.train, trial.grid), "--output_dir", folder]
            keep = ["--checkpoint_interval", 5, "--resume", "true"]
            self.run("train.py", *trial.training, *data, *keep, "--seed", seed, "--device", self.device)
            (folder / "done").touch()
        return folder

    def runs(self, name: str, seed: int) -> list[Path]:
        """Folders of the trainings whose weights a trial takes; trains what is missing."""
        trial = TRIALS[name]
        if trial.joined:
            return [run for one in TRIALS[trial.weights_of].seeds for run in self.runs(trial.weights_of, one)]
        return self.runs(trial.weights_of, seed) if trial.weights_of else [self.train(name, seed)]

    def checkpoint(self, name: str, seed: int) -> Path:
        """The checkpoint of a trial; makes it where it is missing."""
        trial, source = TRIALS[name], TRIALS[name].weights_of
        if trial.joined:
            path = self.folder(name, seed) / "joined.pth"
            if not path.is_file():
                members = [self.checkpoint(source, one) for one in TRIALS[source].seeds]
                self.run("data/ensemble.py", "--output_path", path, "--checkpoint_paths", *members)
            return path
        best = self.checkpoint(source, seed) if source else self.train(name, seed) / "checkpoints" / "best_model.pth"
        if not trial.tuned:
            return best
        path = best.with_name("tuned.pth")
        if not path.is_file():
            data = ["--data_dir", self.processed(trial.train, trial.grid), "--device", self.device]
            excluded = self.phantoms(trial.train) / "annotations_excluded.csv"
            self.run("validate.py", "--checkpoint_path", best, "--tune", path, *data, "--excluded_path", excluded)
        return path

    def validate(self, name: str, seed: int, test: str) -> Path:
        """Scores a trial on a set; returns the folder of its results."""
        trial, results = TRIALS[name], self.folder(name, seed) / test
        if not (results / "done").is_file():
            words = ["--data_dir", self.processed(test, trial.grid), "--output_dir", results, "--subset", "new"]
            words += ["--checkpoint_path", self.checkpoint(name, seed), "--device", self.device, *trial.scoring]
            words += ["--overwrite", "true"]  # of scans that failed
            self.run("validate.py", *words, "--excluded_path", self.phantoms(test) / "annotations_excluded.csv")
            (results / "done").touch()
        return results


def ceiling(bench: Bench, test: str, grid: str) -> float:
    """Mean Dice per scan, on the scans' own grids, of a network that would mark every voxel of a grid rightly.

    The truth there is every voxel whose centre lies in a nodule's sphere; scans without nodules have no Dice.
    """
    data_dir, found = bench.processed(test, grid), []
    for uid, path in find_scans(bench.phantoms(test) / "raw").items():
        processed = read_processed(data_dir, uid)
        own = Geometry.from_image(read_scan(path))
        image = processed.geometry.image(np.asarray(processed.mask))
        there_and_back = sitk.GetArrayFromImage(resample(image, own, linear=False, pixel_type=sitk.sitkUInt8))
        truth = np.zeros(own.shape_zyx, bool)
        for nodule in processed.metadata.nodules:
            offsets = np.ogrid[tuple(slice(size) for size in own.shape_zyx)]
            parts = zip(offsets, own.index(nodule.center_xyz), own.spacing_zyx, strict=True)
            truth |= sum(((offset - index) * step) ** 2 for offset, index, step in parts) <= nodule.diameter_mm**2 / 4
        if truth.any():
            found.append(2 * (there_and_back[truth] > 0).sum() / (truth.sum() + (there_and_back > 0).sum()))
    return float(np.mean(found))


class PlainUNet(LungNodule3DUNet):
    """MONAI's ``UNet`` as it is."""

    logit_gain = 1.0

    def _build(self) -> UNet:
        return UNet(spatial_dims=3, act="PRELU", **self.arguments | {"norm": "BATCH"})

    def expect(self, nodule_share: float) -> None:
        """Leaves the start as it is."""


def plain_row(bench: Bench, seed: int, epochs: int = 86, rate: float = 1e-3) -> dict[str, Any]:
    """The row of the same budget of plain MONAI code: its network, loss, transforms and loader, and torch's AdamW."""
    data_dir, test_dir = bench.processed("train", "default"), bench.processed("test8", "default")
    device, folder = select_device(bench.device), bench.folder(PLAIN, seed)
    split = make_split(data_dir, read_processed_list(data_dir), 0.5, seed)
    set_determinism(seed)
    layout = torch.channels_last_3d  # the same sums, a quarter faster on a CPU
    network = PlainUNet(channels=(16, 32, 64, 128), strides=(2, 2, 2)).to(device, memory_format=layout)
    loader = plain_loader(data_dir, split.train, 0 if device.type == "cpu" else 4, seed)
    loss, optimizer = DiceCELoss(sigmoid=True), torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    half = autocast_dtype(device, mixed_precision=True)
    parts, state_path = {"network": network, "optimizer": optimizer, "schedule": schedule}, folder / "state.pth"
    folder.mkdir(parents=True, exist_ok=True)
    done, seconds = 0, 0.0
    if state_path.is_file():  # the order of the samples and their augmentation begin anew
        state = torch.load(state_path, map_location=device, weights_only=True)
        done, seconds = state["epochs"], state["seconds"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in tqdm(range(done, epochs), initial=done, total=epochs, disable=None):
        start = time.perf_counter()
        for batch in loader:
            optimizer.zero_grad()
            with autocast(device, half):
                value = loss(network(batch["image"].to(device, memory_format=layout)), batch["mask"].to(device))
            value.backward()
            optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        state = {name: part.state_dict() for name, part in parts.items()}
        with atomic_path(state_path) as temporary:
            torch.save(state | {"epochs": epoch + 1, "seconds": seconds}, temporary)
    spacing = np.median([read_metadata(data_dir, uid).grid.spacing for uid in split.train], axis=0)
    settings, minutes = InferenceSettings(grid_spacing=tuple(spacing.tolist())), seconds / 60
    chosen = Validator(data_dir, device=bench.device, model=network, settings=settings, seriesuids=split.validation)
    score, uids = chosen.run_validation().min_score, read_processed_list(test_dir)
    scored = Validator(
        test_dir, device=bench.device, min_score=score, model=network, settings=settings, seriesuids=uids
    )
    result = scored.run_validation()
    excluded = read_excluded(bench.phantoms("test8") / "annotations_excluded.csv")
    curve = froc(result.candidates, result.nodules, excluded, uids)
    summary = result.summary | {"cpm": {"value": curve.cpm, "interval": curve.intervals[-1].tolist()}}
    summary |= {"by_size": table_by_size(result.nodules, curve).to_dict("records")}
    folder = folder / "test8"
    folder.mkdir(exist_ok=True)
    tables = {"validation_results": result.table, "nodule_results": result.nodules, "candidates": result.candidates}
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    return row_of(PLAIN, seed, "test8", epochs, minutes, torch.get_num_threads(), summary)


def row_of(
    name: str, seed: int, test: str, epochs: int, minutes: float, threads: int | None, summary: dict[str, Any]
) -> dict[str, Any]:
    """The row of results.csv for one training and one set."""
    cpm = summary.get("cpm", {"value": np.nan, "interval": [np.nan, np.nan]})
    row = {
        "trial": name,
        "seed": seed,
        "test": test,
        "epochs": epochs,
        "minutes": round(minutes, 1),
        "threads": threads,
        "processor": platform.processor() or platform.machine(),
        "dice_per_scan": summary["dice"]["mean"],
        "dice_pooled": summary["dice_pooled"],
        "nodules": summary["nodules"],
        "nodules_found": summary["nodules_found"],
        "false_positive_nodules": summary["false_positive_nodules"],
        "cpm": cpm["value"],
        "cpm_low": cpm["interval"][0],
        "cpm_high": cpm["interval"][1],
    }
    for size in summary["by_size"]:
        row |= {f"{kind} {size['diameter']}": size[kind] for kind in ("cpm", "dice_per_nodule")}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def rows_done() -> pd.DataFrame:
    """The rows of results.csv."""
    return pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=["trial", "seed", "test"])


def add_row(row: dict[str, Any]) -> None:
    """Adds a row to results.csv; the first one makes the file."""
    done, new = rows_done(), pd.DataFrame([row])
    write_csv(RESULTS, pd.concat([done, new], ignore_index=True) if len(done) else new)
    print(new.T.to_string(header=False), flush=True)


def gain(bench: Bench, better: str, than: str) -> str:
    """Paired gains in CPM and Dice per scan with 95 % intervals, over the trainings and test sets of both.

    Each draw takes scans with replacement, the same of both trials; nodules count with their scans. The trainings are
    those that both have in results.csv, and a network that joins several is held against each training of the other;
    how much they differ among themselves is not in the interval.

    Raises:
        InputError: They have no row in common.
    """
    done = rows_done()
    rows = [sorted(map(tuple, done.loc[done["trial"] == name, ["test", "seed"]].values)) for name in (better, than)]
    joined = TRIALS[better].joined or TRIALS[than].joined
    pairs = [(a, b) for a in rows[0] for b in rows[1] if a == b or (joined and a[0] == b[0])]
    check(bool(pairs), f"{better} and {than} have no training and test set in common in {RESULTS.name}; run both first")
    draws: dict[str, list[np.ndarray]] = {"Dice per scan": [], "Dice without excluded findings": [], "CPM": []}
    for (test, mine), (_, theirs) in pairs:
        folders = [bench.folder(better, mine) / test, bench.folder(than, theirs) / test]
        for folder in folders:
            check(
                folder.is_dir(),
                f"{folder} does not exist: {RESULTS.name} has its row, but this work_dir did not make it; name the one "
                "that did, or delete the row and run the trial",
            )
        excluded = read_excluded(bench.phantoms(test) / "annotations_excluded.csv")
        first, second = (ScoredScans.read(folder, excluded) for folder in folders)
        check_same_scans(first, second, *map(str, folders))
        seed = list(PHANTOMS).index(test)  # scans of other sets are drawn apart
        pair = [first.draws(seed), second.draws(seed)]
        for kind in draws:
            draws[kind].append(pair[0][kind] - pair[1][kind])
    told = ", ".join(f"seed {max(mine, theirs)} on {test}" for (test, mine), (_, theirs) in pairs)
    lines = [f"{better} over {than}, {told}:"]
    for kind, values in draws.items():
        total = np.mean(values, axis=0)
        low, high = np.nanquantile(total[1:], [0.025, 0.975])
        lines.append(f"  {kind} {total[0]:+.4f} (95 % interval {low:+.4f} to {high:+.4f})")
    return "\n".join(lines)


def main(
    trials: list[str] = [],  # noqa: B006 - never changed
    seeds: list[int] | None = None,
    compare: list[str] = [],  # noqa: B006 - never changed
    ceilings: bool = False,
    work_dir: Path = Path("data/learning"),
    device: str = "cuda",
) -> None:
    """Trains and scores trials; then prints the paired gain of one over another.

    Args:
        trials: Names in TRIALS.
        seeds: Seeds of the training; null takes those of each trial.
        compare: Two names; what the first one gains over the second.
        ceilings: Print the best Dice that each grid allows.
        work_dir: Folder for phantoms and trainings.
        device: 'cuda' or 'cpu'.
    """
    unknown = [name for name in [*trials, *compare] if name not in TRIALS]
    check(not unknown, f"trials must be among {', '.join(TRIALS)}, not {', '.join(unknown)}")
    check(len(compare) in (0, 2), f"compare takes two names, not {len(compare)}")
    bench = Bench(work_dir.resolve(), device)
    for name in trials:
        for seed in seeds or TRIALS[name].seeds:
            for test in TRIALS[name].tests:
                done = rows_done()
                if ((done["trial"] == name) & (done["seed"] == seed) & (done["test"] == test)).any():
                    print(f"{RESULTS.name} has {name}, seed {seed}, {test} already")
                    continue
                if name == PLAIN:
                    add_row(plain_row(bench, seed))
                    continue
                runs = bench.runs(name, seed)
                logs = [pd.read_csv(run / "log.csv") for run in runs]
                minutes = sum(log[["training_seconds", "validation_seconds"]].to_numpy().sum() for log in logs) / 60
                summary = read_json(bench.validate(name, seed, test) / "validation_summary.json")
                threads = load_checkpoint(runs[0] / "checkpoints" / "best_model.pth").progress["threads"]
                add_row(row_of(name, seed, test, len(logs[0]), float(minutes), threads, summary))
    for grid in GRIDS if ceilings else ():
        print(f"grid {grid}: a Dice per scan of {ceiling(bench, 'test8', grid):.3f} at best")
    if compare:
        print(gain(bench, *compare))


if __name__ == "__main__":
    auto_cli(main)
