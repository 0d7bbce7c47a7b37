"""How well scores tell nodules from other candidates in real scans that no training has seen.

python tests/bench/rescoring.py --real_dir FOLDER --luna16_dir FOLDER --trial averaged

The candidates are those of the trainings of ``real.py``, each of the fold that it did not see. What is learnt from
candidates is learnt from those of the other folds. A small network on the candidates, with their image and
probabilities as its channels, stands beside the logistic regression that ``validate.py --tune`` fits.

Nearly all nodules are those of cubes, and all other candidates those of whole scans, where what lies outside the lungs
is black. The network may learn to tell these apart, so its figures are upper bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli
from real import FOLDS, TRIALS, Bench, is_cube
from torch import Tensor, nn
from tqdm import tqdm

from data.rescoring import Features, fit_score
from infer import NoduleInferencer
from utils import ANNOTATION_COLUMNS, Box, ProcessedScan, check, read_processed, read_processed_list
from validate import FP_PER_SCAN, ExaminedScan, read_excluded

SIZE = 24  # voxels of 1 mm along each edge of what the small network sees
SHIFT = 2  # voxels by which training moves it
STEPS, BATCH, RATE = 600, 32, 2e-3


@dataclass(frozen=True)
class Candidate:
    """One of them.

    Args:
        fold: Fold of its scan.
        scan: Name of the scan.
        is_nodule: Whether it hits an annotated nodule.
        features: What is known of it.
        crop: float32 (2, z, y, x), image and probability around it, SHIFT wider on each side than the network sees.
    """

    fold: int
    scan: str
    is_nodule: bool
    features: Features
    crop: np.ndarray


def candidates_of(bench: Bench, trial: str, fold: int, seed: int) -> list[Candidate]:
    """Candidates of whole scans, and of cubes those that are nodules."""
    inferencer = NoduleInferencer(bench.train(trial, fold, seed), device=bench.device)
    data_dir, table, candidates = bench.real(fold), read_excluded(bench.excluded_path), []
    for uid in tqdm(read_processed_list(data_dir), unit="scan", disable=None):
        scan = read_processed(data_dir, uid)
        probability = inferencer.predict_probability(scan.image)
        noted = pd.DataFrame([(uid, *finding) for finding in scan.metadata.excluded], columns=ANNOTATION_COLUMNS)
        excluded = pd.concat([noted, table]) if len(noted) else table
        found = inferencer.find_candidates(probability, scan.geometry, scan.image)
        examined = ExaminedScan.of(scan, found, excluded=excluded)
        for candidate, is_nodule in examined.judged:
            if is_nodule or not is_cube(examined):
                crop = cut(scan, probability, np.rint(candidate.index_zyx).astype(int))
                assert candidate.features is not None
                candidates.append(Candidate(fold, uid, is_nodule, candidate.features, crop))
    return candidates


def cut(scan: ProcessedScan, probability: np.ndarray, center_zyx: np.ndarray) -> np.ndarray:
    """Image and probability, float32 (2, z, y, x), in a cube around a voxel; 0 where the scan ends."""
    size = SIZE + 2 * SHIFT
    lower = center_zyx - size // 2
    inside = np.maximum(lower, 0)
    box = Box.of_size(inside, np.minimum(lower + size, probability.shape) - inside).slices
    place = Box.of_size(inside - lower, np.array(probability[box].shape)).slices
    crop = np.zeros((2, size, size, size), np.float32)
    crop[0][place], crop[1][place] = np.asarray(scan.image[box]), probability[box]
    return crop


def small_network() -> nn.Sequential:
    """Logit (B, 1) of crops (B, 2, 24, 24, 24)."""
    layers: list[nn.Module] = []
    for channels_in, channels in ((2, 16), (16, 32), (32, 64)):
        layers += [nn.Conv3d(channels_in, channels, 3, padding=1), nn.BatchNorm3d(channels), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * (SIZE // 8) ** 3, 1))


def fit_network(candidates: Sequence[Candidate], seed: int) -> nn.Module:
    """A small network that is trained on as many nodules as others, shifted and mirrored at random."""
    torch.manual_seed(seed)
    rng, network = np.random.default_rng(seed), small_network().train()
    crops = torch.from_numpy(np.stack([candidate.crop for candidate in candidates]))
    truth = np.array([candidate.is_nodule for candidate in candidates])
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    kinds = [np.flatnonzero(truth), np.flatnonzero(~truth)]
    for _ in range(STEPS):
        chosen = np.concatenate([rng.choice(kind, BATCH // 2) for kind in kinds])
        start = rng.integers(0, 2 * SHIFT + 1, 3)
        batch = crops[chosen][(..., *Box.of_size(start, np.full(3, SIZE)).slices)]
        batch = batch.flip([axis + 2 for axis in np.flatnonzero(rng.random(3) < 0.5)])
        target = torch.from_numpy(truth[chosen].astype(np.float32))
        loss = nn.functional.binary_cross_entropy_with_logits(network(batch)[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def scores_of(network: nn.Module, candidates: Sequence[Candidate]) -> np.ndarray:
    """Logits of candidates, averaged over the eight mirror images."""
    middle = (..., *Box.of_size(np.full(3, SHIFT), np.full(3, SIZE)).slices)
    crops = torch.from_numpy(np.stack([candidate.crop for candidate in candidates]))[middle]
    looks: list[Tensor] = []
    for number in range(8):
        axes = [axis + 2 for axis in range(3) if number >> axis & 1]
        looks.append(network(crops.flip(axes))[:, 0])
    return torch.stack(looks).mean(dim=0).numpy()


def sensitivities(candidates: Sequence[Candidate], scores: np.ndarray, scans: int, cubes: int) -> np.ndarray:
    """Share of the cubes whose nodule is found at each of FP_PER_SCAN other marks a whole scan."""
    best: dict[str, float] = {}
    false = []
    for candidate, score in zip(candidates, scores, strict=True):
        if not candidate.is_nodule:
            false.append(float(score))
        elif candidate.scan.startswith("cube_"):
            best[candidate.scan] = max(score, best.get(candidate.scan, -np.inf))
    limits = [*sorted(false, reverse=True), -np.inf]
    found = np.array(list(best.values()))
    return np.array([(found > limits[min(int(rate * scans), len(false))]).sum() / cubes for rate in FP_PER_SCAN])


def main(
    real_dir: Path,
    luna16_dir: Path,
    trial: str = "averaged",
    seed: int = 0,
    folds: list[int] = list(range(FOLDS)),  # noqa: B006 - never changed
    work_dir: Path = Path("data/real"),
    device: str = "cuda",
) -> None:
    """Prints the sensitivities of scores for the cubes, and their mean.

    Args:
        real_dir: Folder of cubes, scans and excluded.csv.
        luna16_dir: Folder of two scans of LUNA16, its annotations and its excluded findings.
        trial: Name in the trials of real.py.
        seed: Seed of its training.
        folds: Quarters of the real data, two or more.
        work_dir: Folder for prepared data and trainings.
        device: 'cuda' or 'cpu'.
    """
    check(trial in TRIALS, f"trial must be among {', '.join(TRIALS)}, not {trial}")
    check(len(set(folds)) > 1, "folds must be two or more: what is learnt for one comes from the others")
    bench = Bench(work_dir.resolve(), real_dir.resolve(), luna16_dir.resolve(), device)
    candidates = [candidate for fold in folds for candidate in candidates_of(bench, trial, fold, seed)]
    uids = {uid for fold in folds for uid in read_processed_list(bench.real(fold))}
    cubes = sum(uid.startswith("cube_") for uid in uids)
    scores = {name: np.zeros(len(candidates)) for name in ("as it is", "peak", "learnt", "small network", "both")}
    for fold in tqdm(folds, unit="fold", disable=None):
        theirs = [candidate for candidate in candidates if candidate.fold != fold]
        ours = np.array([candidate.fold == fold for candidate in candidates])
        own = [candidate for candidate in candidates if candidate.fold == fold]
        learnt = fit_score([c.features for c in theirs], [c.is_nodule for c in theirs])
        scores["as it is"][ours] = [c.features.score for c in own]
        scores["peak"][ours] = [c.features.peak for c in own]
        scores["learnt"][ours] = [learnt.log_odds(c.features) for c in own]
        scores["small network"][ours] = scores_of(fit_network(theirs, seed), own)
        scores["both"][ours] = (scores["learnt"][ours] + scores["small network"][ours]) / 2
    print(
        f"{cubes} cubes, {len(uids) - cubes} whole scans, {sum(not c.is_nodule for c in candidates)} false candidates"
    )
    for name, values in scores.items():
        shares = sensitivities(candidates, values, len(uids) - cubes, cubes)
        print(f"{name:<14} mean {shares.mean():.3f}  at {FP_PER_SCAN}: {shares.round(2)}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
