"""What further looks and cleaner masks gain: a network by other settings, on scans that it did not learn from.

python tests/bench/settings.py --data_dir data/phantom/test/processed --about "small recipe, seed 8"

Each setting has its row in settings.csv, with what it gains over the checkpoint's own settings. Its min_score is chosen
anew, that of each half of the scans on the other half. Rows that are there are not made again.
Settings that differ in the mask alone share a look.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from tqdm import tqdm

from infer import NoduleInferencer
from model import Cleaning, load_checkpoint
from utils import (
    LEARNT_FROM,
    check,
    choose_scans,
    read_processed,
    read_processed_list,
    write_csv,
)
from validate import (
    NODULE_RESULT_COLUMNS,
    ExaminedScan,
    ScoredScans,
    choose_min_score,
    excluded_findings,
    halves_by_patient,
)

RESULTS = Path(__file__).with_name("settings.csv")
PRESENT = "as the checkpoint says"
SETTINGS: dict[str, dict[str, Any]] = {
    PRESENT: {},
    "no mirror image": {"mirrors": 0},
    "1 mirror image": {"mirrors": 1},
    "3 mirror images": {"mirrors": 3},
    "7 mirror images": {"mirrors": 7},
    "7 mirror images, 2 quarter turns": {"mirrors": 9},
    "7 mirror images, 2 quarter turns, their 6 mirror images": {"mirrors": 15},
    "as the checkpoint says, and shrunk by 0.8": {"scales": (0.8,)},
    "as the checkpoint says, and magnified by 1.25": {"scales": (1.25,)},
    "as the checkpoint says, and by 0.8 and 1.25": {"scales": (0.8, 1.25)},
    "3 mirror images everywhere": {"mirrors": 3, "everywhere": True},
    "threshold 0.3": {"threshold": 0.3},
    "threshold 0.4": {"threshold": 0.4},
    "threshold 0.6": {"threshold": 0.6},
    "conditional random field": {"cleaning": Cleaning(crf=True)},
    "opening, 1 mm": {"cleaning": Cleaning(opening_mm=1.0)},
    "opening, 2 mm": {"cleaning": Cleaning(opening_mm=2.0)},
    "closing, 2 mm": {"cleaning": Cleaning(closing_mm=2.0)},
    "3 mm or larger": {"cleaning": Cleaning(smallest_mm=3.0)},
    "4 mm or larger": {"cleaning": Cleaning(smallest_mm=4.0)},
    "in the lungs": {"cleaning": Cleaning(in_lungs=True)},
}


def looks_of(name: str) -> tuple[tuple[str, Any], ...]:
    """Those of a setting that the probabilities depend on."""
    return tuple((key, value) for key, value in SETTINGS[name].items() if key in ("mirrors", "scales", "everywhere"))


def unseen_scans(inferencer: NoduleInferencer, checkpoint_path: Path, data_dir: Path) -> list[str]:
    """All scans of a folder.

    Raises:
        InputError: The network may have seen some, or they are not prepared as those that it learnt from.
    """
    parts = choose_scans(data_dir, checkpoint_path, "all", inferencer.seen)
    learnt = [uid for uid, part in parts.items() if part in (*LEARNT_FROM, "validation", "unknown")]
    check(not learnt, f"{checkpoint_path} may have seen {len(learnt)} of these scans; name a data_dir of others")
    inferencer.check_prepared_alike(data_dir, list(parts))
    return list(parts)


def examine(
    checkpoint_path: Path, data_dir: Path, names: Sequence[str], excluded_path: Path, device: str
) -> dict[str, tuple[list[ExaminedScan], float]]:
    """{name: (scans and what is found in them, seconds a scan)} of settings that look in the same way."""
    inferencer = NoduleInferencer(checkpoint_path, device=device, **dict(looks_of(names[0])))
    choices = {name: replace(inferencer.settings, **SETTINGS[name]) for name in names}
    uids = unseen_scans(inferencer, checkpoint_path, data_dir)
    excluded = excluded_findings(data_dir, uids, excluded_path)
    found: dict[str, list[ExaminedScan]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for uid in tqdm(uids, unit="scan", desc=names[0], disable=None):
        scan = read_processed(data_dir, uid)
        start = time.perf_counter()
        probability = inferencer.predict_probability(scan.image)
        looked = time.perf_counter() - start
        for name, choice in choices.items():
            start = time.perf_counter()
            candidates = inferencer.find_candidates(probability, scan.geometry, scan.image, choice)
            seconds[name] += looked + time.perf_counter() - start
            found[name].append(ExaminedScan.of(scan, candidates, excluded=excluded))
    return {name: (found[name], seconds[name] / len(uids)) for name in names}


def score(scans: Sequence[ExaminedScan], excluded: pd.DataFrame) -> ScoredScans:
    """Results at a min_score that each scan has no part in."""
    half_of = halves_by_patient(scans)
    check(len(set(half_of)) == 2, "one patient's scans cannot choose a min_score for each other; name more scans")
    chosen = {
        half: choose_min_score([scan for scan, own in zip(scans, half_of, strict=True) if own != half])
        for half in (False, True)
    }
    min_scores = [chosen[half] for half in half_of]
    table = [{"seriesuid": s.seriesuid} | s.row(least) for s, least in zip(scans, min_scores, strict=True)]
    nodules = [row for s, least in zip(scans, min_scores, strict=True) for row in s.nodule_rows(least)]
    return ScoredScans(
        pd.DataFrame(table),
        pd.DataFrame(nodules, columns=list(NODULE_RESULT_COLUMNS)),
        pd.concat([scan.found.marks(scan.seriesuid) for scan in scans], ignore_index=True),
        excluded,
    )


def main(
    about: str,
    data_dir: Path = Path("data/phantom/test/processed"),
    checkpoint_path: Path = Path("experiments/phantom/checkpoints/best_model.pth"),
    excluded_path: Path = Path("data/phantom/test/annotations_excluded.csv"),
    settings: list[str] = list(SETTINGS),  # noqa: B006 - never changed
    device: str = "cuda",
) -> None:
    """Makes the missing rows of settings.csv.

    Args:
        about: What the network and the scans are called in the table.
        data_dir: Folder of processed scans that training never saw.
        checkpoint_path: Checkpoint of train.py.
        excluded_path: Findings that count neither way, with those that preprocess.py noted.
        settings: Names in SETTINGS.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
    """
    unknown = [name for name in settings if name not in SETTINGS]
    check(not unknown, f"settings must be among {', '.join(SETTINGS)}, not {', '.join(unknown)}")
    done = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=["about", "checkpoint", "setting"])
    checkpoint = load_checkpoint(checkpoint_path).sha256[:16]
    ours = done[(done["about"] == about) & (done["checkpoint"] == checkpoint)]
    missing = [name for name in settings if name not in set(ours["setting"])]
    if not missing:
        return
    excluded = excluded_findings(data_dir, read_processed_list(data_dir), excluded_path)
    present: dict[str, np.ndarray] = {}
    wanted = [PRESENT, *(name for name in missing if name != PRESENT)]
    for looks in dict.fromkeys(map(looks_of, wanted)):
        names = [name for name in wanted if looks_of(name) == looks]
        for name, (scans, seconds) in examine(checkpoint_path, data_dir, names, excluded_path, device).items():
            draws = score(scans, excluded).draws()
            present = present or draws
            row: dict[str, Any] = {"about": about, "checkpoint": checkpoint, "setting": name, "scans": len(scans)}
            row["seconds"] = round(seconds, 2)
            for kind, values in (("dice", draws["Dice per scan"]), ("cpm", draws["CPM"])):
                gains = values - present["Dice per scan" if kind == "dice" else "CPM"]
                low, high = np.nanquantile(gains[1:], [0.025, 0.975])
                figures = {kind: values[0], f"{kind}_gain": gains[0], f"{kind}_low": low, f"{kind}_high": high}
                row |= {key: round(float(value), 4) for key, value in figures.items()}
            if name in missing:
                done = pd.concat([done, pd.DataFrame([row])], ignore_index=True) if len(done) else pd.DataFrame([row])
                write_csv(RESULTS, done)
                print(pd.DataFrame([row]).T.to_string(header=False), flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
