"""What only a GPU can show. TEST_GPU=1 python -m pytest tests/test_gpu.py"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY

import infer
import train
from dataset import Augmentation, AugmentationParameters, Patches, augment_batch
from infer import NoduleInferencer
from model import LungNodule3DUNet, load_checkpoint, to_device
from train import WARM_UP, LossSettings, RecordedStep, Speed, Trainer
from utils import UserError, read_processed, read_processed_list

pytestmark = pytest.mark.skipif(
    os.environ.get("TEST_GPU") != "1" or not torch.cuda.is_available(), reason="TEST_GPU=1 and a CUDA device run these"
)

ROOT = Path(__file__).resolve().parents[1]
HARDEST = LossSettings(hardest_share=0.01)
GPU = torch.device("cuda")
PATCHES = {"patches": Patches((16, 16, 16), per_scan=4)}
# Trains a process of its own in a group that shares one GPU, which NCCL would refuse; batch norm sees the whole batch.
SHARED_GPU = """
import sys
import torch
from train import Trainer, ValidationSettings
torch.distributed.init_process_group("gloo")
trainer = Trainer(sys.argv[1], sys.argv[2], device="cuda:0", channels=(4, 8), strides=(2,), num_res_units=0, dropout=0,
                  num_epochs=4, mixed_precision=False, learning_rate=0.01, num_workers=0,
                  validation=ValidationSettings(fraction=0.5))
trainer.train()
assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in trainer.network.modules())
torch.distributed.destroy_process_group()
"""


def weights(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoints" / f"checkpoint_epoch_{epoch}.pth").weights


def log_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "log.csv").drop(columns=["training_seconds", "validation_seconds"])


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_network_gives_what_it_gives_on_a_cpu(exact):
    torch.manual_seed(0)
    network, image = LungNodule3DUNet(**TINY).eval(), torch.rand(2, 1, 16, 24, 32)
    with torch.no_grad():
        expected = network(image)
        found = to_device(network, GPU)(image.to(GPU)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_augmentation_gives_what_it_gives_on_a_cpu():
    rng, shape = np.random.default_rng(0), (24, 32, 32)
    ranges = Augmentation(affine_prob=1, noise_prob=0, scale_prob=1, shift_prob=1)
    images = torch.from_numpy(rng.random((4, 1, *shape), np.float32))
    masks = (images > 0.99).to(torch.uint8)
    drawn = [ranges.draw(rng, shape, (2.0, 1.0, 1.0), np.array([[12, 16, 16]])) for _ in images]
    expected = augment_batch(images, masks, drawn)
    found = [part.cpu() for part in augment_batch(images.to(GPU), masks.to(GPU), drawn)]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-3)
    assert (found[1] != expected[1]).float().mean() < 1e-3  # a voxel on the border of two


def test_noise_of_a_seed_is_the_same_again():
    images, masks = torch.zeros(1, 1, 8, 8, 8, device=GPU), torch.zeros(1, 1, 8, 8, 8, device=GPU)
    drawn = [AugmentationParameters(noise_std=0.05, noise_seed=7)]
    first, second = (augment_batch(images, masks, drawn)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert 0.04 < first.std() < 0.06


@pytest.mark.parametrize("patches", [{}, PATCHES])
def test_deterministic_training_resumes_bit_identically_with_other_workers(processed_dir, tmp_path, patches):
    options = {"device": "cuda", "checkpoint_interval": 1, "num_epochs": 2, **TINY, **patches}
    options["speed"] = Speed(deterministic=True, cache="memory")  # what is on the GPU needs no workers
    Trainer(processed_dir, tmp_path / "whole", num_workers=2, **options).train()
    checkpoints = tmp_path / "resumed" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("split.json", "checkpoint_epoch_1.pth"):
        shutil.copy(tmp_path / "whole" / "checkpoints" / name, checkpoints)
    Trainer(processed_dir, tmp_path / "resumed", num_workers=0, resume=True, **options).train()
    pd.testing.assert_frame_equal(log_of(tmp_path / "resumed"), log_of(tmp_path / "whole"), check_exact=True)
    whole, resumed = weights(tmp_path / "whole", 2), weights(tmp_path / "resumed", 2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("cache", ["memory", "files"])
def test_training_does_not_depend_on_where_scans_are_kept(processed_dir, tmp_path, cache):
    options = {"device": "cuda", "num_epochs": 2, **TINY, **PATCHES}
    for where in ("device", cache):
        Trainer(processed_dir, tmp_path / where, speed=Speed(cache=where, deterministic=True), **options).train()
    pd.testing.assert_frame_equal(log_of(tmp_path / "device"), log_of(tmp_path / cache), check_exact=True)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"network": "subpixel", "channels": (4, 8, 8), "strides": (2, 2), "loss": HARDEST}],
)
def test_recorded_steps_do_what_steps_one_by_one_do(processed_dir, tmp_path, monkeypatch, options):
    recordings = []
    record = RecordedStep._record
    monkeypatch.setattr(RecordedStep, "_record", lambda self, *batch: recordings.append(record(self, *batch)))
    given = {
        "device": "cuda",
        "num_epochs": 3,
        "learning_rate": 0.01,
        **TINY,
        **PATCHES,
        **options,
    }
    given["patches"] = Patches((16, 16, 16), per_scan=3)  # the last of nine patches is a batch of its own
    for recorded in (False, True):
        speed = Speed(deterministic=True, record_steps=recorded)
        Trainer(processed_dir, tmp_path / str(recorded), speed=speed, **given).train()
    assert len(recordings) == 3  # one an epoch
    pd.testing.assert_frame_equal(log_of(tmp_path / "True"), log_of(tmp_path / "False"), check_exact=True)
    recorded, single = weights(tmp_path / "True", 3), weights(tmp_path / "False", 3)
    assert all(torch.equal(recorded[name], single[name]) for name in single)


def test_steps_are_not_recorded_where_memory_is_short(processed_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "free_memory", lambda device: 0)
    trainer = Trainer(processed_dir, tmp_path, device="cuda", num_epochs=2, **TINY, **PATCHES)
    trainer.train()
    assert not trainer.recorder._fits


@pytest.mark.parametrize("cache", ["device", "memory"])
def test_no_step_waits_for_the_gpu(processed_dir, tmp_path, cache):
    augmentation = Augmentation(affine_prob=1, noise_prob=1, scale_prob=1, shift_prob=1)
    speed = Speed(cache=cache)
    trainer = Trainer(processed_dir, tmp_path, device="cuda", speed=speed, augmentation=augmentation, **TINY)
    for _ in range(4):
        trainer._train_epoch()  # first uses of kernels may wait
    trainer._step(next(iter(trainer.loader)))  # and so does a recording
    for batch in trainer.loader:
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16, None])
def test_loss_that_is_not_finite_changes_nothing(processed_dir, tmp_path, monkeypatch, half):
    monkeypatch.setattr(train, "autocast_dtype", lambda device, mixed_precision: half)
    trainer = Trainer(processed_dir, tmp_path, device="cuda", num_workers=0, augmentation=None, **TINY)
    trainer._train_epoch()
    batch = next(iter(trainer.loader))
    for _ in range(WARM_UP + 1):  # the last of them is recorded
        trainer._step(dict(batch))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    batch["image"][0, 0, 0, 0, 0] = torch.nan
    assert not trainer._step(dict(batch))[0].isfinite()
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
    batch["image"].nan_to_num_(0.0)
    for _ in range(20):  # a gradient scaler leaves steps out until it has found its scale
        assert trainer._step(dict(batch))[0].isfinite()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.network.named_parameters())


def test_compiled_network_trains_to_the_same_losses(processed_dir, tmp_path, exact):
    options = {"device": "cuda", "mixed_precision": False, "num_epochs": 2, "num_workers": 0, **TINY}
    for compiled in (False, True):
        Trainer(processed_dir, tmp_path / str(compiled), speed=Speed(compile_network=compiled), **options).train()
    pd.testing.assert_frame_equal(log_of(tmp_path / "True"), log_of(tmp_path / "False"), rtol=1e-3)


def test_full_gpu_ends_in_a_remedy(processed_dir, tmp_path):
    trainer = Trainer(processed_dir, tmp_path, device="cuda", num_workers=0, **TINY | {"channels": (256, 512)})
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(UserError, match=r"CUDA is out of memory\. Use a smaller batch_size"):
            trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("mirrors", [0, 3])
def test_scan_too_large_for_the_gpu_slides_through_it(processed_dir, tmp_path, monkeypatch, mirrors):
    Trainer(processed_dir, tmp_path, num_epochs=2, device="cuda", learning_rate=0.05, **TINY, **PATCHES).train()
    scan = read_processed(processed_dir, read_processed_list(processed_dir)[0])
    found = []
    for share in (0.5, 0.0):  # on the GPU, in main memory
        monkeypatch.setattr(infer, "MEMORY_SHARE", share)
        path = tmp_path / "checkpoints" / "best_model.pth"
        inferencer = NoduleInferencer(path, tmp_path / "out", mirrors=mirrors, mixed_precision=False)
        assert inferencer.predictor.to_tensor(scan.image).device.type == ("cuda" if share else "cpu")
        found.append(inferencer.predict_probability(scan.image))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


@pytest.mark.slow
def test_batch_norm_sees_the_batch_of_all_processes(processed_dir, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED_GPU)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "NVIDIA_TF32_OVERRIDE": "0"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "shared.py")]
    command = [sys.executable, *launch, str(processed_dir), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    words = {"data_dir": processed_dir, "output_dir": tmp_path / "one", "channels": "[4,8]", "strides": "[2]"}
    words |= {"num_res_units": 0, "dropout": 0, "num_epochs": 4, "mixed_precision": "false", "learning_rate": 0.01}
    words |= {"validation.fraction": 0.5, "num_workers": 0}
    command = [sys.executable, str(ROOT / "train.py")]
    command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    # Normalised by halves of the batch, the losses would differ by 1e-4.
    pd.testing.assert_frame_equal(log_of(tmp_path / "two"), log_of(tmp_path / "one"), rtol=2e-5)
