"""Trains the network.

python train.py
python train.py --num_epochs 150 --batch_size 4 --output_dir experiments/custom_run
torchrun --nproc_per_node 4 train.py --batch_size 8
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from utils import set_up_torch

    set_up_torch()

import inspect
import logging
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from data.command_line import parse_command_line, run_main
from dataset import (
    Augmentation,
    Cache,
    LUNA16Dataset,
    Patches,
    PatchSampler,
    ScanSampler,
    augment_batch,
    make_loader,
    make_split,
    visible_nodules,
)
from model import (
    ENSEMBLE,
    LOSSES,
    NETWORKS,
    NODULE_PRIOR,
    Checkpoint,
    InferenceSettings,
    SegmentationNetwork,
    checkpoint_file,
    deeply_supervised,
    load_checkpoint,
    save_checkpoint,
    to_device,
)
from utils import (
    IGNORED,
    SEEN,
    TUNED_FILE,
    Folders,
    InputError,
    Progress,
    ScanMetadata,
    SeenScans,
    Shape,
    Split,
    UserError,
    as_folders,
    atomic_path,
    autocast,
    autocast_dtype,
    check,
    count_cores,
    describe_difference,
    describe_time,
    do_once,
    folder_lock,
    free_memory,
    gather_objects,
    is_distributed,
    join_processes,
    last_line,
    name_folders,
    naming,
    own_gpu,
    parts_of,
    process_count,
    process_rank,
    ranges_of,
    read_metadata,
    read_processed,
    read_processed_list,
    read_split,
    seen_by,
    select_device,
    split_path,
    tell,
    write_csv,
    write_figure,
    write_split,
)
from validate import ValidationResult, Validator, delete_results_of_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Step = Callable[[Tensor, Tensor], Tensor]

AUGMENTATION = Augmentation()
LEAST_SHARE = 1e-4  # of voxels that an untrained network takes for nodule; from 1e-5 on, one did not learn in trials
FIRST_WINDOW = (96, 96, 96)  # voxels, of the first look at a scan; below, more small nodules are missed
EPOCHS_TIMED = 10  # the last ones, by which the time that is left is estimated
WARM_UP = 3  # eager steps before capture: cuDNN tries its kernels, AdamW allocates its state
# Files of a run, and TensorBoard's beside them.
RUN_FILE = re.compile(rf"checkpoints/(best_model\.pth|checkpoint_epoch_\d+\.pth|{TUNED_FILE})|log\.csv|curves\.png")
LOG_FILE = re.compile(r"logs_\d{8}-\d{6}/events\.out\.tfevents.*")
PASTE_SETTINGS = ("augmentation.paste_per_scan",)  # of whole scans
SPLIT_SETTINGS = ("validation.fraction",)
DICE_SETTINGS = ("loss.per_sample", "smooth")
GPU_SETTINGS = ("num_workers", "speed.record_steps")
REPORT_EVERY = 10  # steps between reads of what lies on the device; each read makes the host wait for it
# Settings that may differ between a run and its continuation: but for num_epochs they do not change the result.
FREE_SETTINGS = ("num_epochs", "num_workers", "device", "checkpoint_interval", "speed.cache", "speed.record_steps")
PATH_SETTINGS = ("data_dir", "output_dir", "validation.data_dir", "initial_weights")  # files may move
OUT_OF_MEMORY = (
    "CUDA is out of memory. Use a smaller batch_size (now {batch_size}), fewer channels, as "
    "channels=(16, 32, 64, 128, 256) (now {channels}), keep the scans elsewhere, as cache='memory' (now {cache!r}), "
    "record_steps=False (now {record_steps}), or preprocess to a smaller target_size, as (48, 192, 192)"
)


@dataclass(frozen=True)
class LossSettings:
    """The loss beside its weights.

    Args:
        name: 'dice_bce' is DiceBCELoss; 'dice_focal' takes the focal loss for the cross-entropy, 'focal' that alone;
            'tversky' takes the Tversky index for Dice; of 'boundary' a boundary loss takes over from epoch to epoch.
        per_sample: Take the Dice loss of each sample, so that small nodules count like large ones, not of the batch.
        hardest_share: Share of each sample's voxels, the worst ones, that the cross-entropy is averaged over.
    """

    name: str = "dice_bce"
    per_sample: bool = True
    hardest_share: float = 1.0

    def __post_init__(self) -> None:
        check(self.name in LOSSES, f"loss.name must be one of {', '.join(LOSSES)}, not {self.name!r}")


@dataclass(frozen=True)
class ValidationSettings:
    """Which scans choose the best epoch, when, and how they are looked at.

    Args:
        fraction: Share of the scans kept for validation, without a data_dir for it.
        data_dir: Processed folder or folders whose scans are all kept for validation; those of the training's data_dir
            are then all trained on. null keeps a fraction of these.
        fold: LUNA16's subset (0 to 9) to hold out for `validate.py --fold`; null holds out nothing.
        interval: Epochs between validations; the last epoch is always validated. In the first tenth of the epochs only
            the 1st, 2nd, 4th, 8th, ... due one takes place.
        mirrors: Mirror images, and from the 8th on quarter turns, 0 to 15, whose probabilities validation and later
            inference average with those of the scan itself, or with patches of what may be a nodule.
        threshold: Probability from which a voxel counts as nodule, in validation and later inference. A lower one makes
            nodules larger.
    """

    fraction: float = 0.2
    data_dir: Folders | None = None
    fold: int | None = None
    interval: int = 1
    mirrors: int = 0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check(self.interval >= 1, f"validation.interval must be at least 1, not {self.interval}")
        check(
            self.data_dir is None or self.fold is None,
            "validation.data_dir names all scans for validation; leave out validation.fold",
        )


@dataclass(frozen=True)
class Speed:
    """What makes training faster; none of it changes what is learnt, but for rounding.

    Args:
        cache: Where the training scans are kept: on the 'device', in 'memory' or in their 'files'; null takes the first
            of these in which they take no more than half of what is free (where nodules are pasted, not the device).
        deterministic: Make a CUDA run repeatable, at the cost of speed; a CPU run always is.
        compile_network: Compile the network, which takes half a minute and needs a C compiler. On a GPU it makes steps
            of 'unet' faster and those of 'subpixel' slower (tests/bench/README.md).
        record_steps: On a GPU, capture a step as a CUDA graph and replay it. It needs twice the memory of a step. It is
            left out where that is not free, with compile_network, float16, or several processes.
    """

    cache: Cache | None = None
    deterministic: bool = False
    compile_network: bool = False
    record_steps: bool = True


LOSS, VALIDATION, SPEED = LossSettings(), ValidationSettings(), Speed()
GROUPS = {"loss": LossSettings, "validation": ValidationSettings, "patches": Patches, "speed": Speed}


class Trainer:
    """Trains a network on a processed data set; ``train()`` does all of it.

    Args:
        data_dir: Folder that preprocess.py wrote, or several, whose scans are trained on together.
        output_dir: Where checkpoints, log.csv and TensorBoard logs go.
        num_epochs: Passes over the training scans. A run that is resumed may have more than before: its learning rate
            then goes on along the cosine of the new length.
        batch_size: Scans or patches in a step, of all processes together where ``torchrun`` starts several.
        learning_rate: Of AdamW at the start; a cosine takes it to 0.
        weight_decay: Of AdamW.
        num_workers: Processes that load data for a GPU; a CPU loads in the training process itself.
        device: 'cuda', 'cuda:<n>' or 'cpu'.
        mixed_precision: bf16 where the hardware has it, else fp16 with a gradient scaler on CUDA, else float32.
        checkpoint_interval: Epochs between checkpoint_epoch_<n>.pth.
        network: 'unet' is LungNodule3DUNet; 'subpixel' is SubpixelUNet, whose steps are faster on a CPU;
            'subpixel_instance' has instance norm, which does not depend on how processes share a batch. The others work
            at full resolution, so that a step takes several times as long: 'nnunet' and 'nnunet_residual' of nnU-Net,
            with deep supervision, 'vnet', 'attention_unet' and 'segresnet'.
        channels: Features of each level, e.g. '[16,32,64,128,256]'.
        strides: Downsampling between the levels, e.g. '[2,2,2,2]'.
        num_res_units: Convolutions in each residual unit.
        dropout: Dropout probability.
        dice_weight: Weight of the Dice loss.
        bce_weight: Weight of the binary cross-entropy.
        smooth: Smoothing of the Dice loss.
        loss: Further settings of the loss.
        validation: Which scans choose the best epoch, and when.
        patches: Train on patches; null trains on whole scans.
        augmentation: How training scans are changed at random; null leaves them as they are.
        speed: What makes training faster.
        initial_weights: Checkpoint whose weights a fresh run begins with, or 'pretrained' for those that come with the
            project; null begins with random ones.
        seed: Of weights, split, order and augmentation.
        resume: Go on from the newest good checkpoint of output_dir.
        overwrite: Delete the checkpoints and logs of an earlier run in output_dir.

    Building a trainer checks everything and changes nothing: files and global random states are ``train``'s to change.

    Raises:
        FileNotFoundError: There is no processed data.
        FileExistsError: output_dir holds a run, and neither resume nor overwrite is set.
        InputError: A value is out of its range, or the data does not suit the network.
    """

    def __init__(
        self,
        data_dir: Folders = "data/LUNA16/processed",
        output_dir: str | Path = "experiments/luna16_unet",
        num_epochs: int = 100,
        batch_size: int = 2,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-5,
        num_workers: int = 4,
        device: str = "cuda",
        mixed_precision: bool = True,
        checkpoint_interval: int = 5,
        network: str = "unet",
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int] = (2, 2, 2, 2),
        num_res_units: int = 2,
        dropout: float = 0.1,
        dice_weight: float = 0.5,
        bce_weight: float = 0.5,
        smooth: float = 1e-6,
        loss: LossSettings = LOSS,
        validation: ValidationSettings = VALIDATION,
        patches: Patches | None = None,
        augmentation: Augmentation | None = AUGMENTATION,
        speed: Speed = SPEED,
        initial_weights: str | Path | None = None,
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "resume", "overwrite")}
        self.settings = _flatten(given)
        check(not (resume and overwrite), "resume and overwrite exclude each other; leave one of them out")
        self._check_settings()
        self._validation_dirs = [] if validation.data_dir is None else as_folders(validation.data_dir)
        self._training_dirs, self.output_dir = as_folders(data_dir), Path(output_dir)
        self.data_dir = as_folders([*self._training_dirs, *self._validation_dirs])
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.num_epochs, self.batch_size = num_epochs, batch_size
        self.checkpoint_interval, self.validation_interval = checkpoint_interval, validation.interval
        self.patches = patches
        self.patch_size: Shape | None = None if patches is None else tuple(patches.size)  # type: ignore[assignment]
        self.augmentation = augmentation
        self.resume, self.overwrite = resume, overwrite
        self._set_start()
        uids = read_processed_list(self.data_dir)
        self._check_output()
        self.split = self._split(uids)
        self.metadata = self._read_metadata()
        self.preprocessing = next(iter(self.metadata.values())).preprocessing
        self.device = own_gpu(select_device(device, warn=False))
        self.autocast_dtype = autocast_dtype(self.device, mixed_precision)
        self.inference = self._first_inference_settings(validation)
        if not is_distributed():  # else the processes must have found each other
            self._build()

    # ---- before training

    def _set_start(self) -> None:
        """The state of a run that has not begun."""
        self.epoch = 0  # epochs done
        self.best: dict[str, Any] | None = None  # epoch, Dice, loss and false-positive nodules of the best model
        self.log: list[dict[str, float]] = []
        self._unsaved: Checkpoint | None = None  # state after the last epoch, where no checkpoint holds it
        self._kept_epoch = 0  # of that state, or of the newest checkpoint
        self._names: list[str] = []  # of the checkpoints of that epoch, the last of which may be half written
        self._is_broken = False  # whether an epoch was broken off, and the weights are those in its middle
        self._has_started = False  # whether output_dir holds this run's split, and no earlier run

    def _first_inference_settings(self, validation: ValidationSettings) -> InferenceSettings:
        """How the network looks at scans; the last validation chooses the min_score."""
        spacing = np.median([self.metadata[uid].grid.spacing for uid in self.split.train], axis=0)
        return InferenceSettings(
            threshold=validation.threshold,
            mirrors=validation.mirrors,
            window=self.patch_size,
            grid_spacing=tuple(spacing.tolist()),
            first_window=FIRST_WINDOW if self.patch_size else None,
        )

    def _build(self) -> None:
        """Network, loss, optimiser and data; leaves the global random states as they were."""
        with self._memory_advice(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings["seed"])
            self._build_network()
            self._check_shapes()
            self._build_data()

    def _check_settings(self) -> None:
        given = self.settings
        for name in ("num_epochs", "batch_size", "checkpoint_interval"):
            check(given[name] >= 1, f"{name} must be at least 1, not {given[name]}")
        check(0 <= given["seed"] < 2**63, f"seed must be 0 to 2**63 - 1, not {given['seed']}")
        for name in ("weight_decay", "num_workers"):
            check(given[name] >= 0, f"{name} must not be negative, not {given[name]}")
        check(given["learning_rate"] > 0, f"learning_rate must be positive, not {given['learning_rate']}")
        check(given["network"] in NETWORKS, f"network must be one of {', '.join(NETWORKS)}, not {given['network']!r}")
        pastes = (given["augmentation"] or {}).get("paste_prob", 0) > 0
        check(
            not pastes or given["patches.size"] is not None,
            "paste_prob must be 0 without patches: nodules are pasted into patches",
        )

    def _build_network(self) -> None:
        """Network, loss, optimiser, schedule and gradient scaler."""
        given = self.settings
        architecture = {name: given[name] for name in ("channels", "strides", "num_res_units", "dropout")}
        network = NETWORKS[given["network"]](**architecture)
        if process_count() > 1 and self.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        elif process_count() > 1 and network.arguments["norm"] == "batch":
            logger.warning("on CPUs batch norm sees a process's share of a batch; subpixel_instance has none")
        network.expect(self._nodule_share())
        self.earlier: SeenScans = {}
        # A run that goes on has them in its own checkpoints.
        if given["initial_weights"] is not None and not (self.resume and self._whole_checkpoint()):
            self._take_initial_weights(network, checkpoint_file(given["initial_weights"]))
        self.network: SegmentationNetwork = to_device(network, self.device)
        loss = {name: given[name] for name in ("dice_weight", "bce_weight", "smooth")}
        loss |= {name: given[f"loss.{name}"] for name in ("per_sample", "hardest_share")}
        make_loss = LOSSES[given["loss.name"]]
        self.loss = make_loss(**loss, gather=gather_samples).to(self.device)
        self.validation_loss = make_loss(**loss).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=given["learning_rate"],
            # Gradients grow a thousandfold when a network begins to learn. With torch's 0.999 AdamW divides them by
            # what they were long before, so that its steps are too large then, and too small after an error.
            betas=(0.9, 0.99),
            weight_decay=given["weight_decay"],
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        self.trained: nn.Module = self.network
        if given["speed.compile_network"]:
            self.trained = torch.compile(self.network, dynamic=False)  # type: ignore[assignment]
        if process_count() > 1:
            self.trained = DistributedDataParallel(self.trained)
        compiled_or_scaled = given["speed.compile_network"] or self.scaler.is_enabled()
        can_record = self.device.type == "cuda" and process_count() == 1 and not compiled_or_scaled
        self.recorder = RecordedStep(self.device) if given["speed.record_steps"] and can_record else None

    def _take_initial_weights(self, network: SegmentationNetwork, path: Path) -> None:
        """Gives an untrained network the weights of a checkpoint, and notes what these have seen.

        Raises:
            InputError: They are those of another network, or hold numbers that are not finite.
        """
        checkpoint = load_checkpoint(path)
        check(checkpoint.network != ENSEMBLE, f"initial_weights {path} are an ensemble; name one of its members")
        theirs = checkpoint.arguments | {"network": checkpoint.network}
        ours = network.arguments | {"network": self.settings["network"]}
        differing = [name for name in ours if name != "dropout" and theirs.get(name) != ours[name]]
        check(
            not differing,
            f"initial_weights {path} are of another network: "
            + ", ".join(f"{name} is {theirs.get(name)} there and {ours[name]} here" for name in differing)
            + "; set these options alike, or train from random weights",
        )
        try:
            network.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            raise InputError(f"initial_weights {path} do not fit the network ({last_line(error)})") from error
        bad = [name for name, weight in network.state_dict().items() if not torch.isfinite(weight).all()]
        check(not bad, f"initial_weights {path} hold numbers that are not finite, such as in {next(iter(bad), '')}")
        if checkpoint.preprocessing != self.preprocessing:
            difference = describe_difference(self.preprocessing, checkpoint.preprocessing)
            logger.warning("the scans were prepared otherwise than those of initial_weights: %s", difference)
        self._note_earlier(checkpoint.seen, path)

    def _note_earlier(self, seen: SeenScans, path: Path) -> None:
        """Notes which scans the initial weights have seen, by their checkpoint or the split beside it.

        Scans that chose their best epoch may choose that of this training, too: they have taught nothing.
        """
        seen = seen_by(seen, path)
        if not seen:
            logger.warning("%s does not say which scans it has seen; these may be scored as new ones", path)
        again = {uid for uid in self.split.validation if seen.get(uid, (None, ""))[1] == "validation"}
        self.earlier = {uid: (patient, "earlier") for uid, (patient, _) in seen.items() if uid not in again}
        for name, uids in (("validation", self.split.validation), ("held-out", self.split.test)):
            parts = parts_of({uid: read_metadata(self.data_dir, uid).patient for uid in uids}, None, self.earlier)
            known = [uid for uid, part in parts.items() if part == SEEN]
            if known:
                logger.warning(
                    "%d of %d %s scans have been seen by the initial weights: no score of them is fair, such as %s",
                    len(known),
                    len(parts),
                    name,
                    known[0],
                )

    def _seen(self) -> SeenScans:
        """The scans that this training, or that of its initial weights, has seen."""
        seen = dict(self.earlier)
        for part in ("train", "validation"):
            for uid in getattr(self.split, part):
                patient, before = self.earlier.get(uid, (None, part))
                seen[uid] = (patient or self.metadata[uid].patient, before)
        return seen

    def _nodule_share(self) -> float:
        """Share of the voxels that are nodule in what the network is trained on at first."""
        scans = [self.metadata[uid] for uid in self.split.train]
        volumes = [nodule.voxels for scan in scans for nodule in visible_nodules(scan)]
        if self.patches is None:
            pasted = 0 if self.augmentation is None else self.augmentation.paste_per_scan
            nodules = len(volumes) / len(scans) + pasted
            voxels = float(np.mean([math.prod(scan.grid.shape_zyx) for scan in scans]))
        else:
            nodules, voxels = self.patches.nodule_share, math.prod(self.patches.size)
        share = nodules * float(np.mean(volumes or [0])) / voxels  # of a sample
        return min(max(share, LEAST_SHARE), NODULE_PRIOR)

    def _build_data(self) -> None:
        """Sampler and loader of the training scans, and the validator of the others."""
        given = self.settings
        dataset = LUNA16Dataset(
            self.data_dir,
            self.split.train,
            self.augmentation,
            given["seed"],
            self.patch_size,
            given["speed.cache"],
            self.device,
        )
        pastes = 0 if self.augmentation is None else self.augmentation.paste_per_scan
        self.sampler: ScanSampler | PatchSampler = ScanSampler(len(dataset), given["seed"], pastes, self.num_epochs)
        if self.patches is not None:
            self.sampler = PatchSampler(dataset.metadata, dataset.lung_points(), self.patches, given["seed"])
        self.loader = make_loader(dataset, self.sampler, self.batch_size, given["num_workers"], self.device)
        self.validator = Validator(
            self.data_dir,
            device=str(self.device),
            mixed_precision=given["mixed_precision"],
            model=self.network,
            settings=self.inference,
            seriesuids=self.split.validation,
            loss=self.validation_loss,
        )

    def _old_files(self, kind: re.Pattern) -> list[Path]:
        """Files of an earlier run in output_dir, of one kind."""
        paths = [*self.output_dir.glob("*"), *self.output_dir.glob("*/*")]
        return [path for path in paths if kind.fullmatch(path.relative_to(self.output_dir).as_posix())]

    def _check_output(self) -> None:
        """Refuses a folder that holds a run."""
        if self._old_files(RUN_FILE) and not (self.resume or self.overwrite):
            raise FileExistsError(
                f"{self.output_dir} holds a training run; go on with it by resume=True (--resume true), replace it by "
                "overwrite=True (--overwrite true), or name another output_dir"
            )

    def _start_output(self) -> None:
        """Writes the split and, with ``overwrite``, deletes the earlier run and its results.

        It is called when the first epoch is done and saved: what fails before has cost nothing.
        """
        write_split(self.checkpoint_dir / "split.json", self.split)
        if not self.overwrite:
            return
        kept = [self.checkpoint_dir / name for name in self._names]
        ours = [Path(self.writer.log_dir)] if self.writer else []
        for path in [*self._old_files(RUN_FILE), *self._old_files(LOG_FILE)]:
            if path not in kept and path.parent not in ours:
                path.unlink()
        delete_results_of_run(self.output_dir)
        for folder in self.output_dir.glob("logs_*"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _split(self, uids: list[str]) -> Split:
        """The split of a run that goes on, or a new one."""
        path, given = split_path(self.checkpoint_dir / "best_model.pth"), self.settings
        if given["validation.data_dir"] is None:
            fraction, fold = given["validation.fraction"], given["validation.fold"]
            split = make_split(self.data_dir, uids, fraction, given["seed"], fold)
        else:
            split = self._split_by_folder()
        if self.resume and path.is_file():
            old = read_split(path)
            check(old == split, f"{path} is not the split of these scans and settings; start anew with overwrite=True")
            return old
        return split

    def _split_by_folder(self) -> Split:
        """The scans of the folders of validation alone, and all others."""
        train, validation = (read_processed_list(part) for part in (self._training_dirs, self._validation_dirs))
        patients = {uid: read_metadata(self.data_dir, uid).patient for uid in train + validation}
        shared = {patients[uid]: uid for uid in train if patients[uid] is not None}
        for uid in validation:
            check(
                patients[uid] not in shared,
                f"scan {uid} is for validation, and {shared.get(patients[uid])} of the same patient for training; move "
                "one of them",
            )
        return Split(tuple(sorted(train)), tuple(sorted(validation)))

    def _tell_split(self) -> None:
        """Says how many scans and nodules each part has."""
        parts = []
        for part in ("train", "validation", "test"):
            uids = getattr(self.split, part)
            masks = [nodule.is_shown for uid in uids if uid in self.metadata for nodule in self.metadata[uid].nodules]
            parts.append(f"{len(uids)} {part}" + (f" ({sum(masks)} nodules)" if part != "test" else ""))
            check(
                part != "train" or any(masks),
                "no training scan has a nodule in its mask, so nothing can be learnt; do the seriesuid and the "
                "coordinates of the annotations belong to these scans? See annotation_problems.csv in "
                + name_folders(self.data_dir),
            )
            if part == "validation" and not any(masks):
                logger.warning("no validation scan has a nodule: there is no Dice, and the loss chooses the best epoch")
        tell(f"scans: {', '.join(parts)}")

    def _read_metadata(self) -> dict[str, ScanMetadata]:
        """{series UID: metadata} of the scans, which must be there and prepared alike."""
        found = {}
        for uid in self.split.train + self.split.validation:
            found[uid] = read_processed(self.data_dir, uid).metadata  # opens the arrays, too, and reads no voxel
            first = next(iter(found.values()))
            check(
                found[uid].preprocessing == first.preprocessing,
                f"{uid} and {first.seriesuid} were preprocessed with different settings ("
                + describe_difference(found[uid].preprocessing, first.preprocessing)
                + "); run preprocess.py again",
            )
            check(
                self.patch_size is not None or first.preprocessing["target_size"] is not None,
                f"the scans of {name_folders(self.data_dir)} have different shapes; set patches, e.g. --patches.size "
                "'[96,96,96]'",
            )
        return found

    def _check_shapes(self) -> None:
        """Checks that the network takes what it will be given, and in which precision."""
        shapes = {metadata.grid.shape_zyx for metadata in self.metadata.values()}
        for shape in [self.patch_size] if self.patch_size is not None else shapes:
            self.network.check_size(shape)
            self._check_last_batch(shape)
            self._check_precision(shape[0])

    def _check_last_batch(self, shape_zyx: Shape) -> None:
        """Batch norm cannot learn from a single voxel, which a last batch of one leaves on the deepest level."""
        samples = len(self.split.train) * (1 if self.patches is None else self.patches.per_scan)
        is_single = self.network.arguments["norm"] == "batch" and max(shape_zyx) == self.network.divisor
        check(
            not is_single or (samples % self.batch_size or self.batch_size) > 1,
            f"with a batch_size of {self.batch_size} the last batch holds one array of {list(shape_zyx)}, from which "
            f"batch norm cannot learn; take some size above {self.network.divisor}, or another batch_size",
        )

    def _check_precision(self, slices: int) -> None:
        """Takes float32 where half precision is known to be wrong."""
        if self.device.type == "cpu" and self.autocast_dtype is not None and 2 in self.network.depths(slices):
            logger.warning(
                "with %d slices some level of the network has two, for which oneDNN computes wrong gradients in half "
                "precision: training in float32; other sizes along z are faster",
                slices,
            )
            self.autocast_dtype = None

    # ---- training

    def train(self) -> pd.DataFrame:
        """Trains to the last epoch and writes checkpoints and logs on the way.

        Returns:
            The table of ``log.csv``: one row an epoch.

        Raises:
            UserError: CUDA is out of memory (the message names remedies), or no step of an epoch had a finite loss.
            InputError: An earlier call was broken off.
        """
        check(not self._is_broken, "this training was broken off within an epoch; make a new Trainer with resume=True")
        busy = f"another training is at work in {self.output_dir}; wait for it, or name another output_dir"
        first = os.environ.get("RANK", "0") == "0"
        with folder_lock(self.output_dir, busy) if first else nullcontext():
            return self._train()

    def _train(self) -> pd.DataFrame:
        """The training itself, in a folder that is ours alone."""
        select_device(self.settings["device"])  # warns of a missing GPU
        device = join_processes(self.device)
        if is_distributed():
            self.device = device
            self._build()
        self._set_global_states()
        if self.resume:
            self._load_newest()
            check(len(set(gather_objects(self.epoch))) == 1, "all processes must see the same files in output_dir")
        self._tell_split()
        self._tell_ignored()
        logs = self.output_dir / f"logs_{time.strftime('%Y%m%d-%H%M%S')}"
        self.writer = None if process_rank() else SummaryWriter(str(logs))
        if self.writer is not None:
            rows = [f"| {name} | {value} |" for name, value in self.settings.items()]
            self.writer.add_text("settings", "\n".join(["| option | value |", "| --- | --- |", *rows]))
        try:
            with self._memory_advice(), sigterm_as_interrupt():
                try:
                    for _ in range(self.epoch, self.num_epochs):
                        self._is_broken = True
                        self._run_epoch()
                        self._is_broken = False
                except KeyboardInterrupt as error:
                    text = f"interrupted in epoch {self.epoch + 1}; {self._keep_last_epoch()}"
                    raise Interrupted(text, error) from None
                except Exception:
                    tell(self._keep_last_epoch())
                    raise
        finally:
            if self.writer is not None:
                with naming(logs):
                    self.writer.close()
        return pd.DataFrame(self.log)

    def _keep_last_epoch(self) -> str:
        """Saves the state after the last whole epoch, if no checkpoint holds it; says what is kept."""
        if not self._kept_epoch:
            earlier = "; the earlier run is untouched" if self._old_files(RUN_FILE) else ""
            return f"no epoch was finished, and nothing is kept{earlier}"
        with signals_ignored():  # a second Ctrl-C, or the one of a scheduler, must not cost it
            if self._unsaved is not None:
                self._names = self._names or [f"checkpoint_epoch_{self._kept_epoch}.pth"]
                for name in self._names:  # a better epoch is the best model, too
                    self._write(self.checkpoint_dir / name, self._unsaved)
            if not self._has_started and not process_rank():
                self._start_output()
        return f"epoch {self._kept_epoch} is kept in {self.checkpoint_dir}: go on with resume=True (--resume true)"

    def _tell_ignored(self) -> None:
        """Names the options that have no effect here, where a user changed them."""
        signature = inspect.signature(type(self)).parameters
        defaults = _flatten({name: parameter.default for name, parameter in signature.items()})
        given = self.settings | {"augmentation.paste_per_scan": getattr(self.augmentation, "paste_per_scan", None)}
        defaults |= {"augmentation.paste_per_scan": AUGMENTATION.paste_per_scan}
        ignored = {
            "training is on a CPU": GPU_SETTINGS if self.device.type == "cpu" else (),
            "patches are drawn, and paste_prob is theirs": PASTE_SETTINGS if self.patches and self.augmentation else (),
            "validation.data_dir is given": SPLIT_SETTINGS if self._validation_dirs else (),
            "the focal loss has no Dice": DICE_SETTINGS if self.settings["loss.name"] == "focal" else (),
        }
        for reason, names in ignored.items():
            if found := [name for name in names if given[name] != defaults[name]]:
                logger.warning("%s without effect: %s", " and ".join(found), reason)

    def _set_global_states(self) -> None:
        """Random states, and how torch chooses its kernels."""
        seed_everything(self.settings["seed"])
        if process_count() > 1:
            torch.manual_seed(self.settings["seed"] + process_rank())  # each process drops other features
        torch.use_deterministic_algorithms(self.settings["speed.deterministic"], warn_only=True)
        # For each shape that it meets cuDNN tries its kernels and keeps the fastest, which may change from run to run.
        torch.backends.cudnn.benchmark = not self.settings["speed.deterministic"]

    @contextmanager
    def _memory_advice(self) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            given = {name.rpartition(".")[2]: value for name, value in self.settings.items()}
            raise UserError(OUT_OF_MEMORY.format(**given)) from error

    def _run_epoch(self) -> None:
        start = time.perf_counter()
        rate = self._set_learning_rate()
        if begin_epoch := getattr(self.loss, "begin_epoch", None):  # validation's stays, so that epochs can be compared
            begin_epoch(self.epoch, self.num_epochs)
        train_loss = self._train_epoch()
        trained = time.perf_counter()
        copy_from_first(self.network.buffers())  # batch norm's statistics, of which the first process writes its own
        result = self.validator.run_validation() if self._validates(self.epoch + 1) else None
        times = {"training_seconds": trained - start, "validation_seconds": time.perf_counter() - trained}
        is_first = not self.log
        self.epoch += 1
        self.log.append(self._row(train_loss, result, rate, times))
        names = []
        if result is not None:
            self.inference = replace(self.inference, min_score=result.min_score)
            if self._is_best(result):
                names.append("best_model.pth")
        is_due = self.epoch == self.num_epochs or self.epoch % self.checkpoint_interval == 0
        if is_due or (is_first and self.overwrite and not names):  # before the earlier run goes
            names.append(f"checkpoint_epoch_{self.epoch}.pth")
        self._save(names)
        if is_first:
            do_once(self._start_output)
            self._has_started = True
        self._write_log(result)
        tell(self._describe_epoch(self.log[-1]))

    def _set_learning_rate(self) -> float:
        """Half a cosine from the given rate to 0."""
        rate = self.settings["learning_rate"] * (1 + math.cos(math.pi * self.epoch / self.num_epochs)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _validates(self, epoch: int) -> bool:
        """Whether an epoch, counted from 1, is validated: the first ones are not worth the time of each."""
        validations, remainder = divmod(epoch, self.validation_interval)
        is_early = epoch <= self.num_epochs // 10
        is_due = not remainder and (not is_early or validations & (validations - 1) == 0)
        return is_due or epoch == self.num_epochs

    def _is_best(self, result: ValidationResult) -> bool:
        """Whether this epoch is better than all before: by Dice, then by loss, then by fewer false-positive nodules.

        Excluded findings count neither way, as in the loss. Without a nodule in the validation scans there is no Dice
        to go by: it would be 0 for whoever marks something, and undefined for who does not.
        """
        summary = result.summary
        has_nodules = math.isfinite(summary["dice_of_scans_with_nodules"])
        candidate = {
            "epoch": self.epoch,
            "dice": summary["dice_without_excluded"] if has_nodules else math.nan,
            "loss": result.loss,
            "false_positive_nodules": int(summary["false_positive_nodules"] - summary["on_excluded_findings"]),
        }
        if self.best is not None and _rank(candidate) <= _rank(self.best):
            return False
        self.best = candidate
        return True

    def describe_best(self) -> str:
        """Which epoch is the best one, and by what."""
        if self.best is None:
            return "no epoch was validated"
        epoch, dice, loss = self.best["epoch"], self.best["dice"], self.best["loss"]
        start = f"best epoch: {epoch} of {self.num_epochs}, by validation"
        if math.isfinite(dice):
            return f"{start} Dice {dice:.3f} without excluded findings (loss {loss:.4f})"
        return f"{start} loss {loss:.4f} (Dice is undefined: no validation scan has a nodule)"

    def _train_epoch(self) -> float:
        """One pass over the training scans; returns the mean loss of its finite steps."""
        self.network.train()
        self.sampler.epoch = self.epoch
        pending: list[tuple[dict[str, Any], Tensor]] = []
        known: list[float] = []
        last = next((row["validation_dice"] for row in reversed(self.log) if "validation_dice" in row), math.nan)
        dice = f", last Dice {last:.3f}" if math.isfinite(last) else ""
        desc = f"epoch {self.epoch + 1}/{self.num_epochs}"
        with Progress(len(self.loader), desc, "step") as progress:
            for batch in self.loader:
                pending.append((batch, self._step(batch)))
                if len(pending) == REPORT_EVERY:
                    known += self._read_losses(pending)
                progress.advance(f"loss {np.mean(known):.4f}{dice}" if known else "")
            known += self._read_losses(pending)
        if self.recorder is not None:
            self.optimizer.zero_grad(set_to_none=True)  # the gradients lie in the recording's memory
            self.recorder.forget()  # it holds the learning rate
        if not known:
            raise UserError("no step of this epoch had a finite loss; lower learning_rate or set mixed_precision=False")
        return float(np.mean(known))

    def _read_losses(self, pending: list[tuple[dict[str, Any], Tensor]]) -> list[float]:
        """Fetches the finite losses of some steps from the device, and empties the list.

        Steps that were left out are reported by their scans; errors of patches go to the sampler.
        """
        figures = torch.cat([step for _, step in pending]).tolist() if pending else []
        steps = []
        for batch, _ in pending:
            loss, *errors = figures[: 1 + len(batch["key"])]
            del figures[: 1 + len(batch["key"])]
            steps.append((loss, errors, batch["key"], batch["seriesuid"]))
        pending.clear()
        losses = []
        for parts in zip(*gather_objects(steps), strict=True):  # of one step, what each process saw
            loss = parts[0][0]
            if math.isfinite(loss):
                losses.append(loss)
                for _, errors, keys, _ in parts:
                    self.sampler.record(keys, errors)
            else:
                scans = ", ".join(uid for *_, uids in parts for uid in uids)
                logger.warning("epoch %d: loss or gradient not finite on %s; step left out", self.epoch + 1, scans)
        return losses

    def _step(self, batch: dict[str, Any]) -> Tensor:
        """One optimiser step on a batch, augmented; what ``_learn`` returns."""
        image = batch.pop("image").to(self.device, non_blocking=True).float()
        mask = batch.pop("mask").to(self.device, non_blocking=True)
        if batch["augmentation"][0] is not None:
            image, mask = augment_batch(image, mask, batch["augmentation"])
        return self._learn(image, mask) if self.recorder is None else self.recorder(self._learn, image, mask)

    def _learn(self, image: Tensor, mask: Tensor) -> Tensor:
        """One optimiser step; a loss or gradient that is not finite changes nothing. Nothing here waits for a GPU.

        With a gradient scaler, infinite gradients are its way to find the scale: it leaves the step out by itself, and
        only the loss is looked at here.

        Returns:
            Float (1 + B,) on the device: the loss, NaN where the step was left out, and the highest probability of each
            sample without a nodule, NaN of the others: beside a nodule's edge it is high, and says nothing.
        """
        statistics = list(self.network.buffers())
        before = [buffer.clone() for buffer in statistics]
        with autocast(self.device, self.autocast_dtype):
            logits = self.trained(image)
        loss = deeply_supervised(self.loss, logits, mask)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * process_count()).backward()  # DistributedDataParallel divides by their number
        finite = self._is_finite(loss.detach())
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))
        self._update(finite)
        background = logits[:, :1].detach().float().masked_fill(mask == IGNORED, -math.inf)
        highest = torch.sigmoid(background.flatten(1).amax(dim=1))
        shows_nodule = (mask == 1).flatten(1).any(dim=1)
        reported = torch.where(finite, loss.detach(), math.nan).reshape(1)
        return torch.cat([reported, highest.masked_fill(shows_nodule, math.nan)])

    def _is_finite(self, loss: Tensor) -> Tensor:
        """Whether loss and gradients are finite; a gradient scaler tries out which are, and looks at them itself."""
        finite = torch.isfinite(loss)
        if self.scaler.is_enabled():
            return finite
        gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        return finite & torch.isfinite(nn.utils.get_total_norm(gradients))

    def _update(self, finite: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # leaves the step out by itself where a gradient is not finite
            self.scaler.update()
            return
        # The fused kernels read this flag on the device, so that nothing waits for it.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()

    # ---- log and checkpoints

    def _row(
        self, train_loss: float, result: ValidationResult | None, rate: float, times: dict[str, float]
    ) -> dict[str, float]:
        """The row of ``log.csv`` for the epoch that is done."""
        row = {"epoch": self.epoch, "train_loss": train_loss, "learning_rate": rate}
        row |= {name: round(seconds, 2) for name, seconds in times.items()}
        if result is not None:
            row |= {
                "validation_loss": result.loss,
                "validation_dice": result.dice,
                "validation_dice_with_nodules": result.summary["dice_of_scans_with_nodules"],
                "validation_dice_without_excluded": result.summary["dice_without_excluded"],
                "min_score": result.min_score,
                "validation_sensitivity": result.summary["sensitivity"]["mean"],
                "validation_precision": result.summary["precision"]["mean"],
                "false_positive_nodules": result.summary["false_positive_nodules"],
            }
        return row

    def _write_log(self, result: ValidationResult | None) -> None:
        """log.csv, curves.png, and TensorBoard's figures and picture of the epoch that is done."""
        if self.writer is None:
            return
        table = pd.DataFrame(self.log)
        write_csv(self.output_dir / "log.csv", table)
        if result is not None or self.epoch == self.num_epochs:
            write_figure(self.output_dir / "curves.png", draw_curves(table))
        with naming(Path(self.writer.log_dir)):
            for name, value in self.log[-1].items():
                if name != "epoch" and not name.endswith("_seconds") and math.isfinite(value):
                    self.writer.add_scalar(name, value, self.epoch)
            is_kept = self.epoch % self.checkpoint_interval == 0 or self.epoch in (1, self.num_epochs)
            if result is not None and is_kept:
                picture = _render(self.validator.draw_example())
                self.writer.add_image("validation", picture, self.epoch, dataformats="HWC")
            self.writer.flush()

    def _describe_epoch(self, row: dict[str, float]) -> str:
        text = f"epoch {self.epoch}/{self.num_epochs}: loss {row['train_loss']:.4f}"
        if "validation_loss" in row:
            dice = row["validation_dice"]
            text += f", validation loss {row['validation_loss']:.4f}, Dice "
            text += f"{dice:.3f}" if math.isfinite(dice) else "undefined"
            text += f", {int(row['false_positive_nodules'])} false-positive nodules"
        spent = [past["training_seconds"] + past["validation_seconds"] for past in self.log[-EPOCHS_TIMED:]]
        left = sum(spent) / len(spent) * (self.num_epochs - self.epoch)
        return f"{text} ({spent[-1]:.0f} s{f', about {describe_time(left)} left' if left else ''})"

    def _random_state(self) -> dict[str, Any]:
        """States of this process's generators."""
        generator = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": [generator[0], generator[1].tolist(), *generator[2:]],  # type: ignore[index]
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _save(self, names: Sequence[str]) -> None:
        """Writes the state after this epoch under these names; without any it is kept in memory for an interruption."""
        state = self._state()
        self._unsaved, self._kept_epoch, self._names = state, self.epoch, list(names)  # for whoever interrupts it
        for name in names:
            self._write(self.checkpoint_dir / name, state)
        self._unsaved = None if names or process_rank() else Checkpoint(**_copy_to_memory(vars(state)))

    def _write(self, path: Path, state: Checkpoint) -> None:
        if process_rank():
            return
        with atomic_path(path) as temporary:
            save_checkpoint(temporary, state)

    def _state(self) -> Checkpoint:
        """All that a resume, an inference or a validation needs; all processes must call it."""
        return Checkpoint(
            network=self.settings["network"],
            arguments=self.network.arguments,
            weights=self.network.state_dict(),
            preprocessing=self.preprocessing,
            inference=self.inference,
            training=self.settings,
            epoch=self.epoch,
            learnt=ranges_of(self.metadata[uid] for uid in self.split.train),
            seen=self._seen(),
            progress={
                "best": self.best,
                "log": self.log,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "sampler": self.sampler.state_dict(),
                "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
                "random": gather_objects(self._random_state()),  # of each process
            },
        )

    def _numbered_checkpoints(self) -> list[Path]:
        """Those of single epochs, the newest first."""
        return sorted(self.checkpoint_dir.glob("checkpoint_epoch_*.pth"), key=_epoch_of, reverse=True)

    def _whole_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint of output_dir that is whole."""
        newest, best = _first_good(self._numbered_checkpoints()), self.checkpoint_dir / "best_model.pth"
        if (other := _first_good([best] if best.is_file() else [])) and (not newest or other.epoch > newest.epoch):
            newest = other
        return newest

    def _load_newest(self) -> None:
        """Restores the newest checkpoint that is whole; a folder without any starts from the beginning."""
        newest = self._whole_checkpoint()
        if newest is None:
            whole = not self._numbered_checkpoints()
            check(whole, f"no checkpoint in {self.checkpoint_dir} is whole; start anew with overwrite=True")
            logger.warning("no checkpoint in %s: starting from the beginning", self.checkpoint_dir)
            return
        self._restore(newest)
        self._kept_epoch, self._has_started = self.epoch, True
        if self.epoch >= self.num_epochs:
            tell(f"all {self.epoch} epochs of {self.output_dir} are done; a larger num_epochs prolongs the run")
        else:
            tell(f"going on after epoch {self.epoch}")

    def _take_threads(self, threads: int) -> None:
        """As many threads as the run had: sums are rounded by how they are shared out."""
        if threads == torch.get_num_threads():
            return
        if threads <= count_cores():
            torch.set_num_threads(threads)
            tell(f"going on with the run's {threads} threads")
        else:
            logger.warning(
                "the run had %d threads, and there are %d cores: it goes on with %d threads, and is no longer "
                "bit-identical to one that was never stopped",
                threads,
                count_cores(),
                torch.get_num_threads(),
            )

    def _restore(self, checkpoint: Checkpoint) -> None:
        theirs, mine, done = checkpoint.training, self.settings, checkpoint.epoch
        check(done <= self.num_epochs, f"the run has done {done} epochs, more than num_epochs={self.num_epochs}")
        differing = [n for n in mine if n not in FREE_SETTINGS + PATH_SETTINGS and mine[n] != theirs.get(n, mine[n])]
        check(
            not differing,
            "a run can only be resumed with its own settings; "
            + ", ".join(f"{name} was {theirs.get(name)}, not {mine[name]}" for name in differing)
            + "; train anew with others, by overwrite=True or in another output_dir",
        )
        begun = [settings.get("initial_weights") is not None for settings in (theirs, mine)]
        check(
            begun[0] == begun[1],
            f"the run began with {'given' if begun[0] else 'random'} weights; resume it "
            + ("with initial_weights, of whatever path" if begun[0] else "without initial_weights"),
        )
        check(checkpoint.preprocessing == self.preprocessing, "the data was preprocessed anew with other settings")
        if theirs["num_epochs"] != self.num_epochs and done < self.num_epochs:
            logger.warning(
                "the run had %d epochs and now has %d: learning rate, pasted nodules and share of a boundary loss go "
                "on as in the new length, so this is not the run that would have had %d from the start",
                theirs["num_epochs"],
                self.num_epochs,
                self.num_epochs,
            )
        progress = checkpoint.progress
        if self.device.type == "cpu" and progress["threads"] is not None:
            self._take_threads(progress["threads"])
        self.network.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(progress["optimizer"])
        for group in self.optimizer.param_groups:
            group["capturable"] = self.device.type == "cuda"  # whatever the checkpoint was trained on
        if progress["scaler"]:  # empty where the run needed none, as with bfloat16
            self.scaler.load_state_dict(progress["scaler"])
        self.sampler.load_state_dict(progress["sampler"])
        self.epoch, self.best, self.log = done, progress["best"], progress["log"]
        self.inference = replace(self.inference, min_score=checkpoint.inference.min_score)
        self.earlier = {uid: entry for uid, entry in checkpoint.seen.items() if entry[1] == "earlier"}
        if len(progress["random"]) == process_count():  # else each keeps what its own seed gave
            self._set_random_state(progress["random"][process_rank()])

    def _set_random_state(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
        torch.set_rng_state(states["torch"].cpu())
        if states["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)


class RecordedStep:
    """Records a training step as a CUDA graph, once, and then replays it.

    A step starts hundreds of kernels, most of which take less time than a processor needs to start one. Steps run as
    they are until WARM_UP of them are done, where memory is short, and on batches of another shape than the first.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._shape: torch.Size | None = None
        self._steps, self._held, self._fits = 0, 0, True
        self.forget()

    def forget(self) -> None:
        """Lets go of the recording and its memory; the next step is recorded, with the learning rate of then."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None

    def __call__(self, step: Step, image: Tensor, mask: Tensor) -> Tensor:
        """What ``step`` returns for image and mask (B, 1, Z, Y, X); it must not wait for the GPU."""
        if self._shape is None:
            self._shape = image.shape
            self._held = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        if not self._fits:
            return step(image, mask)
        if image.shape != self._shape or not self._is_ready():
            return self._run(step, image, mask)
        if self._graph is None:
            self._record(step, image, mask)
        assert self._graph is not None and self._output is not None
        for kept, given in zip(self._inputs, (image, mask), strict=True):
            kept.copy_(given)
        self._graph.replay()
        return self._output.clone()

    def _is_ready(self) -> bool:
        """Whether enough steps have run, and a recording, which keeps its memory, leaves as much for all else."""
        self._steps += 1
        if self._steps == WARM_UP + 1:
            needed, free = torch.cuda.max_memory_allocated(self._device) - self._held, free_memory(self._device)
            self._fits = 2 * needed <= free
            outcome = "recorded and replayed" if self._fits else "not recorded"
            logger.info("a step takes %.1f GB of %.1f GB free on the GPU: %s", needed / 1e9, free / 1e9, outcome)
        return self._steps > WARM_UP and self._fits

    def _run(self, step: Step, image: Tensor, mask: Tensor) -> Tensor:
        """Runs the step where it will be recorded: autograd remembers the stream of a parameter."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            output = step(image, mask)
        here.wait_stream(self._stream)
        return output

    def _record(self, step: Step, image: Tensor, mask: Tensor) -> None:
        self._inputs = image.clone(), mask.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Threads that load data may go on with their own calls meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._output = step(*self._inputs)


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Gives tensors the values that they have in the first process."""
    for tensor in tensors if process_count() > 1 else ():
        distributed.broadcast(tensor, 0)


def gather_samples(figures: Tensor) -> Tensor:
    """Figures (n, samples) of the samples of all processes, (n, all samples); each must have as many.

    Gradients flow to this process's own samples alone. So the sum, not the mean, of the processes' gradients is the
    gradient of what is computed from all.
    """
    if process_count() == 1:
        return figures
    parts = [torch.empty_like(figures) for _ in range(process_count())]
    distributed.all_gather(parts, figures.detach().contiguous())
    parts[process_rank()] = figures
    return torch.cat(parts, dim=1)


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names of their options, as built-in types: a group as 'speed.cache' and so on."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name in GROUPS:
            values = {} if value is None else asdict(value)
            flat |= {f"{name}.{field.name}": _built_in(values.get(field.name)) for field in fields(GROUPS[name])}
        else:
            flat[name] = _built_in(value)
    return flat


def _built_in(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Augmentation):
        return asdict(value)
    return [_built_in(item) for item in value] if isinstance(value, (list, tuple)) else value


def _rank(epoch: dict[str, Any]) -> tuple[float, float, int]:
    """What epochs are compared by, higher is better; what is not a number comes last."""
    dice = epoch["dice"] if math.isfinite(epoch["dice"]) else -math.inf
    loss = epoch["loss"] if math.isfinite(epoch["loss"]) else math.inf
    return dice, -loss, -epoch["false_positive_nodules"]


def _copy_to_memory(value: Any) -> Any:
    """A copy of nested containers, their tensors in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_memory(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_to_memory(item) for item in value)
    return value


class Interrupted(KeyboardInterrupt):
    """A training was stopped from outside; the message says what is kept.

    Args:
        message: It.
        cause: What stopped it.
    """

    def __init__(self, message: str, cause: KeyboardInterrupt | None = None) -> None:
        super().__init__(message)
        self.status = getattr(cause, "status", 130)  # exit status: 128 + the number of the signal


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as a scheduler sends it before it kills."""

    status = 143


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Lets neither Ctrl-C nor SIGTERM stop what is done meanwhile; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises Terminated when SIGTERM comes, so that what is done can be kept; only the main thread can."""

    def stop(*_: Any) -> None:
        """Handles the signal."""
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _epoch_of(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _first_good(paths: Sequence[Path]) -> Checkpoint | None:
    for path in paths:
        try:
            return load_checkpoint(path)
        except InputError as error:  # damage alone; for want of memory or permission no older one is taken
            logger.warning("%s", error)
    return None


def draw_curves(log: pd.DataFrame) -> Figure:
    """Losses and validation Dice over the epochs, and the learning rate.

    Args:
        log: As in ``log.csv``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    losses.plot(log["epoch"], log["train_loss"], label="training")
    losses.set(xlabel="epoch", ylabel="loss", title="loss")
    validated = log.dropna(subset=["validation_loss"]) if "validation_loss" in log else log[:0]
    if len(validated):
        losses.plot(validated["epoch"], validated["validation_loss"], "o-", markersize=3, label="validation")
        for name, label in (("validation_dice", "Dice per scan"), ("validation_sensitivity", "sensitivity")):
            scores.plot(validated["epoch"], validated[name], "o-", markersize=3, label=label)
        scores.legend(loc="lower right", frameon=False)
    losses.legend(loc="upper right", frameon=False)
    scores.set(xlabel="epoch", title="validation", ylim=(0, 1), xlim=losses.get_xlim())
    rates = scores.twinx()
    rates.plot(log["epoch"], log["learning_rate"], color="0.6", linestyle=":")
    rates.set_ylabel("learning rate (dotted)", color="0.5")
    rates.set_ylim(0, None)
    for axes in (losses, scores):
        axes.grid(color="0.9")
    return figure


def _render(figure: Any) -> np.ndarray:
    """uint8 (height, width, RGB) of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _command(argv: list[str] | None) -> int:
    [options], _ = parse_command_line(Trainer, argv=argv, registries={"network": NETWORKS, "loss.name": LOSSES})
    trainer = Trainer(**options)
    trainer.train()
    if process_rank():
        return 0
    print(f"{trainer.describe_best()}\ncheckpoints: {trainer.checkpoint_dir}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are Trainer's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
