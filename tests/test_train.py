"""The Trainer: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import infer
import model
import train
from data.command_line import parse_command_line
from data.ensemble import join_checkpoints
from dataset import Augmentation, Patches
from infer import NoduleInferencer
from model import DiceBCELoss, SegmentationNetwork, SubpixelUNet, load_checkpoint, save_checkpoint
from preprocess import LUNA16Preprocessor
from train import AUGMENTATION, LossSettings, Speed, Trainer, ValidationSettings, seed_everything
from utils import (
    IGNORED,
    InputError,
    UserError,
    folder_lock,
    read_metadata,
    read_processed,
    read_processed_list,
    read_split,
    write_metadata,
)
from validate import Validator

ROOT = Path(__file__).resolve().parents[1]
CPU = {**TINY, "device": "cpu", "mixed_precision": False}
THREE_LEVELS = {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 2}
PATCHES = {"patches": Patches((16, 16, 16), per_scan=2)}


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Lets a training die, as by a power cut, once it has done some epochs."""
    run_epoch = Trainer._run_epoch

    def run(self: Trainer) -> None:
        if self.epoch == epochs:
            raise Stopped
        run_epoch(self)

    monkeypatch.setattr(Trainer, "_run_epoch", run)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / name).weights


def test_writes_checkpoints_split_log_and_tensorboard(run_dir):
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"best_model.pth", "checkpoint_epoch_2.pth", "split.json"}
    assert pd.read_csv(run_dir / "log.csv")["epoch"].tolist() == [1, 2]
    assert matplotlib.image.imread(run_dir / "curves.png").shape == (400, 1000, 4)
    assert list(run_dir.glob("logs_*/events*"))


def test_full_disk_under_tensorboard_is_named_and_the_epoch_kept(processed_dir, tmp_path, monkeypatch, caplog):
    class Full(SummaryWriter):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "SummaryWriter", Full)
    caplog.set_level("INFO")
    with pytest.raises(OSError, match=r"run.logs_\S+ could not be written \(No space left on device"):
        Trainer(processed_dir, tmp_path / "run", num_epochs=1, **CPU).train()
    assert "epoch 1 is kept in" in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_epoch_1.pth").is_file()


def test_training_without_a_nodule_stops_before_the_first_epoch(phantom_dir, tmp_path):
    (tmp_path / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    paths = (phantom_dir / "raw", tmp_path / "annotations.csv", phantom_dir / "seg-lungs-LUNA16", tmp_path / "data")
    LUNA16Preprocessor(*paths, target_size=(16, 16, 16), num_processes=1).process_all()
    with pytest.raises(InputError, match="no training scan has a nodule in its mask, so nothing can be learnt"):
        Trainer(tmp_path / "data", tmp_path / "run", num_epochs=1, **CPU).train()
    assert not list((tmp_path / "run").rglob("*.pth"))


def test_split_covers_all_scans_once(run_dir, processed_dir):
    split = read_split(run_dir / "checkpoints" / "split.json")
    assert sorted(list(split.train) + list(split.validation)) == read_processed_list(processed_dir)


def test_fold_is_held_out_and_written_to_the_split(fold_run, processed_dir):
    uids = read_processed_list(processed_dir)
    split = read_split(fold_run / "checkpoints" / "split.json")
    assert (split.fold, list(split.test)) == (2, [uids[2]])
    assert sorted(list(split.train) + list(split.validation)) == [uids[0], uids[1], uids[3]]


def test_training_never_opens_a_scan_of_the_fold(fold_run):
    assert not (fold_run / "data" / "images" / f"{read_processed_list(fold_run / 'data')[2]}.npy").exists()
    assert (fold_run / "checkpoints" / "best_model.pth").is_file()


def test_resume_with_another_fold_is_refused(tmp_path, fold_run):
    shutil.copytree(fold_run, tmp_path / "run")
    with pytest.raises(ValueError, match="is not the split of these scans and settings"):
        other = ValidationSettings(fold=1)
        Trainer(fold_run / "data", tmp_path / "run", num_epochs=1, validation=other, resume=True, **CPU)


def test_checkpoint_carries_network_and_preprocessing(run_dir):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    assert checkpoint.arguments["channels"] == [4, 8]
    assert checkpoint.preprocessing["target_size"] == [32, 48, 48]


@pytest.mark.parametrize(
    ("name", "loss"), [("subpixel", "focal"), ("nnunet", "boundary"), ("vnet", "tversky"), ("segresnet", "dice_focal")]
)
def test_network_of_another_name_is_trained_kept_and_used(processed_dir, tmp_path, name, loss):
    trainer = Trainer(
        processed_dir, tmp_path, num_epochs=2, network=name, loss=LossSettings(loss), **CPU | THREE_LEVELS
    )
    trainer.train()
    assert getattr(trainer.loss, "share", 0.5) == 0.5  # of the boundary loss, in the second of two epochs
    assert getattr(trainer.validation_loss, "share", 0) == 0  # or epochs could not be compared
    path = tmp_path / "checkpoints" / "best_model.pth"
    inferencer = NoduleInferencer(path, tmp_path / "out", "cpu")
    assert type(inferencer.predictor.model) is type(trainer.network)
    assert inferencer.settings.min_score == trainer.inference.min_score


def test_augmentation_comes_from_the_command_line_and_goes_into_the_checkpoint(processed_dir, tmp_path):
    words = ["--data_dir", str(processed_dir), "--output_dir", str(tmp_path), "--num_epochs", "1", "--device", "cpu"]
    words += ["--channels", "[4,8]", "--strides", "[2]", "--num_res_units", "0", "--augmentation.zoom", "0.2"]
    assert train.main(words) == 0
    kept = load_checkpoint(tmp_path / "checkpoints" / "best_model.pth").training["augmentation"]
    assert (kept["zoom"], kept["flip_prob"]) == (0.2, 0.5)


def test_impossible_augmentation_ends_with_status_1_and_its_reason(tmp_path, caplog):
    assert train.main(["--output_dir", str(tmp_path), "--augmentation.zoom", "2"]) == 1
    assert "zoom must be below 1" in caplog.text


def test_unknown_network_is_refused(processed_dir, tmp_path):
    with pytest.raises(ValueError, match="network must be one of unet, subpixel"):
        Trainer(processed_dir, tmp_path, network="swin", **CPU)


def test_resume_and_overwrite_exclude_each_other(processed_dir, tmp_path):
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        Trainer(processed_dir, tmp_path, resume=True, overwrite=True, **CPU)


def test_pasting_without_patches_is_refused(processed_dir, tmp_path):
    with pytest.raises(ValueError, match="paste_prob must be 0 without patches"):
        Trainer(processed_dir, tmp_path, augmentation=Augmentation(paste_prob=0.5), **CPU)


def test_unknown_cache_is_refused(processed_dir, tmp_path):
    with pytest.raises(ValueError, match="cache must be device, memory, files or null, not 'disk'"):
        Trainer(processed_dir, tmp_path, speed=Speed(cache="disk"), **CPU)


@pytest.mark.parametrize("cache", ["device", "memory", "files"])
def test_training_does_not_depend_on_where_scans_are_kept(processed_dir, run_dir, tmp_path, cache):
    Trainer(processed_dir, tmp_path, num_epochs=2, speed=Speed(cache=cache), **CPU).train()
    expected = weights(run_dir, "checkpoint_epoch_2.pth")
    found = weights(tmp_path, "checkpoint_epoch_2.pth")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_checkpoints_come_every_interval_and_at_the_end(processed_dir, tmp_path):
    Trainer(processed_dir, tmp_path, num_epochs=3, checkpoint_interval=2, **CPU).train()
    numbered = sorted(path.name for path in tmp_path.glob("checkpoints/checkpoint_epoch_*"))
    assert numbered == ["checkpoint_epoch_2.pth", "checkpoint_epoch_3.pth"]


def test_run_from_before_a_setting_existed_is_resumed(processed_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "checkpoint_epoch_2.pth"
    checkpoint = load_checkpoint(path)
    del checkpoint.training["speed.compile_network"]
    save_checkpoint(path, checkpoint)
    trainer = Trainer(processed_dir, tmp_path / "run", num_epochs=2, resume=True, **CPU)
    trainer.train()
    assert trainer.epoch == 2


def test_run_of_a_gpu_goes_on_on_a_cpu(processed_dir, run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "checkpoint_epoch_2.pth")
    assert [group["capturable"] for group in checkpoint.progress["optimizer"]["param_groups"]] == [False]
    checkpoint.progress["optimizer"]["param_groups"][0]["capturable"] = True  # as a GPU's optimiser has it
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run_dir / "checkpoints" / "split.json", tmp_path / "checkpoints")
    save_checkpoint(tmp_path / "checkpoints" / "checkpoint_epoch_2.pth", checkpoint)
    trainer = Trainer(processed_dir, tmp_path, num_epochs=2, resume=True, **CPU)
    trainer.train()
    assert [group["capturable"] for group in trainer.optimizer.param_groups] == [False]


def test_gradient_that_is_not_finite_changes_nothing(processed_dir, tmp_path):
    trainer = Trainer(processed_dir, tmp_path, **CPU)
    trainer._train_epoch()
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    weight = next(trainer.network.parameters())
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    assert not trainer._step(next(iter(trainer.loader)))[0].isfinite()
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
    handle.remove()
    assert trainer._step(next(iter(trainer.loader)))[0].isfinite()
    assert not torch.equal(weight, before[next(iter(before))])


@pytest.mark.parametrize(("slices", "kept"), [(4, None), (8, torch.bfloat16)])
def test_half_precision_is_left_out_where_a_cpu_computes_it_wrong(
    processed_dir, tmp_path, monkeypatch, caplog, slices, kept
):
    monkeypatch.setattr(train, "autocast_dtype", lambda device, mixed_precision: torch.bfloat16)
    trainer = Trainer(processed_dir, tmp_path, patches=Patches((slices, 16, 16)), **CPU)
    assert trainer.autocast_dtype == kept
    assert ("some level of the network has two" in caplog.text) == (kept is None)


def test_learning_rate_falls_along_a_cosine(run_dir):
    assert pd.read_csv(run_dir / "log.csv")["learning_rate"].tolist() == pytest.approx([1e-4, 0.5e-4])


@pytest.mark.parametrize(
    "options",
    [{}, PATCHES, {"network": "nnunet", "loss": LossSettings("boundary"), **THREE_LEVELS}],
    ids=["scans", "patches", "a loss that changes"],
)
def test_resumed_run_equals_one_that_was_never_stopped(processed_dir, tmp_path, monkeypatch, options):
    options = {**CPU, **options, "dropout": 0.3, "num_epochs": 3, "checkpoint_interval": 1, "learning_rate": 1e-2}
    Trainer(processed_dir, tmp_path / "whole", **options).train()
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            Trainer(processed_dir, tmp_path / "stopped", **options).train()
    torch.manual_seed(99)  # a new process has other random states
    Trainer(processed_dir, tmp_path / "stopped", resume=True, **options).train()
    expected, found = (weights(tmp_path / name, "checkpoint_epoch_3.pth") for name in ("whole", "stopped"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [
        pd.read_csv(tmp_path / name / "log.csv").drop(columns=["training_seconds", "validation_seconds"])
        for name in ("whole", "stopped")
    ]
    pd.testing.assert_frame_equal(*logs)


def test_network_of_patches_looks_first_in_wide_windows_and_so_does_an_older_run_that_is_resumed(
    processed_dir, tmp_path, run_dir
):
    assert load_checkpoint(run_dir / "checkpoints" / "best_model.pth").inference.first_window is None  # whole scans
    options = {**CPU, **PATCHES, "checkpoint_interval": 1}
    Trainer(processed_dir, tmp_path, **options | {"num_epochs": 1}).train()
    path = tmp_path / "checkpoints" / "checkpoint_epoch_1.pth"
    checkpoint = load_checkpoint(path)
    assert checkpoint.inference.first_window == train.FIRST_WINDOW
    older = dataclasses.replace(checkpoint.inference, first_window=None)
    save_checkpoint(path, dataclasses.replace(checkpoint, inference=older))
    trainer = Trainer(processed_dir, tmp_path, resume=True, **options | {"num_epochs": 2})
    trainer.train()
    assert trainer.validator.inferencer.settings.first_window == train.FIRST_WINDOW
    written = load_checkpoint(tmp_path / "checkpoints" / "checkpoint_epoch_2.pth").inference
    assert written == dataclasses.replace(trainer.validator.inferencer.settings, min_score=trainer.inference.min_score)


def test_resume_takes_the_threads_of_the_run(processed_dir, run_dir, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(train, "count_cores", lambda: 2)
    shutil.copytree(run_dir, tmp_path / "run")
    Trainer(processed_dir, tmp_path / "run", **CPU | {"num_epochs": 3}, resume=True).train()
    assert taken == [1]  # of the run that was started in this test's process


def test_resume_with_fewer_cores_than_threads_says_that_it_differs(
    processed_dir, run_dir, tmp_path, monkeypatch, caplog
):
    shutil.copytree(run_dir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pth"):
        checkpoint = load_checkpoint(path)
        checkpoint.progress["threads"] = 64
        save_checkpoint(path, checkpoint)
    monkeypatch.setattr(train, "count_cores", lambda: 2)
    Trainer(processed_dir, tmp_path / "run", **CPU | {"num_epochs": 3}, resume=True).train()
    assert "the run had 64 threads, and there are 2 cores" in caplog.text and "no longer bit-identical" in caplog.text


def test_resume_passes_over_a_damaged_checkpoint(processed_dir, tmp_path, run_dir, caplog):
    shutil.copytree(run_dir, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "checkpoint_epoch_2.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    trainer = Trainer(processed_dir, tmp_path / "run", num_epochs=2, resume=True, **CPU)
    trainer.train()
    assert trainer.epoch == 2
    assert "checkpoint_epoch_2.pth is damaged" in caplog.text


def test_resume_with_other_settings_is_refused(processed_dir, tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "run")
    trainer = Trainer(processed_dir, tmp_path / "run", num_epochs=2, learning_rate=1.0, resume=True, **CPU)
    with pytest.raises(ValueError, match=r"learning_rate was 0.0001, not 1.0"):
        trainer.train()


def test_resume_without_a_checkpoint_starts_from_the_beginning(processed_dir, tmp_path):
    trainer = Trainer(processed_dir, tmp_path, num_epochs=1, resume=True, **CPU)
    assert len(trainer.train()) == 1


def test_used_output_dir_is_refused_by_name_of_both_remedies(processed_dir, run_dir):
    with pytest.raises(FileExistsError, match=r"resume=True.*overwrite=True"):
        Trainer(processed_dir, run_dir, **CPU)


def test_overwrite_replaces_the_earlier_run(processed_dir, tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "run")
    Trainer(processed_dir, tmp_path / "run", num_epochs=1, overwrite=True, **CPU).train()
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pth")}
    assert names == {"best_model.pth", "checkpoint_epoch_1.pth"}


def test_validation_does_not_change_the_training(processed_dir, tmp_path):
    options = {**CPU, "num_epochs": 2, "dropout": 0.3}
    Trainer(processed_dir, tmp_path / "often", validation=ValidationSettings(interval=1), **options).train()
    Trainer(processed_dir, tmp_path / "seldom", validation=ValidationSettings(interval=2), **options).train()
    often, seldom = (weights(tmp_path / name, "checkpoint_epoch_2.pth") for name in ("often", "seldom"))
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def spoil(processed_dir: Path, folder: Path, uids: list[str]) -> Path:
    """Copy of the processed data with one voxel of some scans not a number."""
    shutil.copytree(processed_dir, folder)
    for uid in uids:
        path = folder / "images" / f"{uid}.npy"
        image = np.load(path)
        image[16, 24, 24] = np.nan
        np.save(path, image)
    return folder


def test_loss_that_is_not_finite_is_reported_by_scan_and_leaves_no_trace(processed_dir, tmp_path, run_dir, caplog):
    bad = read_split(run_dir / "checkpoints" / "split.json").train[0]
    data = spoil(processed_dir, tmp_path / "data", [bad])
    Trainer(data, tmp_path / "run", num_epochs=1, batch_size=1, augmentation=None, **CPU).train()
    assert any("not finite" in line and bad in line for line in caplog.messages)
    state = weights(tmp_path / "run", "checkpoint_epoch_1.pth")
    assert all(torch.isfinite(value).all() for value in state.values())


def test_training_on_nothing_finite_ends_with_advice(processed_dir, tmp_path):
    data = spoil(processed_dir, tmp_path / "data", read_processed_list(processed_dir))
    with pytest.raises(UserError, match="lower learning_rate"):
        Trainer(data, tmp_path / "run", num_epochs=1, augmentation=None, **CPU).train()


def test_out_of_memory_names_the_remedies(processed_dir, tmp_path, monkeypatch):
    def step(self: Trainer, batch: dict) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(UserError, match=r"batch_size \(now 2\).*channels.*target_size"):
        Trainer(processed_dir, tmp_path, **CPU).train()


def let_validations_find(monkeypatch: pytest.MonkeyPatch, *results: tuple, with_nodules: bool = True) -> None:
    """Lets each validation in turn return a (Dice without excluded findings, loss, number of false nodules)."""
    left = iter(results)

    def run_validation(self: object) -> SimpleNamespace:
        dice, loss, false = next(left)
        summary = {"sensitivity": {"mean": dice}, "precision": {"mean": dice}, "false_positive_nodules": false + 2}
        summary |= {"on_excluded_findings": 2, "dice_without_excluded": dice}
        summary["dice_of_scans_with_nodules"] = dice if with_nodules else math.nan
        return SimpleNamespace(dice=1 - dice, loss=loss, min_score=0.25, summary=summary)  # which ranks otherwise

    monkeypatch.setattr(train.Validator, "run_validation", run_validation)


def test_best_model_is_the_epoch_of_highest_dice_and_then_of_lowest_loss(processed_dir, tmp_path, monkeypatch):
    let_validations_find(monkeypatch, (0.2, 0.9, 0), (0.4, 0.9, 0), (0.4, 0.8, 0), (math.nan, 0.1, 0))
    Trainer(processed_dir, tmp_path, num_epochs=4, **CPU).train()
    assert load_checkpoint(tmp_path / "checkpoints" / "best_model.pth").epoch == 3


def test_undefined_dice_leaves_the_choice_to_the_loss(processed_dir, tmp_path, monkeypatch):
    let_validations_find(monkeypatch, (math.nan, 0.9, 0), (math.nan, 0.7, 0), (math.nan, 0.8, 0))
    Trainer(processed_dir, tmp_path, num_epochs=3, **CPU).train()
    assert load_checkpoint(tmp_path / "checkpoints" / "best_model.pth").epoch == 2


def test_loss_that_is_not_a_number_makes_no_worse_epoch_the_best(processed_dir, tmp_path, monkeypatch):
    let_validations_find(monkeypatch, (0.8, math.nan, 0), (0.5, 0.3, 0), (0.8, 0.4, 0))
    trainer = Trainer(processed_dir, tmp_path, num_epochs=3, **CPU)
    trainer.train()
    assert (trainer.best["epoch"], trainer.best["dice"]) == (3, 0.8)  # 2 is worse, 3 has a loss


def test_without_a_nodule_to_find_an_epoch_with_false_marks_is_not_better_than_one_without(
    processed_dir, tmp_path, monkeypatch
):
    let_validations_find(monkeypatch, (math.nan, 0.5, 0), (0.0, 0.9, 19), (0.0, 0.5, 3), with_nodules=False)
    trainer = Trainer(processed_dir, tmp_path, num_epochs=3, **CPU)
    trainer.train()
    assert trainer.best["epoch"] == 1
    assert trainer.describe_best() == (
        "best epoch: 1 of 3, by validation loss 0.5000 (Dice is undefined: no validation scan has a nodule)"
    )


def test_split_is_told_with_its_nodules_and_a_part_without_any_is_warned_of(processed_dir, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    split = Trainer(processed_dir, tmp_path / "first", **CPU).split
    for uid in list(split.validation):
        path = data / f"{uid}_metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"nodules": []}))
    trainer = Trainer(data, tmp_path / "run", num_epochs=1, **CPU)
    trainer.split, trainer.validator.seriesuids = split, list(split.validation)
    with caplog.at_level("INFO"):
        trainer.train()
    assert "1 validation (0 nodules)" in caplog.text
    assert "no validation scan has a nodule: there is no Dice" in caplog.text
    assert "by validation loss" in trainer.describe_best()


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_building_a_trainer_changes_no_file_and_no_global_state(processed_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    before = everything_in(tmp_path)
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    Trainer(processed_dir, tmp_path / "run", overwrite=True, speed=Speed(deterministic=True), **CPU)
    assert everything_in(tmp_path) == before
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert flags == (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)


def test_overwrite_that_fails_in_its_first_epoch_has_cost_nothing(processed_dir, run_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    before = everything_in(tmp_path)

    def step(self: Trainer, batch: dict) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(UserError):
        Trainer(processed_dir, tmp_path / "run", num_epochs=1, overwrite=True, **CPU).train()
    assert before.items() <= everything_in(tmp_path).items()


def test_overwrite_leaves_nothing_of_the_deleted_run(processed_dir, run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    old_logs = [path.name for path in run.glob("logs_*")]
    ours = ("validation/validation_results.csv", "validation/froc.png", "inference/candidates.csv")
    others = ("notes.txt", "logs_mine.txt", "logs_slurm/job1.out", "checkpoints/checkpoint_epoch_keep.pth")
    for name in (*ours, *others):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("of the old run")
    time.sleep(1.1)  # logs are named by the second
    Trainer(processed_dir, run, num_epochs=1, overwrite=True, **CPU).train()
    kept = [path for path in run.rglob("*") if path.is_file() and path.read_bytes() == b"of the old run"]
    assert sorted(kept) == sorted(run / name for name in others)  # what is not ours stays
    assert not {path.name for path in run.glob("logs_*")} & set(old_logs)


def test_overwrite_leaves_results_of_other_weights(processed_dir, run_dir, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    for name, checkpoint in (("validation", "elsewhere/best_model.pth"), ("inference", "data/pretrained.pth")):
        (run / name).mkdir()
        (run / name / f"{name}.json").write_text(json.dumps({"checkpoint": checkpoint, "scans": {}}))
        (run / name / "candidates.csv").write_text("mine")
    Trainer(processed_dir, run, num_epochs=1, overwrite=True, **CPU).train()
    assert all((run / name / "candidates.csv").read_text() == "mine" for name in ("validation", "inference"))
    assert "inference holds results of data/pretrained.pth, and stays" in caplog.text


def test_logs_alone_are_no_run_to_be_replaced(processed_dir, tmp_path):
    (tmp_path / "logs_20260101-000000").mkdir()
    (tmp_path / "logs_20260101-000000" / "events.1").write_text("of a run that ended in its first epoch")
    Trainer(processed_dir, tmp_path, **CPU)


def test_file_that_a_killed_run_was_writing_is_no_run(processed_dir, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in (".partial-0123abcd-4711-89abcdef-best_model.pth", ".4711.best_model.pth"):
        (tmp_path / "checkpoints" / name).write_text("half of a checkpoint")
    Trainer(processed_dir, tmp_path, **CPU)


@pytest.mark.parametrize("interval", [1, 3])
def test_overwrite_interrupted_while_its_first_checkpoint_is_written_goes_on_with_the_new_run(
    processed_dir, run_dir, tmp_path, monkeypatch, interval
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    options = {**CPU, "num_epochs": 3, "checkpoint_interval": 3, "seed": 7}
    options["validation"] = ValidationSettings(interval=interval)
    save = train.save_checkpoint
    with monkeypatch.context() as patch:
        interrupted = lambda *given: (save(*given), os.kill(os.getpid(), signal.SIGINT))  # noqa: E731
        patch.setattr(train, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 2; epoch 1 is kept"):
            Trainer(processed_dir, run, overwrite=True, **options).train()
    (kept,) = run.glob("checkpoints/*.pth")
    assert load_checkpoint(kept).epoch == 1 and load_checkpoint(kept).training["seed"] == 7
    log = Trainer(processed_dir, run, resume=True, **options).train()
    assert log["epoch"].tolist() == [1, 2, 3]


def test_best_epoch_whose_checkpoint_is_being_written_stays_the_best(processed_dir, tmp_path, monkeypatch):
    save, dice = train.save_checkpoint, iter([0.3, 0.8, 0.1])
    monkeypatch.setattr(Trainer, "_is_best", lambda self, result: next(dice) > 0.2)

    def interrupt(path, state) -> None:
        save(path, state)
        if "best_model" in str(path) and state.epoch == 2:
            monkeypatch.setattr(train, "save_checkpoint", save)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "save_checkpoint", interrupt)
    options = {**CPU, "num_epochs": 3, "validation": ValidationSettings(interval=1), "checkpoint_interval": 3}
    with pytest.raises(KeyboardInterrupt, match="epoch 2 is kept"):
        Trainer(processed_dir, tmp_path, **options).train()
    Trainer(processed_dir, tmp_path, resume=True, **options).train()
    assert load_checkpoint(tmp_path / "checkpoints" / "best_model.pth").epoch == 2


def test_run_without_a_scaler_goes_on_where_one_is_needed(processed_dir, run_dir, monkeypatch):
    trainer = Trainer(processed_dir, run_dir, resume=True, **CPU | {"num_epochs": 9})
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer._load_newest()
    assert trainer.epoch and trainer.scaler.get_scale() > 1


def test_epoch_whose_checkpoint_is_being_written_is_kept(processed_dir, tmp_path, monkeypatch):
    save, calls = train.save_checkpoint, []

    def interrupt(*given) -> None:
        save(*given)
        calls.append(given)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "save_checkpoint", interrupt)
    options = {**CPU, "num_epochs": 5, "validation": ValidationSettings(interval=5), "checkpoint_interval": 2}
    with pytest.raises(KeyboardInterrupt, match="epoch 2 is kept"):
        Trainer(processed_dir, tmp_path, **options).train()
    assert load_checkpoint(tmp_path / "checkpoints" / "checkpoint_epoch_2.pth").epoch == 2


def test_second_signal_while_the_last_epoch_is_kept_costs_nothing(processed_dir, tmp_path, monkeypatch):
    save = train.save_checkpoint

    def impatient(*given) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        save(*given)

    monkeypatch.setattr(train, "save_checkpoint", impatient)
    run_epoch = Trainer._run_epoch

    def run(self: Trainer) -> None:
        if self.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)
        run_epoch(self)

    monkeypatch.setattr(Trainer, "_run_epoch", run)
    options = {**CPU, "num_epochs": 5, "validation": ValidationSettings(interval=5), "checkpoint_interval": 5}
    with pytest.raises(KeyboardInterrupt, match="interrupted in epoch 3; epoch 2 is kept"):
        Trainer(processed_dir, tmp_path, **options).train()
    assert load_checkpoint(tmp_path / "checkpoints" / "checkpoint_epoch_2.pth").epoch == 2


def test_second_training_in_one_folder_is_refused(processed_dir, tmp_path):
    with (
        folder_lock(tmp_path),
        pytest.raises(FileExistsError, match=f"another training is at work in {tmp_path}; wait for it"),
    ):
        Trainer(processed_dir, tmp_path, **CPU).train()
    assert len(Trainer(processed_dir, tmp_path, num_epochs=1, **CPU).train()) == 1


def test_run_cannot_be_shortened_below_what_it_has_done(processed_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    with pytest.raises(InputError, match="the run has done 2 epochs, more than num_epochs=1"):
        Trainer(processed_dir, tmp_path / "run", num_epochs=1, resume=True, **CPU).train()


TRAINING = """
import sys
from train import main
sys.exit(main(["--data_dir", {data!r}, "--output_dir", {run!r}, "--num_epochs", "500", "--checkpoint_interval", "500",
               "--validation.interval", "500", "--device", "cpu", "--channels", "[4,8]", "--strides", "[2]",
               "--num_res_units", "0", "--dropout", "0", "--mixed_precision", "false"]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_training_keeps_its_last_whole_epoch_and_says_how_to_go_on(processed_dir, tmp_path, number, status):
    run = tmp_path / "run"
    code = TRAINING.format(data=str(processed_dir), run=str(run))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "epoch 3/500" in line and "loss" in line:
            process.send_signal(number)
            break
    lines += process.stderr.readlines()
    assert process.wait(timeout=60) == status, "".join(lines)
    (path,) = (run / "checkpoints").glob("checkpoint_epoch_*.pth")
    epoch = load_checkpoint(path).epoch
    assert epoch >= 3
    assert path.name == f"checkpoint_epoch_{epoch}.pth"
    last = lines[-1]
    assert f"epoch {epoch} is kept" in last and "--resume true" in last
    options = {**CPU, "checkpoint_interval": 500, "validation": ValidationSettings(interval=500)}
    trainer = Trainer(processed_dir, run, num_epochs=epoch, resume=True, **options)
    assert len(trainer.train()) == epoch


def test_epoch_that_no_checkpoint_holds_is_kept_as_it_was(processed_dir, tmp_path, monkeypatch):
    options = {**CPU, "num_epochs": 5, "dropout": 0.3, "learning_rate": 1e-2}
    options["validation"] = ValidationSettings(interval=5)
    Trainer(processed_dir, tmp_path / "whole", checkpoint_interval=1, **options).train()
    stop_after(monkeypatch, 3)
    with pytest.raises(Stopped):
        Trainer(processed_dir, tmp_path / "stopped", checkpoint_interval=5, **options).train()
    expected, found = (weights(tmp_path / name, "checkpoint_epoch_3.pth") for name in ("whole", "stopped"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_finished_run_that_is_resumed_says_so(processed_dir, run_dir, tmp_path, caplog):
    shutil.copytree(run_dir, tmp_path / "run")
    with caplog.at_level("INFO"):
        assert len(Trainer(processed_dir, tmp_path / "run", num_epochs=2, resume=True, **CPU).train()) == 2
    assert f"all 2 epochs of {tmp_path / 'run'} are done; a larger num_epochs prolongs the run" in caplog.text


def test_run_can_be_prolonged_along_the_cosine_of_its_new_length(processed_dir, run_dir, tmp_path, caplog):
    shutil.copytree(run_dir, tmp_path / "run")
    log = Trainer(processed_dir, tmp_path / "run", num_epochs=4, resume=True, **CPU).train()
    assert log["learning_rate"].tolist() == pytest.approx([1e-4, 0.5e-4, 0.5e-4, 1e-4 * (1 - math.sqrt(0.5)) / 2])
    assert "the run had 2 epochs and now has 4" in caplog.text


def test_missing_permission_makes_no_resume_take_an_older_checkpoint(processed_dir, run_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    read = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "checkpoint_epoch_2.pth":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        Trainer(processed_dir, tmp_path / "run", num_epochs=2, resume=True, **CPU).train()


@pytest.mark.parametrize(
    ("num_epochs", "interval", "expected"),
    [
        (4, 1, [1, 2, 3, 4]),
        (4, 3, [3, 4]),
        (20, 1, [1, 2, *range(3, 21)]),
        (100, 1, [1, 2, 4, 8, *range(11, 101)]),
        (100, 5, [5, 10, *range(15, 101, 5)]),
    ],
)
def test_first_validations_are_sparse(processed_dir, tmp_path, num_epochs, interval, expected):
    validation = ValidationSettings(interval=interval)
    trainer = Trainer(processed_dir, tmp_path, num_epochs=num_epochs, validation=validation, **CPU)
    assert [epoch for epoch in range(1, num_epochs + 1) if trainer._validates(epoch)] == expected


def test_any_setting_of_patches_takes_patches():
    [options], _ = parse_command_line(Trainer, argv=["--patches.per_scan", "3"])
    assert options["patches"] == Patches(per_scan=3)


def test_trainer_takes_at_most_27_arguments():
    assert len(inspect.signature(Trainer).parameters) <= 27


def test_options_without_effect_on_a_cpu_are_told(processed_dir, tmp_path, caplog):
    Trainer(processed_dir, tmp_path, num_epochs=1, num_workers=2, **CPU).train()
    assert "num_workers without effect: training is on a CPU" in caplog.text


def test_training_from_python_tells_its_epochs(processed_dir, tmp_path):
    code = f"""
from train import Trainer
Trainer({str(processed_dir)!r}, {str(tmp_path / "run")!r}, num_epochs=2, device="cpu", mixed_precision=False,
        channels=(4, 8), strides=(2,), num_res_units=0).train()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert [line[:10] for line in result.stderr.splitlines() if line.startswith("epoch")] == [
        "epoch 1/2:",
        "epoch 2/2:",
    ]


def test_epoch_tells_the_time_that_is_left(processed_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Trainer(processed_dir, tmp_path, num_epochs=2, **CPU).train()
    first, last = (message for message in caplog.messages if message.startswith("epoch "))
    assert re.search(r"\(\d+ s, about \d+ s left\)$", first)
    assert re.search(r"\(\d+ s\)$", last)


def test_tensorboard_shows_the_settings(processed_dir, tmp_path):
    Trainer(processed_dir, tmp_path, num_epochs=1, learning_rate=0.0123, **CPU).train()
    events = EventAccumulator(str(next(tmp_path.glob("logs_*")))).Reload()
    (text,) = events.Tensors("settings/text_summary")
    assert b"| learning_rate | 0.0123 |" in text.tensor_proto.string_val[0]


def test_missing_array_is_told_before_training(processed_dir, tmp_path):
    shutil.copytree(processed_dir, tmp_path / "data")
    uid = read_processed_list(processed_dir)[0]
    path = tmp_path / "data" / "masks" / f"{uid}.npy"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"masks.{uid}\.npy is damaged .*; run python preprocess.py again"):
        Trainer(tmp_path / "data", tmp_path / "run", **CPU)


def test_training_learns_to_mark_what_is_bright(processed_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    for uid in read_processed_list(data):
        np.save(data / "masks" / f"{uid}.npy", (np.load(data / "images" / f"{uid}.npy") > 0.5).astype(np.uint8))
    log = Trainer(data, tmp_path / "run", num_epochs=15, learning_rate=0.05, augmentation=None, **CPU).train()
    assert log["validation_dice"].iloc[-1] > 0.5


def test_size_that_the_strides_do_not_divide_is_refused_before_training(processed_dir, tmp_path):
    options = {**CPU, "channels": (2, 2, 2, 2, 2, 2), "strides": (2, 2, 2, 2, 2)}
    with pytest.raises(ValueError, match=r"multiple of 32.*nearest that fits is"):
        Trainer(processed_dir, tmp_path, **options)


def test_patch_size_that_the_strides_do_not_divide_is_refused(processed_dir, tmp_path):
    with pytest.raises(ValueError, match="multiple of 2"):
        Trainer(processed_dir, tmp_path, patches=Patches((15, 16, 16)), **CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0),
        ("batch_size", 0),
        ("checkpoint_interval", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("num_workers", -1),
        ("seed", -1),
    ],
)
def test_value_out_of_range_is_refused_by_name(processed_dir, tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        Trainer(processed_dir, tmp_path, **{**CPU, name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ValidationSettings(interval=0), "validation.interval"),
        (lambda: Patches((0, 16, 16)), "patches.size"),
        (lambda: Patches(nodule_share=1.5), "nodule_share"),
        (lambda: LossSettings(name="hinge"), "loss.name must be one of dice_bce, dice_focal, .* not 'hinge'"),
    ],
)
def test_value_of_a_group_out_of_range_is_refused_by_name(make, name):
    with pytest.raises(InputError, match=name):
        make()


@pytest.mark.parametrize(("name", "value"), [("fraction", 1.0), ("fold", 10), ("mirrors", 16)])
def test_validation_setting_out_of_range_is_refused_by_name(processed_dir, tmp_path, name, value):
    with pytest.raises(InputError, match=name):
        Trainer(processed_dir, tmp_path, validation=ValidationSettings(**{name: value}), **CPU)


class Toy(SegmentationNetwork):
    """A network of one's own."""

    def _build(self) -> torch.nn.Module:
        return torch.nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.unet(image)


def test_network_and_loss_of_ones_own_are_trained_and_validated(processed_dir, tmp_path, monkeypatch):
    class ToyLoss(DiceBCELoss):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return 7 + 0 * super().forward(logits, target)

    monkeypatch.setitem(model.NETWORKS, "toy", Toy)
    monkeypatch.setitem(model.LOSSES, "toy", ToyLoss)
    log = Trainer(processed_dir, tmp_path, num_epochs=1, network="toy", loss=LossSettings("toy"), **CPU).train()
    assert log["train_loss"].tolist() == [7]
    path = tmp_path / "checkpoints" / "best_model.pth"
    assert isinstance(NoduleInferencer(path, tmp_path / "out", "cpu").predictor.model, Toy)


def test_pipeline_takes_data_set_format_network_loss_and_transform_from_outside(toy_data_set, tmp_path, monkeypatch):
    class QuarterTurn:
        def apply(self, image: torch.Tensor) -> torch.Tensor:
            turns.append(image.shape)
            return image.rot90(1, (3, 4))

        def undo(self, logits: torch.Tensor) -> torch.Tensor:
            return logits.rot90(-1, (3, 4))

    turns: list[torch.Size] = []
    monkeypatch.setitem(model.NETWORKS, "toy", Toy)
    monkeypatch.setitem(model.LOSSES, "toy", lambda **arguments: DiceBCELoss(**arguments | {"bce_weight": 2.0}))
    monkeypatch.setattr(infer, "TRANSFORMS", [QuarterTurn()])
    data, run = tmp_path / "processed", tmp_path / "run"
    LUNA16Preprocessor(toy_data_set, output_dir=data, target_size=(20, 20, 20), data_set="toy").process_all()
    options = {"network": "toy", "loss": LossSettings("toy"), "validation": ValidationSettings(mirrors=1)} | CPU
    Trainer(data, run, num_epochs=1, **options).train()
    assert read_split(run / "checkpoints" / "split.json").parts == {"toy-a": "train", "toy-b": "validation"}
    path = run / "checkpoints" / "best_model.pth"
    assert len(Validator(data, path, tmp_path / "scores", "cpu").run_validation().table) == 1
    seen = len(turns)
    NoduleInferencer(path, tmp_path / "out", "cpu").infer_scan(toy_data_set / "ward" / "b-stack")
    assert len(turns) == seen + 1 and (tmp_path / "out" / "b_nodules.csv").is_file()


def test_help_lists_the_registered_networks_and_losses(monkeypatch, capsys):
    monkeypatch.setitem(model.NETWORKS, "toy", SubpixelUNet)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "({unet,subpixel,subpixel_instance,nnunet,nnunet_residual,vnet,attention_unet,segresnet,toy}, default unet)"
        in text
    )
    assert "({dice_bce,dice_focal,focal,tversky,boundary}, default dice_bce)" in text


def test_network_starts_from_the_share_of_nodules_in_its_data(processed_dir, tmp_path):
    def start(**options) -> torch.Tensor:
        trainer = Trainer(processed_dir, tmp_path, **CPU | options)
        return torch.sigmoid(trainer.network.logit_gain * trainer.network.unet.model[-1].head.bias)

    split = Trainer(processed_dir, tmp_path, **CPU).split
    masks = [read_processed(processed_dir, uid) for uid in split.train]
    share, voxels = float(np.mean([scan.mask for scan in masks])), masks[0].mask.size
    nodules = [nodule.voxels for scan in masks for nodule in scan.metadata.nodules]
    plain, two = (start(augmentation=Augmentation(paste_per_scan=number)) for number in (0, 2))
    torch.testing.assert_close(plain, torch.full_like(plain, share))
    torch.testing.assert_close(two, torch.full_like(two, share + 2 * float(np.mean(nodules)) / voxels))
    assert start(patches=Patches((16, 16, 16), nodule_share=0.5)).mean() > 1.01 * plain.mean()


def test_missing_data_tells_to_preprocess(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python preprocess.py first"):
        Trainer(tmp_path, tmp_path / "run", **CPU)


def test_custom_script_without_a_main_guard_trains(processed_dir, tmp_path):
    script = tmp_path / "custom_train.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from train import Trainer

trainer = Trainer(
    data_dir={str(processed_dir)!r},
    output_dir={str(tmp_path / "run")!r},
    num_epochs=1,
    batch_size=4,
    learning_rate=5e-5,
    device='cuda',
    mixed_precision=True,
    channels=(4, 8),
    strides=(2,),
)

trainer.train()
""")
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "run" / "checkpoints" / "best_model.pth").is_file()


def test_main_returns_1_and_one_line_for_missing_data(tmp_path, caplog):
    assert train.main(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]) == 1
    assert "run python preprocess.py first" in caplog.text


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - the seeded global states


def test_seed_repeats_the_draws_of_python_numpy_and_torch():
    seed_everything(7)
    first = draws()
    seed_everything(7)
    assert draws() == first


def test_other_seed_gives_other_draws():
    seed_everything(7)
    first = draws()
    seed_everything(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


# ------------------------------------------------------------------------------------- several folders, given weights


def test_training_on_two_folders_is_that_on_all_their_scans(two_folders, processed_dir, run_dir, tmp_path):
    trainer = Trainer(two_folders, tmp_path, num_epochs=2, **CPU)
    trainer.train()
    assert trainer.split == read_split(run_dir / "checkpoints" / "split.json")
    ours, theirs = (weights(folder, "checkpoint_epoch_2.pth") for folder in (tmp_path, run_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    words = ["--data_dir", *map(str, two_folders), "--output_dir", str(tmp_path), "--num_epochs", "2"]
    [options], _ = parse_command_line(Trainer, argv=words)
    assert options["data_dir"] == two_folders


def test_scan_in_two_folders_is_refused(two_folders, processed_dir, tmp_path):
    with pytest.raises(InputError, match=f"lies in {processed_dir} and in {two_folders[0]}; a scan counts"):
        Trainer([processed_dir, two_folders[0]], tmp_path, **CPU)
    with pytest.raises(InputError, match="names a folder twice"):
        Trainer([processed_dir, processed_dir / "."], tmp_path, **CPU)


def test_fresh_run_begins_with_given_weights(processed_dir, run_dir, tmp_path):
    path = run_dir / "checkpoints" / "checkpoint_epoch_2.pth"
    trainer = Trainer(processed_dir, tmp_path, initial_weights=path, num_epochs=1, learning_rate=1e-12, **CPU)
    trainer.train()
    ours, theirs = weights(tmp_path, "checkpoint_epoch_1.pth"), weights(run_dir, path.name)
    names = [name for name in theirs if name.endswith("weight")]
    assert all(torch.allclose(ours[name], theirs[name]) for name in names)
    assert load_checkpoint(tmp_path / "checkpoints" / "checkpoint_epoch_1.pth").epoch == 1


def test_ensemble_gives_no_initial_weights(processed_dir, run_dir, tmp_path):
    one = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    save_checkpoint(tmp_path / "joined.pth", join_checkpoints([one, one], "ab"))
    with pytest.raises(InputError, match="are an ensemble; name one of its members"):
        Trainer(processed_dir, tmp_path / "run", initial_weights=tmp_path / "joined.pth", **CPU)


def test_tuned_checkpoint_goes_with_the_run_that_is_overwritten(processed_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.copy(run_dir / "checkpoints" / "best_model.pth", tmp_path / "run" / "checkpoints" / "tuned-a.pth")
    Trainer(processed_dir, tmp_path / "run", num_epochs=1, overwrite=True, **CPU).train()
    assert not (tmp_path / "run" / "checkpoints" / "tuned-a.pth").exists()


def test_given_weights_survive_a_resume(processed_dir, run_dir, tmp_path, monkeypatch):
    given = CPU | {"initial_weights": run_dir / "checkpoints" / "best_model.pth", "num_epochs": 2}
    Trainer(processed_dir, tmp_path / "whole", **given).train()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            Trainer(processed_dir, tmp_path / "cut", checkpoint_interval=1, **given).train()
    Trainer(processed_dir, tmp_path / "cut", checkpoint_interval=1, resume=True, **given).train()
    whole, cut = (
        load_checkpoint(tmp_path / name / "checkpoints" / "checkpoint_epoch_2.pth") for name in ("whole", "cut")
    )
    assert all(torch.equal(whole.weights[name], cut.weights[name]) for name in whole.weights)
    assert whole.seen == cut.seen


def test_weights_of_another_network_are_refused_by_name(processed_dir, run_dir, tmp_path):
    path = run_dir / "checkpoints" / "best_model.pth"
    with pytest.raises(InputError, match=r"another network: channels is \[4, 8\] there and \[4, 16\] here; set these"):
        Trainer(processed_dir, tmp_path, initial_weights=path, **CPU | {"channels": (4, 16)})
    with pytest.raises(InputError, match="network is unet there and subpixel here"):
        three = {"channels": (4, 8, 16), "strides": (2, 2)}
        Trainer(processed_dir, tmp_path, initial_weights=path, network="subpixel", **CPU | three)
    Trainer(processed_dir, tmp_path, initial_weights=path, **CPU | {"dropout": 0.3})  # changes no weight


def test_checkpoint_lists_what_it_has_seen_and_so_do_those_that_begin_with_it(processed_dir, run_dir, tmp_path, caplog):
    first = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    split = read_split(run_dir / "checkpoints" / "split.json")
    assert first.seen == {uid: (None, part) for uid, part in split.parts.items()}
    path = run_dir / "checkpoints" / "best_model.pth"
    trainer = Trainer(processed_dir, tmp_path, initial_weights=path, num_epochs=1, seed=1, **CPU)
    trainer.train()
    second = load_checkpoint(tmp_path / "checkpoints" / "best_model.pth")
    assert second.seen == dict.fromkeys(first.seen, (None, "earlier"))
    assert "1 of 1 validation scans have been seen by the initial weights: no score of them is fair" in caplog.text


def test_scans_that_chose_the_given_weights_may_choose_again(processed_dir, run_dir, tmp_path, caplog):
    path, split = run_dir / "checkpoints" / "best_model.pth", read_split(run_dir / "checkpoints" / "split.json")
    trainer = Trainer(processed_dir, tmp_path, initial_weights=path, num_epochs=1, **CPU)
    trainer.train()
    assert trainer.split == split and "have been seen by the initial weights" not in caplog.text
    seen = load_checkpoint(tmp_path / "checkpoints" / "best_model.pth").seen
    assert {uid: part for uid, (_, part) in seen.items()} == (
        dict.fromkeys(split.train, "earlier") | dict.fromkeys(split.validation, "validation")
    )


def test_held_out_scans_that_the_given_weights_have_seen_are_warned_of(fold_run, run_dir, tmp_path, caplog):
    data_dir, path = fold_run / "data", run_dir / "checkpoints" / "best_model.pth"
    fold = read_split(fold_run / "checkpoints" / "split.json").fold
    checkpoint = load_checkpoint(path)
    seen = dict.fromkeys(read_processed_list(data_dir), (None, "train"))
    save_checkpoint(tmp_path / "given.pth", dataclasses.replace(checkpoint, seen=seen))
    settings = ValidationSettings(fold=fold)
    Trainer(data_dir, tmp_path / "run", initial_weights=tmp_path / "given.pth", validation=settings, **CPU)
    assert re.search(r"(\d+) of \1 held-out scans have been seen by the initial weights: no score", caplog.text)


def test_scans_prepared_otherwise_than_for_the_given_weights_are_warned_of(processed_dir, run_dir, tmp_path, caplog):
    path = tmp_path / "other.pth"
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    other = checkpoint.preprocessing | {"hu_max": 200.0}
    save_checkpoint(path, dataclasses.replace(checkpoint, preprocessing=other))
    Trainer(processed_dir, tmp_path / "run", initial_weights=path, **CPU)
    assert "hu_max: 400.0 instead of 200.0" in caplog.text


def test_folders_for_validation_alone_are_not_trained_on(two_folders, tmp_path, caplog):
    first, second = two_folders
    settings = ValidationSettings(data_dir=second)
    trainer = Trainer(first, tmp_path / "run", num_epochs=1, validation=settings, **CPU)
    trainer.train()
    split = read_split(tmp_path / "run" / "checkpoints" / "split.json")
    assert list(split.train) == read_processed_list(first)
    assert list(split.validation) == read_processed_list(second)
    settings = ValidationSettings(data_dir=[Path(os.path.relpath(second))])  # the same folder by another name
    Trainer(first, tmp_path / "run", num_epochs=2, validation=settings, resume=True, **CPU).train()
    with pytest.raises(InputError, match=r"leave out validation\.fold"):
        ValidationSettings(data_dir=second, fold=1)
    with pytest.raises(InputError, match="data_dir names a folder twice"):
        Trainer(first, tmp_path / "other", validation=ValidationSettings(data_dir=first), **CPU)


def test_patient_on_both_sides_of_given_folders_is_refused(two_folders, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, source in zip(folders, two_folders, strict=True):
        shutil.copytree(source, folder)
        uid = read_processed_list(folder)[0]
        write_metadata(folder, dataclasses.replace(read_metadata(folder, uid), patient="P"))
    with pytest.raises(InputError, match="of the same patient for training; move one of them"):
        Trainer(folders[0], tmp_path / "run", validation=ValidationSettings(data_dir=folders[1]), **CPU)


def test_given_weights_without_a_list_have_seen_what_the_split_beside_them_says(fold_run, processed_dir, tmp_path):
    checkpoint = load_checkpoint(fold_run / "checkpoints" / "best_model.pth")
    shutil.copytree(fold_run / "checkpoints", tmp_path / "given")
    save_checkpoint(tmp_path / "given" / "best_model.pth", dataclasses.replace(checkpoint, seen={}))
    split = read_split(fold_run / "checkpoints" / "split.json")
    given = CPU | {"initial_weights": tmp_path / "given" / "best_model.pth"}
    assert set(Trainer(processed_dir, tmp_path / "run", **given).earlier) == {*split.train, *split.validation}
    (tmp_path / "given" / "split.json").unlink()
    assert Trainer(processed_dir, tmp_path / "run", **given).earlier == {}


def test_given_weights_that_are_unusable_are_refused(run_dir, processed_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    name = next(iter(checkpoint.weights))
    for weights_, message in (
        ({key: value for key, value in checkpoint.weights.items() if key != name}, "do not fit the network"),
        (checkpoint.weights | {name: checkpoint.weights[name] * math.nan}, f"not finite, such as in {name}"),
    ):
        save_checkpoint(tmp_path / "bad.pth", dataclasses.replace(checkpoint, weights=weights_))
        with pytest.raises(InputError, match=message):
            Trainer(processed_dir, tmp_path / "run", initial_weights=tmp_path / "bad.pth", **CPU)
    with pytest.raises(InputError, match="is a folder; name a checkpoint in it"):
        Trainer(processed_dir, tmp_path / "run", initial_weights=run_dir, **CPU)


def test_run_goes_on_without_the_file_that_it_began_with(run_dir, processed_dir, tmp_path):
    path = tmp_path / "given.pth"
    shutil.copy(run_dir / "checkpoints" / "best_model.pth", path)
    Trainer(processed_dir, tmp_path / "run", initial_weights=path, num_epochs=1, **CPU).train()
    path.unlink()
    with pytest.raises(InputError, match="the run began with given weights; resume it with initial_weights"):
        Trainer(processed_dir, tmp_path / "run", num_epochs=2, resume=True, **CPU).train()
    trainer = Trainer(processed_dir, tmp_path / "run", initial_weights=path, num_epochs=2, resume=True, **CPU)
    trainer.train()
    assert trainer.earlier and trainer.epoch == 2


def test_patch_with_a_nodule_is_reported_as_neither_hard_nor_easy(processed_dir, tmp_path):
    trainer = Trainer(processed_dir, tmp_path, patches=Patches((16, 16, 16)), **CPU)
    image, mask = torch.rand(3, 1, 16, 16, 16), torch.zeros(3, 1, 16, 16, 16, dtype=torch.uint8)
    mask[0, 0, 4:8, 4:8, 4:8] = 1
    mask[1] = IGNORED
    _, with_nodule, unknown, background = trainer._learn(image, mask).tolist()
    assert math.isnan(with_nodule) and unknown == 0 < background < 1


def test_training_that_was_broken_off_does_not_go_on_from_the_middle_of_an_epoch(processed_dir, tmp_path, monkeypatch):
    run_epoch = Trainer._run_epoch

    def run(self: Trainer) -> None:
        if self.epoch == 1:
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr(Trainer, "_run_epoch", run)
    trainer = Trainer(processed_dir, tmp_path, num_epochs=3, **CPU)
    with pytest.raises(KeyboardInterrupt, match="epoch 1 is kept"):
        trainer.train()
    monkeypatch.setattr(Trainer, "_run_epoch", run_epoch)
    with pytest.raises(InputError, match="make a new Trainer with resume=True"):
        trainer.train()
    assert len(Trainer(processed_dir, tmp_path, num_epochs=3, resume=True, **CPU).train()) == 3


@pytest.mark.parametrize("is_alone", [True, False])
def test_last_batch_from_which_batch_norm_cannot_learn_is_refused(processed_dir, tmp_path, is_alone):
    number = len(Trainer(processed_dir, tmp_path, **CPU).split.train)
    options = CPU | {"patches": Patches(size=(2, 2, 2), per_scan=3), "batch_size": 3 * number - 1 if is_alone else 3}
    options |= {"channels": (4, 8), "strides": (2,)}
    if is_alone:
        with pytest.raises(InputError, match="the last batch holds one array"):
            Trainer(processed_dir, tmp_path, **options)
    else:
        Trainer(processed_dir, tmp_path, **options)


def test_options_that_others_leave_without_effect_are_told(processed_dir, tmp_path, caplog):
    options = CPU | {"patches": Patches(size=(8, 8, 8), per_scan=1), "num_epochs": 1}
    Trainer(processed_dir, tmp_path, augmentation=replace(AUGMENTATION, paste_per_scan=3), **options).train()
    assert "augmentation.paste_per_scan without effect: patches are drawn, and paste_prob is theirs" in caplog.text
    options["loss"] = LossSettings(name="focal", per_sample=False)
    Trainer(processed_dir, tmp_path, overwrite=True, **options).train()
    assert "loss.per_sample without effect: the focal loss has no Dice" in caplog.text
