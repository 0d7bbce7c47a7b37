"""Joins checkpoints to one whose probabilities are the mean of theirs.

python data/ensemble.py --checkpoint_paths experiments/fold*/checkpoints/best_model.pth --output_path ensemble.pth
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

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
    atomic_path,
    check,
    describe_difference,
    parse_command_line,
    run_main,
    seen_by,
    split_path,
)


class Ensembler:
    """Writes one checkpoint for several; ``infer.py``, ``validate.py`` and ``data/export.py`` take it as any other.

    Args:
        checkpoint_paths: Two or more checkpoints of scans prepared alike, of any networks, e.g. 'a.pth b.pth'.
        output_path: File to write, not beside a training's split.json, which is of that training alone.
        overwrite: Replace a file that is there.

    Raises:
        InputError: They are fewer than two, or the file has an impossible place.
    """

    def __init__(
        self, checkpoint_paths: list[Path], output_path: Path = Path("ensemble.pth"), overwrite: bool = False
    ) -> None:
        check(len(checkpoint_paths) >= 2, f"checkpoint_paths must be two or more files, not {len(checkpoint_paths)}")
        check(output_path.suffix == ".pth", f"output_path must end in .pth, not {output_path}")
        check(
            not split_path(output_path).is_file(),
            f"{output_path.parent} holds the split.json of one training; name an output_path in another folder",
        )
        self.paths, self.output_path = [checkpoint_file(path) for path in checkpoint_paths], output_path
        self.overwrite = overwrite

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
        joined = join_checkpoints(members, [str(path) for path in self.paths])
        with atomic_path(self.output_path) as temporary:
            save_checkpoint(temporary, joined)
        return self.output_path


def join_checkpoints(members: Sequence[Checkpoint], names: Sequence[str]) -> Checkpoint:
    """One checkpoint whose probabilities are the mean of those of the members.

    It has seen what any of them has seen. Its ``min_score`` is the mean of theirs, its window the largest, and it looks
    at as many mirror images as the one that looks at most.

    Args:
        members: Checkpoints.
        names: What they are called in errors.

    Raises:
        InputError: They were prepared differently, have other thresholds, do not say what they have seen, or are
            ensembles themselves.
    """
    first = members[0]
    for member, name in zip(members, names, strict=True):
        check(member.network != ENSEMBLE, f"{name} is an ensemble itself; name its members")
        check(
            bool(member.seen),
            f"{name} does not say which scans it has seen; put the split.json of its training beside it, since these "
            "scans would otherwise be scored as new ones",
        )
        check(
            member.preprocessing == first.preprocessing,
            f"{name} takes scans that are prepared otherwise than those of {names[0]}: "
            f"{describe_difference(member.preprocessing, first.preprocessing)}",
        )
        theirs, ours = member.inference, first.inference
        check(
            theirs.threshold == ours.threshold,
            f"{name} has a threshold of {theirs.threshold:g}, {names[0]} one of {ours.threshold:g}; they must be equal",
        )
        for option in EXTRAS:
            values = getattr(theirs, option), getattr(ours, option)
            check(values[0] == values[1], f"{option} of {name} is {values[0]}, that of {names[0]} {values[1]}")
        check(
            (theirs.window is None) == (ours.window is None),
            f"one of {name} and {names[0]} was trained on patches, the other one on whole scans",
        )
    return Checkpoint(
        network=ENSEMBLE,
        arguments={"members": [{"network": member.network, "arguments": member.arguments} for member in members]},
        weights={
            f"members.{number}.{name}": value
            for number, member in enumerate(members)
            for name, value in member.weights.items()
        },
        preprocessing=first.preprocessing,
        inference=_join_settings([member.inference for member in members]),
        training={},
        epoch=max(member.epoch for member in members),
        progress={},
        learnt=_join_ranges([member.learnt for member in members]),
        seen=_join_seen([member.seen for member in members]),
        about=" ".join(dict.fromkeys(member.about for member in members if member.about)),
    )


def _join_settings(settings: Sequence[InferenceSettings]) -> InferenceSettings:
    windows, grids = ([getattr(s, name) for s in settings] for name in ("window", "grid_spacing"))
    return replace(
        settings[0],
        min_score=float(np.mean([s.min_score for s in settings])),
        mirrors=max(s.mirrors for s in settings),
        window=None if None in windows else tuple(np.max(windows, axis=0).tolist()),
        grid_spacing=None if None in grids else tuple(np.mean(grids, axis=0).tolist()),
    )


def _join_ranges(ranges: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Ranges that hold all of theirs; what one of them does not tell is left out."""
    names = set.intersection(*(set(one) for one in ranges))
    return {name: (min(r[name][0] for r in ranges), max(r[name][1] for r in ranges)) for name in sorted(names)}


def _join_seen(parts: Sequence[SeenScans]) -> SeenScans:
    """All scans that one of them has seen; what one learnt from counts as learnt from."""
    joined: SeenScans = {}
    for seen in parts:
        for uid, (patient, part) in seen.items():
            known, before = joined.get(uid, (None, part))
            joined[uid] = (patient or known, "train" if "train" in (part, before) else before)
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
