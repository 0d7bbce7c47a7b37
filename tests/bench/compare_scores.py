"""CPM of the nodule score beside those of plainer ones, on the same candidates of scans that training never saw.

python tests/bench/compare_scores.py --checkpoint_path experiments/phantom/checkpoints/best_model.pth
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from jsonargparse import auto_cli
from tqdm import tqdm

from infer import NoduleInferencer, find_candidates, nodule_table, score_candidate
from utils import ANNOTATION_COLUMNS, read_processed, read_processed_list
from validate import froc, read_excluded

SCORES = {
    "highest probability": lambda voxels, geometry, probability: float(probability[tuple(voxels.T)].max()),
    "mean probability": lambda voxels, geometry, probability: float(probability[tuple(voxels.T)].mean()),
    "the score used": score_candidate,
}


def compare(
    data_dir: Path = Path("data/phantom/test/processed"),
    checkpoint_path: Path = Path("experiments/phantom/checkpoints/best_model.pth"),
    excluded_path: Path = Path("data/phantom/test/annotations_excluded.csv"),
    device: str = "cuda",
) -> None:
    """Prints CPM and sensitivities of each score, and how the score used differs on the same draws of scans.

    Of more than 100 candidates in a scan, each score chooses its own.

    Args:
        data_dir: Folder of processed scans that training never saw.
        checkpoint_path: Checkpoint of train.py.
        excluded_path: Findings on which marks do not count as wrong.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
    """
    inferencer = NoduleInferencer(checkpoint_path, device=device)
    uids = read_processed_list(data_dir)
    marks: dict[str, list[pd.DataFrame]] = {name: [] for name in SCORES}
    nodules = []
    for uid in tqdm(uids, unit="scan", disable=None):
        scan = read_processed(data_dir, uid)
        nodules += [(uid, *n.center_xyz, n.diameter_mm) for n in scan.metadata.nodules]
        probability = inferencer.predict_probability(scan.image)
        for name, score in SCORES.items():
            threshold, grid = inferencer.settings.threshold, inferencer.settings.grid_spacing
            found = find_candidates(probability, scan.geometry, threshold, grid, score=score)
            marks[name].append(nodule_table(uid, found.candidates))
    annotations = pd.DataFrame(nodules, columns=list(ANNOTATION_COLUMNS))
    excluded = read_excluded(excluded_path)
    curves = {name: froc(pd.concat(tables), annotations, excluded, uids) for name, tables in marks.items()}
    used = curves["the score used"]
    for name, curve in curves.items():
        low, high = curve.intervals[-1]
        print(f"{name:<20} CPM {curve.cpm:.4f} (95 % interval {low:.4f} to {high:.4f})  {curve.sensitivities.round(3)}")
        if curve is not used:
            low, high = np.quantile(used.cpm_draws - curve.cpm_draws, [0.025, 0.975])
            print(f"{'':<20} the score used has {used.cpm - curve.cpm:.4f} ({low:.4f} to {high:.4f}, paired) more")


if __name__ == "__main__":
    auto_cli(compare)
