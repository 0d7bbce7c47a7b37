"""The learning bench: each row is made once, and a stopped one goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import learning
from learning import Bench, Trial, main

TINY = ["--channels", "[4,8]", "--strides", "[2]", "--num_epochs", "2", "--validation.fraction", "0.5"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two tiny trials, whose rows go into a folder of their own."""
    sizes = ["--size_xyz", "[64,64,32]", "--min_diameter_mm", "12", "--num_processes", "1"]
    sets = {name: ["--num_scans", "3", "--seed", seed, *sizes] for name, seed in (("train", "1"), ("test8", "2"))}
    monkeypatch.setattr(learning, "PHANTOMS", sets)
    monkeypatch.setattr(learning, "GRIDS", {"default": ["--target_size", "[32,48,48]"]})
    first = Trial("default", TINY, tests=("test8",), seeds=(3,))
    other = Trial("default", [], tests=("test8",), seeds=(3,), weights_of="first", scoring=("--min_score", "0.2"))
    twice = Trial("default", TINY, seeds=(3, 4))
    tuned = Trial("default", TINY, weights_of="twice", tuned=True, seeds=(3, 4))
    joined = Trial("default", TINY, weights_of="twice", joined=True)
    trials = {"first": first, "other": other, "twice": twice, "tuned": tuned, "joined": joined}
    monkeypatch.setattr(learning, "TRIALS", trials)
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "results.csv")
    return tmp_path


def test_rows_are_made_once_and_compared(tiny, monkeypatch, capsys):
    commands = []

    def run(bench: Bench, script: str, *words: object) -> None:
        commands.append(script)
        if script == "train.py" and commands.count("train.py") == 1:
            raise KeyboardInterrupt
        subprocess.run([sys.executable, script, *map(str, words)], cwd=learning.ROOT, check=True)

    monkeypatch.setattr(Bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        main(["first"], work_dir=tiny / "work", device="cpu")
    assert not (tiny / "results.csv").exists()
    for _ in range(2):
        main(["first", "other"], compare=["first", "other"], work_dir=tiny / "work", device="cpu")
    assert commands == ["data/phantom.py", "preprocess.py"] + ["train.py"] * 2 + commands[:2] + ["validate.py"] * 2
    rows = pd.read_csv(tiny / "results.csv")
    assert rows[["trial", "seed", "test", "epochs"]].values.tolist() == [
        ["first", 3, "test8", 2],
        ["other", 3, "test8", 2],
    ]
    assert rows["nodules"].gt(0).all() and rows["dice_per_scan"].between(0, 1).all()
    printed = capsys.readouterr().out
    assert "first over other, seed 3 on test8:" in printed and "CPM +0.0000" in printed


def test_joined_network_is_held_against_each_of_its_trainings(tiny, monkeypatch):
    bench, rows = Bench(tiny / "work", "cpu"), [("twice", 3), ("twice", 4), ("joined", 0)]
    pd.DataFrame([(*row, "test8") for row in rows], columns=["trial", "seed", "test"]).to_csv(learning.RESULTS)
    for name, seed in rows:
        (bench.folder(name, seed) / "test8").mkdir(parents=True)

    class Scored:
        @staticmethod
        def read(folder: Path, excluded: object) -> Scored:
            scored = Scored()
            scored.seed = int(folder.parent.name)
            return scored

        def draws(self, seed: int):
            dice = np.full(9, self.seed / 10)
            return {"Dice per scan": dice, "Dice without excluded findings": dice, "CPM": np.full(9, 0.5)}

    monkeypatch.setattr(learning, "ScoredScans", Scored)
    monkeypatch.setattr(learning, "check_same_scans", lambda *words: None)
    monkeypatch.setattr(learning, "read_excluded", lambda path: None)
    monkeypatch.setattr(Bench, "phantoms", lambda bench, name: bench.work_dir / name)
    told = learning.gain(bench, "twice", "joined")
    assert "twice over joined, seed 3 on test8, seed 4 on test8:" in told
    assert "Dice per scan +0.3500 (95 % interval +0.3500 to +0.3500)" in told


def test_networks_are_joined_once(tiny, monkeypatch):
    bench, commands = Bench(tiny / "work", "cpu"), []
    for seed in (3, 4):
        bench.folder("twice", seed).mkdir(parents=True)
        (bench.folder("twice", seed) / "done").touch()

    def run(bench: Bench, script: str, *words: object) -> None:
        commands.append(words)
        path = Path(words[words.index("--output_path") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(Bench, "run", run)
    for _ in range(2):
        joined = bench.checkpoint("joined", 0)
    [words] = commands
    members = [bench.folder("twice", seed) / "checkpoints" / "best_model.pth" for seed in (3, 4)]
    assert words == ("--output_path", joined, "--checkpoint_paths", *members)
    assert bench.runs("joined", 0) == [bench.folder("twice", 3), bench.folder("twice", 4)]


def test_network_is_tuned_once(tiny, monkeypatch):
    bench, commands = Bench(tiny / "work", "cpu"), []
    best = bench.folder("twice", 4) / "checkpoints" / "best_model.pth"
    best.parent.mkdir(parents=True)
    (bench.folder("twice", 4) / "done").touch()
    prepared = bench.work_dir / "train" / "processed default"
    prepared.mkdir(parents=True)
    for name in ("done", "../seriesuids.csv"):
        (prepared / name).touch()

    def run(bench: Bench, script: str, *words: object) -> None:
        commands.append((script, *words))
        if "--tune" in words:
            Path(words[words.index("--tune") + 1]).touch()

    monkeypatch.setattr(Bench, "run", run)
    for _ in range(2):
        assert bench.checkpoint("tuned", 4) == best.with_name("tuned.pth")
    [tuning] = commands
    assert tuning[tuning.index("--checkpoint_path") + 1] == best


def test_grid_sets_a_ceiling(tiny):
    ceiling = learning.ceiling(Bench(tiny / "work", "cpu"), "test8", "default")
    assert 0.5 < ceiling < 1


def test_plain_code_is_scored_like_the_others(tiny):
    row = learning.plain_row(Bench(tiny / "work", "cpu"), seed=3, epochs=1)
    assert row["trial"] == learning.PLAIN and row["nodules"] > 0 and 0 <= row["dice_per_scan"] <= 1


def test_unknown_trials_and_pairs_without_a_row_are_refused(tiny):
    with pytest.raises(ValueError, match="trials must be among first, other, twice, tuned, joined, not secnd"):
        main(["secnd"], work_dir=tiny / "work")
    with pytest.raises(ValueError, match="compare takes two names, not 1"):
        main(compare=["first"], work_dir=tiny / "work")
    with pytest.raises(ValueError, match="first and other have no training and test set in common"):
        main(compare=["first", "other"], work_dir=tiny / "work")
