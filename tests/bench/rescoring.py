"""How well scores tell nodules from other candidates in scans that no training has seen.

python tests/bench/rescoring.py phantoms --trial "recipe, patches of 32"
python tests/bench/rescoring.py real_scans --real_dir FOLDER --luna16_dir FOLDER --trial averaged

A small network on the candidates, with their image and probabilities as its channels, stands beside the logistic
regression that ``validate.py --tune`` fits. On phantoms both learn from the validation scans of a trial of
``learning.py``. On real scans they learn from the other quarters of ``real.py``, each by the training that did not see
it; nearly all nodules are those of cubes there, and all other candidates those of whole scans, where what lies outside
the lungs is black. The network may learn to tell these apart, so its figures on real scans are upper bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import learning
import numpy as np
import pandas as pd
import real
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from tqdm import tqdm

from data.rescoring import Features, fit_score
from infer import NoduleInferencer
from utils import (
    ANNOTATION_COLUMNS,
    CANDIDATE_COLUMNS,
    Box,
    ProcessedScan,
    Subset,
    check,
    choose_scans,
    read_metadata,
    read_processed,
    read_processed_list,
)
from validate import FP_PER_SCAN, ExaminedScan, excluded_findings, froc

SIZE = 24  # voxels of 1 mm along each edge of what the small network sees
SHIFT = 2  # voxels by which training moves it
STEPS, BATCH, RATE = 600, 32, 2e-3
SCORES = ("as it is", "peak", "learnt", "small network", "learnt and small network")


@dataclass(frozen=True)
class Candidate:
    """One of them.

    Args:
        scan: Name of the scan.
        center_xyz: World position in mm.
        is_nodule: Whether it hits an annotated nodule.
        features: What is known of it.
        crop: float32 (2, z, y, x), image and probability around it, SHIFT wider on each side than the network sees.
    """

    scan: str
    center_xyz: tuple[float, float, float]
    is_nodule: bool
    features: Features
    crop: np.ndarray


def candidates_of(
    inferencer: NoduleInferencer, data_dir: Path, uids: Sequence[str], excluded_path: Path
) -> list[Candidate]:
    """Candidates of scans without those on excluded findings."""
    excluded, candidates = excluded_findings(data_dir, uids, excluded_path), []
    for uid in tqdm(uids, unit="scan", disable=None):
        scan = read_processed(data_dir, uid)
        probability = inferencer.predict_probability(scan.image)
        found = inferencer.find_candidates(probability, scan.geometry, scan.image)
        for candidate, is_nodule in ExaminedScan.of(scan, found, excluded=excluded).judged:
            crop = cut(scan, probability, np.rint(candidate.index_zyx).astype(int))
            assert candidate.features is not None
            candidates.append(Candidate(uid, candidate.center_xyz, is_nodule, candidate.features, crop))
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
        looks.append(torch.cat([network(part.flip(axes))[:, 0] for part in crops.split(BATCH)]))
    return torch.stack(looks).mean(dim=0).numpy()


def sensitivities(candidates: Sequence[Candidate], scores: np.ndarray, scans: int, cubes: int) -> np.ndarray:
    """Share of the cubes whose nodule is found at each of FP_PER_SCAN other marks a whole scan."""
    best: dict[str, float] = {}
    false = []
    for candidate, score in zip(candidates, scores, strict=True):
        if not candidate.is_nodule:
            false.append(float(score))
        elif candidate.scan.startswith(real.CUBE):
            best[candidate.scan] = max(score, best.get(candidate.scan, -np.inf))
    limits = [*sorted(false, reverse=True), -np.inf]
    found = np.array(list(best.values()))
    return np.array([(found > limits[min(int(rate * scans), len(false))]).sum() / cubes for rate in FP_PER_SCAN])


def fit_scores(theirs: Sequence[Candidate], seed: int) -> Callable[[Sequence[Candidate]], dict[str, np.ndarray]]:
    """What gives candidates each of SCORES, with all that is learnt from theirs."""
    learnt = fit_score([c.features for c in theirs], [c.is_nodule for c in theirs])
    network = fit_network(theirs, seed)

    def scores(ours: Sequence[Candidate]) -> dict[str, np.ndarray]:
        plain, peak = ([getattr(c.features, name) for c in ours] for name in ("score", "peak"))
        log_odds = np.array([learnt.log_odds(c.features) for c in ours])
        by_network = scores_of(network, ours)
        values = (np.array(plain), np.array(peak), log_odds, by_network, (log_odds + by_network) / 2)
        return dict(zip(SCORES, values, strict=True))

    return scores


def candidates_of_phantoms(
    bench: learning.Bench, inferencer: NoduleInferencer, name: str, grid: str, subset: Subset
) -> tuple[list[Candidate], pd.DataFrame, list[str]]:
    """Candidates in some scans of a set, the annotated nodules of these scans, and their names."""
    data_dir = bench.processed(name, grid)
    uids = list(choose_scans(data_dir, inferencer.checkpoint_path, subset, inferencer.seen))
    rows = [(uid, *n.center_xyz, n.diameter_mm) for uid in uids for n in read_metadata(data_dir, uid).nodules]
    candidates = candidates_of(inferencer, data_dir, uids, bench.phantoms(name) / "annotations_excluded.csv")
    return candidates, pd.DataFrame(rows, columns=list(ANNOTATION_COLUMNS)), uids


def phantoms(
    trial: str = "recipe, patches of 32",
    seeds: list[int] | None = None,
    work_dir: Path = Path("data/learning"),
    device: str = "cuda",
) -> None:
    """Prints the CPM of each score on the test sets of a trial of ``learning.py``, and what it gains over the first.

    Where some of the sets were named beforehand, it is on these alone.

    Args:
        trial: Name in the trials of learning.py; what is missing of its phantoms and trainings is made.
        seeds: Seeds of the training; null takes those of the trial.
        work_dir: Folder for phantoms and trainings.
        device: 'cuda' or 'cpu'.
    """
    known = {name: one for name, one in learning.TRIALS.items() if name != learning.PLAIN and not one.joined}
    check(trial in known, f"trial must be among {', '.join(known)}, not {trial}")
    bench, grid, train = learning.Bench(work_dir.resolve(), device), known[trial].grid, known[trial].train
    tests = [test for test in known[trial].tests if test in learning.NAMED_BEFOREHAND] or known[trial].tests
    draws: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for seed in seeds or known[trial].seeds:
        inferencer = NoduleInferencer(bench.checkpoint(trial, seed), device=device)
        scores_of_each = fit_scores(candidates_of_phantoms(bench, inferencer, train, grid, "validation")[0], seed)
        for number, test in enumerate(tests):
            ours, nodules, uids = candidates_of_phantoms(bench, inferencer, test, grid, "new")
            for name, scores in scores_of_each(ours).items():
                marks = [(c.scan, *c.center_xyz, score) for c, score in zip(ours, scores, strict=True)]
                table = pd.DataFrame(marks, columns=list(CANDIDATE_COLUMNS))
                curve = froc(table, nodules, None, uids, seed=number)  # scans of other sets are drawn apart
                draws[name].append(np.array([curve.cpm, *curve.cpm_draws]))
    print(f"{trial}, {', '.join(tests)}: mean CPM, and what it gains (95 % interval, paired by scan)")
    for name, values in draws.items():
        mean = np.mean(values, axis=0)
        gain = mean - np.mean(draws[SCORES[0]], axis=0)
        low, high = np.quantile(gain[1:], [0.025, 0.975])
        print(f"{name:<26} {mean[0]:.4f} {gain[0]:+.4f} ({low:+.4f} to {high:+.4f})")


def real_scans(
    real_dir: Path,
    luna16_dir: Path,
    trial: str = "averaged",
    seed: int = 0,
    folds: list[int] = list(range(real.FOLDS)),  # noqa: B006 - never changed
    work_dir: Path = Path("data/real"),
    device: str = "cuda",
) -> None:
    """Prints the sensitivities of each score for the cubes, and their mean.

    Args:
        real_dir: Folder of cubes, scans and excluded.csv.
        luna16_dir: Folder of two scans of LUNA16, its annotations and its excluded findings.
        trial: Name in the trials of real.py.
        seed: Seed of its training.
        folds: Quarters of the real data, two or more.
        work_dir: Folder for prepared data and trainings.
        device: 'cuda' or 'cpu'.
    """
    check(trial in real.TRIALS, f"trial must be among {', '.join(real.TRIALS)}, not {trial}")
    check(len(set(folds)) > 1, "folds must be two or more: what is learnt for one comes from the others")
    bench = real.Bench(work_dir.resolve(), real_dir.resolve(), luna16_dir.resolve(), device)
    uids = {fold: read_processed_list(bench.real(fold)) for fold in folds}
    of_fold: dict[int, list[Candidate]] = {}
    for fold in folds:
        inferencer = NoduleInferencer(bench.train(trial, fold, seed), device=device)
        found = candidates_of(inferencer, bench.real(fold), uids[fold], bench.excluded_path)
        of_fold[fold] = [c for c in found if c.is_nodule or not c.scan.startswith(real.CUBE)]
    scored = [
        fit_scores([c for other in folds if other != fold for c in of_fold[other]], seed)(of_fold[fold])
        for fold in tqdm(folds, unit="fold", disable=None)
    ]
    candidates = [candidate for fold in folds for candidate in of_fold[fold]]
    names = [uid for fold in folds for uid in uids[fold]]
    cubes = sum(uid.startswith(real.CUBE) for uid in names)
    false = sum(not candidate.is_nodule for candidate in candidates)
    print(f"{cubes} cubes, {len(names) - cubes} whole scans, {false} false candidates")
    for name in SCORES:
        values = np.concatenate([scores[name] for scores in scored])
        shares = sensitivities(candidates, values, len(names) - cubes, cubes)
        print(f"{name:<26} mean {shares.mean():.3f}  at {FP_PER_SCAN}: {shares.round(2)}")


if __name__ == "__main__":
    auto_cli([phantoms, real_scans], as_positional=False)
