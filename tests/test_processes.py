"""Several processes under torchrun: the same training and the same results as one, shared out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dataset import ScanSampler, SharedBatches
from model import DiceBCELoss, load_checkpoint
from train import gather_samples
from utils import gather_objects, process_count, process_rank, read_split

ROOT = Path(__file__).resolve().parents[1]
# Dropout 0 and a norm within each sample: nothing depends on which process a sample lies in.
OPTIONS = {
    "device": "cpu",
    "mixed_precision": "false",
    "network": "subpixel_instance",
    "channels": "[4,8,8]",
    "strides": "[2,1]",
    "num_res_units": "0",
    "dropout": "0",
    "patches.size": "[16,16,16]",
    "patches.per_scan": "3",
    "batch_size": "4",
    "learning_rate": "0.01",
    "loss.per_sample": "true",
    "validation.fraction": "0.5",
    "checkpoint_interval": "1",
}


def run(processes: int, script: str, **options: object) -> str:
    """Runs a script on one thread, under torchrun where there are several processes."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / script), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two epochs by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    for name, processes in (("one", 1), ("two", 2)):
        run(processes, "train.py", data_dir=processed_dir, output_dir=folder / name, num_epochs=2, **OPTIONS)
    return {name: folder / name for name in ("one", "two")}


def same_file(one: Path, two: Path) -> bool:
    """Whether two files are the same but for the date that they give."""
    first, second = (re.sub(rb'"date": "[^"]*"', b"", path.read_bytes()) for path in (one, two))
    return first == second


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / "checkpoint_epoch_2.pth").weights


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(runs):
    logs = [
        pd.read_csv(runs[name] / "log.csv").drop(columns=["training_seconds", "validation_seconds"])
        for name in ("one", "two")
    ]
    pd.testing.assert_frame_equal(*logs, rtol=1e-4)
    one, two = (weights(runs[name]) for name in ("one", "two"))
    start = load_checkpoint(runs["one"] / "checkpoints" / "checkpoint_epoch_1.pth").weights
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-5) for name in one)
    assert not any(torch.allclose(one[name], start[name], rtol=1e-5, atol=1e-5) for name in one)


@pytest.mark.slow
def test_mistake_ends_all_processes_naming_it(runs, processed_dir):
    words = ["--data_dir", str(processed_dir), "--output_dir", str(runs["two"]), "--batch_size", "3", "--device", "cpu"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    command = [sys.executable, *launch, *words, "--overwrite", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "batch_size must be a multiple of the 2 processes, not 3" in done.stderr
    assert (runs["two"] / "checkpoints" / "best_model.pth").is_file()  # nothing was deleted


@pytest.mark.slow
def test_one_process_writes(runs):
    assert len(list(runs["two"].glob("logs_*/events*"))) == 1
    assert read_split(runs["two"] / "checkpoints" / "split.json") == read_split(runs["one"] / "checkpoints/split.json")


@pytest.mark.slow
def test_two_processes_resume_bit_identically(runs, processed_dir, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    for name in ("split.json", "checkpoint_epoch_1.pth"):
        (checkpoints / name).write_bytes((runs["two"] / "checkpoints" / name).read_bytes())
    run(2, "train.py", data_dir=processed_dir, output_dir=tmp_path, num_epochs=2, resume="true", **OPTIONS)
    whole, resumed = weights(runs["two"]), weights(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_two_processes_share_out_the_scans_of_a_validation(runs, processed_dir, tmp_path):
    for processes in (1, 2):
        options = {"data_dir": processed_dir, "output_dir": tmp_path / str(processes), "subset": "all"}
        options["checkpoint_path"] = runs["one"] / "checkpoints" / "best_model.pth"
        printed = run(processes, "validate.py", device="cpu", mixed_precision="false", **options)
        assert printed.count("tables and pictures") == 1
    for name in ("validation_results.csv", "nodule_results.csv", "candidates.csv", "validation_summary.json"):
        assert same_file(tmp_path / "1" / name, tmp_path / "2" / name)


@pytest.mark.slow
def test_two_processes_share_out_the_scans_of_an_inference(runs, processed_dir, tmp_path):
    for processes in (1, 2):
        options = {"data_dir": processed_dir, "output_dir": tmp_path / str(processes), "subset": "all"}
        options["checkpoint_path"] = runs["one"] / "checkpoints" / "best_model.pth"
        run(processes, "infer.py", device="cpu", mixed_precision="false", min_score=0, **options)
    names = sorted(str(path.relative_to(tmp_path / "1")) for path in (tmp_path / "1").rglob("*.*"))
    assert len([name for name in names if name.endswith(".png")]) == 4
    assert names == sorted(str(path.relative_to(tmp_path / "2")) for path in (tmp_path / "2").rglob("*.*"))
    for name in names:
        if Path(name).suffix in (".csv", ".json"):
            assert same_file(tmp_path / "1" / name, tmp_path / "2" / name), name
    assert json.loads((tmp_path / "2" / "inference_summary.json").read_text())["scans"]


def test_batches_are_shared_without_gap_or_overlap():
    sampler = ScanSampler(8, seed=0)
    whole = list(SharedBatches(sampler, 4))
    shares = [list(SharedBatches(sampler, 4, rank, count=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


def test_uneven_last_batch_is_filled_up_with_its_own_samples():
    sampler = ScanSampler(5, seed=0)
    *_, last = SharedBatches(sampler, 4)
    shares = [list(SharedBatches(sampler, 4, rank, count=2))[-1] for rank in (0, 1)]
    assert shares == [last, last]
    assert len(SharedBatches(sampler, 4, 0, 2)) == 2


def test_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="multiple of the 2 processes, not 3"):
        SharedBatches(ScanSampler(5, seed=0), 3, 0, 2)


def test_one_process_is_alone_without_torchrun():
    figures = torch.tensor(np.arange(6.0).reshape(2, 3))
    assert (process_count(), process_rank(), gather_objects("mine")) == (1, 0, ["mine"])
    assert gather_samples(figures) is figures


@pytest.mark.parametrize("per_sample", [False, True])
def test_gathered_figures_give_each_process_the_loss_of_the_whole_batch(per_sample):
    torch.manual_seed(0)
    logits, target = torch.randn(4, 1, 3, 3, 3), (torch.rand(4, 1, 3, 3, 3) > 0.8).float()
    whole = DiceBCELoss(per_sample=per_sample)(logits, target)
    shares = []
    DiceBCELoss(per_sample=per_sample, gather=lambda figures: shares.append(figures) or figures)(logits[2:], target[2:])
    joined = DiceBCELoss(per_sample=per_sample, gather=lambda figures: torch.cat([figures, shares[0]], dim=1))
    assert torch.allclose(joined(logits[:2], target[:2]), whole)
