"""The nodule score beside plainer and learnt ones, and ways to choose min_score, on candidates of scans never seen.

python tests/bench/compare_scores.py --checkpoint_path experiments/phantom/checkpoints/best_model.pth
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from real import middle_of_best
from settings import unseen_scans
from tqdm import tqdm

from data.rescoring import Features
from infer import NoduleInferencer
from utils import ANNOTATION_COLUMNS, read_processed
from validate import ExaminedScan, choose_min_score, excluded_findings, froc, learn_score

SCORES: dict[str, Callable[[Features], float]] = {
    "peak": lambda features: features.peak,
    "certainty": lambda features: features.certainty,
    "as it is": lambda features: features.score,
}

FEW, DRAWS = (3, 24), 100  # scans that choose a min_score, and how often they are drawn


def compare_choices(scans: Sequence[ExaminedScan], number: int) -> pd.DataFrame:
    """What min_scores that some random scans choose are worth on the others, by mean Dice without excluded findings.

    "As it is" is the choice of ``choose_min_score``, "highest Dice" the middle of those min_scores whose mean Dice is
    within NEARLY_AS_GOOD of the highest, "best possible" the best for the others.
    """
    limits, rng, rows = np.linspace(0, 1, 101), np.random.default_rng(0), []
    dice = pd.DataFrame([[scan.dice_without_excluded(limit) for limit in limits] for scan in scans])
    for _ in range(DRAWS):
        order = rng.permutation(len(scans))
        few, others = order[:number], order[number:]
        means = dice.iloc[others].mean().fillna(0)
        chosen = {
            "as it is": choose_min_score([scans[which] for which in few]),
            "highest Dice": limits[middle_of_best(dice.iloc[few].mean().fillna(0).to_numpy())],
            "best possible": limits[means.argmax()],
        }
        rows += [(name, limit, np.interp(limit, limits, means)) for name, limit in chosen.items()]
    table = pd.DataFrame(rows, columns=[f"min_score by {number} scans", "chosen", "Dice of the others"])
    return table.groupby(table.columns[0], sort=False).agg(["mean", "std"])


def compare(
    data_dir: Path = Path("data/phantom/test/processed"),
    checkpoint_path: Path = Path("experiments/phantom/checkpoints/best_model.pth"),
    excluded_path: Path = Path("data/phantom/test/annotations_excluded.csv"),
    device: str = "cuda",
) -> None:
    """Prints CPM and sensitivities of each score, and how the score as it is differs on the same draws of scans.

    Then it prints what each way to choose min_score is worth.

    "As it is" is the plain score, also where the checkpoint carries a learnt one. The learnt score of each half of the
    scans is that of the candidates of the other half.

    Args:
        data_dir: Folder of processed scans that training never saw.
        checkpoint_path: Checkpoint of train.py.
        excluded_path: Findings on which marks do not count as wrong, with those that preprocess.py noted.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
    """
    inferencer = NoduleInferencer(checkpoint_path, device=device)
    plain = replace(inferencer.settings, learnt_score=None)
    uids = unseen_scans(inferencer, checkpoint_path, data_dir)
    excluded = excluded_findings(data_dir, uids, excluded_path)
    scans = []
    for uid in tqdm(uids, unit="scan", disable=None):
        scan = read_processed(data_dir, uid)
        found = inferencer.find_candidates(inferencer.predict_probability(scan.image), scan.geometry, scan.image, plain)
        scans.append(ExaminedScan.of(scan, found, excluded=excluded))
    nodules = [(scan.seriesuid, *n.center_xyz, n.diameter_mm) for scan in scans for n in scan.annotated]
    annotations = pd.DataFrame(nodules, columns=list(ANNOTATION_COLUMNS))
    rescored = {name: [scan.rescored(score) for scan in scans] for name, score in SCORES.items()}
    if learnt := learn_score(scans):
        print(f"learnt from all: {learnt[0]}")
        rescored = {"learnt": learnt[1]} | rescored
    curves = {
        name: froc(pd.concat([scan.found.marks(scan.seriesuid) for scan in some]), annotations, excluded, uids)
        for name, some in rescored.items()
    }
    used = curves["as it is"]
    for name, curve in curves.items():
        low, high = curve.intervals[-1]
        print(f"{name:<20} CPM {curve.cpm:.4f} (95 % interval {low:.4f} to {high:.4f})  {curve.sensitivities.round(3)}")
        if curve is not used:
            low, high = np.quantile(used.cpm_draws - curve.cpm_draws, [0.025, 0.975])
            print(f"{'':<20} the score as it is has {used.cpm - curve.cpm:.4f} ({low:.4f} to {high:.4f}, paired) more")
    for number in FEW:
        if len(scans) >= 2 * number:
            print(compare_choices(scans, number).round(4).to_string())


if __name__ == "__main__":
    auto_cli(compare)
