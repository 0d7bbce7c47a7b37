"""Small phantom data sets that the tests share; made once a session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

if os.environ.get("TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same path on every machine

import pytest
import torch

from data.phantom import write_phantoms
from preprocess import LUNA16Preprocessor
from train import Trainer, ValidationSettings
from utils import read_processed_list

torch.set_num_threads(1)  # two busy threads on a shared core are slower than one

TINY = {"channels": (4, 8), "strides": (2,), "num_res_units": 0, "dropout": 0.0}  # a network for one second


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four anisotropic scans in LUNA16's format; the third is flipped, the second has no nodule."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantoms(folder, num_scans=4, size_xyz=(64, 64, 32), min_diameter_mm=12, num_processes=2)
    return folder


@pytest.fixture(scope="session")
def processed_dir(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms, prepared at 32 x 48 x 48."""
    folder = tmp_path_factory.mktemp("processed")
    LUNA16Preprocessor(
        phantom_dir / "raw",
        phantom_dir / "annotations.csv",
        phantom_dir / "seg-lungs-LUNA16",
        folder,
        target_size=(32, 48, 48),
        num_processes=2,
    ).process_all()
    return folder


@pytest.fixture(scope="session")
def run_dir(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two epochs with a tiny network; its checkpoints are read by several tests."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(processed_dir, folder, num_epochs=2, device="cpu", mixed_precision=False, **TINY).train()
    return folder


@pytest.fixture(scope="session")
def fold_run(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one epoch with fold 2 held out: the third scan, whose arrays were not there to be trained on."""
    folder = tmp_path_factory.mktemp("fold")
    data = folder / "data"
    shutil.copytree(processed_dir, data)
    for kind in ("images", "masks"):
        (data / kind / f"{read_processed_list(data)[2]}.npy").unlink()
    Trainer(
        data, folder, num_epochs=1, validation=ValidationSettings(fold=2), device="cpu", mixed_precision=False, **TINY
    ).train()
    return folder
