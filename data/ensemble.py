"""Joins checkpoints to one whose probabilities, or weights, are the mean of theirs.

python data/ensemble.py --checkpoint_paths experiments/fold*/checkpoints/best_model.pth --output_path ensemble.pth
python data/ensemble.py --checkpoint_paths fine_tuned.pth before.pth --shares '[0.75,0.25]' --output_path mean.pth
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from data.command_line import parse_command_line, run_main
from data.rescoring import mean_score
from model import (
    ENSEMBLE,
    EXTRAS,
    Checkpoint,
    InferenceSettings,
    checkpoint_file,
    load_checkpoint,
    save_checkpoint,
)
from utils import (
    SeenScans,
    Shape,
    atomic_path,
    check,
    describe_difference,
    seen_by,
    split_path,
)


class Ensembler:
    """Writes one checkpoint for several; ``infer.py``, ``validate.py`` and ``data/export.py`` take it as any other.

    Args:
        checkpoint_paths: Two or more checkpoints of scans prepared alike, of any networks, e.g. 'a.pth b.pth'.
        output_path: File to write, not beside a training's split.json, which is of that training alone.
        shares: Share of each in the mean of their weights, e.g. '[0.75,0.25]' of a fine-tuned network and the one that
            it began with (Wortsman et al. 2022, arXiv:2109.01903): one network, as fast as each. null keeps all of
            them, and averages their probabilities.
        overwrite: Replace a file that is there.

    Raises:
        InputError: They are fewer than two, there is not a share for each or they do not add up to 1, or the file has
            an impossible place.
    """

    def __init__(
        self,
        checkpoint_paths: list[Path],
        output_path: Path = Path("ensemble.pth"),
        shares: list[float] | None = None,
        overwrite: bool = False,
    ) -> None:
        check(len(checkpoint_paths) >= 2, f"checkpoint_paths must be two or more files, not {len(checkpoint_paths)}")
        if shares is not None:
            check(len(shares) == len(checkpoint_paths), f"shares must be {len(checkpoint_paths)}, not {len(shares)}")
            check(
                min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6),
                f"shares must be 0 or more and add up to 1, not {shares}",
            )
        check(output_path.suffix == ".pth", f"output_path must end in .pth, not {output_path}")
        check(
            not split_path(output_path).is_file(),
            f"{output_path.parent} holds the split.json of one training; name an output_path in another folder",
        )
        self.paths, self.output_path = [checkpoint_file(path) for path in checkpoint_paths], output_path
        self.shares, self.overwrite = shares, overwrite

    def join(self) -> Path:
        """Writes the file and returns its path.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            FileExistsError: There is a file of that name, and ``overwrite`` is false.
            InputError: The checkpoints do not fit together.
        """
        if self.output_path.exists() and not self.overwrite:
            raise FileExistsError(f"{self.output_path} exists; name another output_path, or set overwrite=True")
        checkpoints = [(path, load_checkpoint(path)) for path in self.paths]
        members = [replace(checkpoint, seen=seen_by(checkpoint.seen, path)) for path, checkpoint in checkpoints]
        joined = join_checkpoints(members, [str(path) for path in self.paths], self.shares)
        with atomic_path(self.output_path) as temporary:
            save_checkpoint(temporary, joined)
        return self.output_path


def join_checkpoints(
    members: Sequence[Checkpoint], names: Sequence[str], shares: Sequence[float] | None = None
) -> Checkpoint:
    """One checkpoint whose probabilities, or with shares whose weights, are the mean of those of the members.

    It has seen what any of them has seen. Its grid is the finest, its window the largest, and it looks at as many
    mirror images as the one that looks at most. Its ``min_score`` and learnt score are the means of theirs. With shares
    threshold, scores, cleaning and further looks are those of the member with the largest one.

    Args:
        members: Checkpoints.
        names: What they are called in errors.
        shares: Share of each in the mean of their weights, all together 1; None keeps all networks.

    Raises:
        InputError: They were prepared differently, but for the voxel size, do not say what they have seen, or are
            ensembles themselves; without shares they have other thresholds, cleaning or looks; or weights of different
            networks were to be averaged.
    """
    if shares is not None:
        leader = members[int(np.argmax(shares))].inference
        members = [replace(member, inference=_with_windows(leader, member.inference)) for member in members]
    finest = min(range(len(members)), key=lambda number: _voxel_mm3(members[number]))
    members, names = ([given[finest], *given[:finest], *given[finest + 1 :]] for given in (members, names))
    first = members[0]
    for member, name in zip(members, names, strict=True):
        _check_that_fits(member, first, name, names[0])
    network, arguments, weights = _keep_all(members) if shares is None else _average(members, names, shares)
    joined = Checkpoint(
        network=network,
        arguments=arguments,
        weights=weights,
        preprocessing=first.preprocessing,
        inference=_join_settings(members),
        training={},
        epoch=max(member.epoch for member in members),
        progress={},
        learnt=_join_ranges([member.learnt for member in members]),
        seen=_join_seen([member.seen for member in members]),
        about=" ".join(dict.fromkeys(member.about for member in members if member.about)),
    )
    if joined.inference.window is None:
        return joined
    divisor = joined.build_network().divisor  # what is missing to a multiple of it would be air in each window
    z, y, x = (size + -size % divisor for size in joined.inference.window)
    return replace(joined, inference=replace(joined.inference, window=(z, y, x)))


def _check_that_fits(member: Checkpoint, first: Checkpoint, name: str, first_name: str) -> None:
    """Raises InputError where a member cannot be joined with the first one."""
    check(member.network != ENSEMBLE, f"{name} is an ensemble itself; name its members")
    check(
        bool(member.seen),
        f"{name} does not say which scans it has seen; put the split.json of its training beside it, since these "
        "scans would otherwise be scored as new ones",
    )
    check(
        member.preprocessing | _spacing_of(first) == first.preprocessing,
        f"{name} takes scans that are prepared otherwise than those of {first_name}: "
        f"{describe_difference(member.preprocessing | _spacing_of(first), first.preprocessing)}",
    )
    theirs, ours = member.inference, first.inference
    check(
        theirs.threshold == ours.threshold,
        f"{name} has a threshold of {theirs.threshold:g}, {first_name} one of {ours.threshold:g}; they must be equal",
    )
    check(
        (theirs.learnt_score is None) == (ours.learnt_score is None),
        f"one of {name} and {first_name} has a score that was learnt, the other one has none; name checkpoints that "
        "are all tuned, or none of them",
    )
    check(
        theirs.learnt_score is None or not _scale_of(member, first),
        f"{name} has another voxel size than {first_name}, and both have scores that were learnt, which have no mean "
        "then; name the checkpoints that they had before they were tuned",
    )
    for option in EXTRAS.keys() - {"learnt_score"}:
        values = getattr(theirs, option), getattr(ours, option)
        check(values[0] == values[1], f"{option} of {name} is {values[0]}, that of {first_name} {values[1]}")
    check(
        (theirs.window is None) == (ours.window is None),
        f"one of {name} and {first_name} was trained on patches, the other one on whole scans",
    )


def _keep_all(members: Sequence[Checkpoint]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and weights of the network that averages the probabilities of several."""
    first = members[0]
    networks = [
        {"network": member.network, "arguments": member.arguments} | _scale_of(member, first) for member in members
    ]
    weights = {
        f"members.{number}.{name}": value
        for number, member in enumerate(members)
        for name, value in member.weights.items()
    }
    return ENSEMBLE, {"members": networks}, weights


def _average(
    members: Sequence[Checkpoint], names: Sequence[str], shares: Sequence[float]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and weights of the network whose weights are the mean of theirs; counters are the first's."""
    first = members[0]
    for member, name in zip(members, names, strict=True):
        alike = [{"network": one.network} | one.arguments | {"dropout": None} for one in (member, first)]
        check(
            alike[0] == alike[1] and not _scale_of(member, first),
            f"{name} has another network or voxel size than {names[0]}, so their weights have no mean; without shares "
            "their probabilities are averaged",
        )
    weights = {name: value.clone() for name, value in first.weights.items()}
    for name, value in weights.items():
        if value.is_floating_point():
            values = torch.stack([member.weights[name] for member in members])
            weights[name] = torch.tensordot(torch.tensor(shares), values.float(), dims=1)
    return first.network, first.arguments, weights


def _spacing_of(member: Checkpoint) -> dict[str, Any]:
    """Voxel size (x, y, z) in mm, as the preprocessing has it; nothing where scans are stretched to one shape."""
    given = member.preprocessing
    is_known = "target_spacing" in given and given.get("target_size") is None
    return {"target_spacing": given["target_spacing"]} if is_known else {}


def _voxel_mm3(member: Checkpoint) -> float:
    """Volume of its voxels; infinite where scans are stretched to one shape."""
    return math.prod(_spacing_of(member).get("target_spacing", [math.inf]))


def _factors(member: Checkpoint, first: Checkpoint) -> np.ndarray:
    """Its voxels along the axes (z, y, x), over those of the first; all 1 where that is not known."""
    own, ours = (np.array(_spacing_of(one).get("target_spacing", [1.0] * 3)) for one in (member, first))
    return (ours / own)[::-1]


def _scale_of(member: Checkpoint, first: Checkpoint) -> dict[str, list[float]]:
    """How the image is shrunk for a member of an ensemble."""
    factors = _factors(member, first).tolist()
    return {} if factors == [1.0] * 3 else {"scale": factors}


def _largest(windows: Sequence[Shape | None], factors: Sequence[np.ndarray]) -> Shape | None:
    """The smallest window on the first member's grid that holds those of all members on theirs."""
    on_grid = [np.ceil(np.divide(one, shrunk) - 1e-6) for one, shrunk in zip(windows, factors, strict=True) if one]
    return tuple(np.max(on_grid, axis=0).astype(int).tolist()) if on_grid else None


def _with_windows(settings: InferenceSettings, of: InferenceSettings) -> InferenceSettings:
    """Settings with windows and grid of others."""
    return replace(settings, window=of.window, first_window=of.first_window, grid_spacing=of.grid_spacing)


def _join_settings(members: Sequence[Checkpoint]) -> InferenceSettings:
    first, settings = members[0], [member.inference for member in members]
    factors = [_factors(member, first) for member in members]
    windows = [one.window for one in settings]
    is_wider = any(one.first_window for one in settings)
    firsts = [(one.first_window or one.window) if is_wider else None for one in settings]
    grids = [member.inference.grid_spacing for member in members if not _scale_of(member, first)]
    known = [grid for grid in grids if grid is not None]
    # Of members that have the same score, as with shares, it is kept as it is.
    scores = list(dict.fromkeys(one.learnt_score for one in settings if one.learnt_score is not None))
    return replace(
        settings[0],
        min_score=float(np.mean([one.min_score for one in settings])),
        mirrors=max(one.mirrors for one in settings),
        window=_largest(windows, factors),
        first_window=_largest(firsts, factors),
        grid_spacing=tuple(np.mean(known, axis=0).tolist()) if len(known) == len(grids) else None,
        learnt_score=mean_score(scores) if scores else None,
    )


def _join_ranges(ranges: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Ranges that hold all of theirs; what one of them does not tell is left out."""
    names = set.intersection(*(set(one) for one in ranges))
    return {name: (min(r[name][0] for r in ranges), max(r[name][1] for r in ranges)) for name in sorted(names)}


PARTS = ("train", "earlier", "validation")  # of seen scans, the first the strictest


def _join_seen(parts: Sequence[SeenScans]) -> SeenScans:
    """All scans that one of them has seen; what one learnt from, itself or by its initial weights, counts as that."""
    joined: SeenScans = {}
    for seen in parts:
        for uid, (patient, part) in seen.items():
            known, before = joined.get(uid, (None, part))
            joined[uid] = (patient or known, min(part, before, key=PARTS.index))
    return joined


def _command(argv: list[str] | None) -> int:
    (options, _), _ = parse_command_line(Ensembler, "join", argv=argv)
    print(Ensembler(**options).join())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are Ensembler's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
