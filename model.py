"""The network, its loss and its checkpoints."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets import DynUNet, UNet
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn
from torch.nn import functional

from utils import IGNORED, InputError, SeenScans, Shape, UserError, Vector, check

CHECKPOINT_FORMAT = 9  # raised whenever older checkpoints can no longer be read or give other results
# What zipfile, zlib and the unpickler raise on flipped or missing bytes, once the file has been read.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
    ValueError,
)
NODULE_PRIOR = 0.05  # probability that an untrained network gives a voxel
START_SHARE = 0.25  # of the usual size of weights before a norm, at the start
LOGIT_GAIN = 4.0  # of the last layer
SURE_LOGIT = -1e4  # of background
START_SLOPE = 0.01  # of PReLU


class SegmentationNetwork(nn.Module):
    """Base class of the networks: checks arguments and sizes of images, and keeps the arguments for checkpoints.

    Args:
        in_channels: Channels of the input, 1 for CT.
        out_channels: Channels of the output, 1 for nodule against background.
        channels: Features at each level, from fine to coarse.
        strides: Downsampling between the levels, one fewer than ``channels``.
        num_res_units: Convolutions in each residual unit; 0 for plain convolutions.
        dropout: Dropout probability.
        norm: 'batch', or, for ``SubpixelUNet``, 'instance', which does not depend on the other samples of a batch.

    Raises:
        ValueError: The arguments do not fit together.
    """

    stem_stride = 1  # downsampling before the first level
    logit_gain = 1.0  # logits over what the last layer gives

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int] = (2, 2, 2, 2),
        num_res_units: int = 2,
        dropout: float = 0.1,
        norm: Literal["batch", "instance"] = "batch",
    ) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 1:
            raise InputError(f"channels must be two or more positive numbers, not {channels}")
        if len(strides) != len(channels) - 1 or min(strides) < 1:
            raise InputError(
                f"strides must be {len(channels) - 1} positive numbers, one fewer than channels, not {strides}"
            )
        if num_res_units < 0:
            raise InputError(f"num_res_units must not be negative, not {num_res_units}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), not {dropout}")
        if norm not in ("batch", "instance"):
            raise InputError(f"norm must be 'batch' or 'instance', not {norm!r}")
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "strides": list(strides),
            "num_res_units": num_res_units,
            "dropout": dropout,
            "norm": norm,
        }
        self.unet = self._build()
        self.expect(NODULE_PRIOR)

    def expect(self, nodule_share: float) -> None:
        """Makes an untrained network give each voxel this probability (Lin et al. 2017), by its last layer's bias.

        Where it is far from the true share, the first steps teach that alone, by gradients thousands of times as large
        as those of the nodules. AdamW divides by what it remembers of them, and nothing else is learnt for hundreds of
        steps.
        """
        last = [module for module in self.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)][-1]
        if last.bias is not None:
            nn.init.constant_(last.bias, math.log(nodule_share / (1 - nodule_share)) / self.logit_gain)

    def _build(self) -> nn.Module:
        """The layers, by ``arguments``."""
        raise NotImplementedError

    @property
    def _norm(self) -> tuple[str, dict[str, bool]]:
        """The norm as MONAI names it; instance norm learns scale and shift as batch norm does."""
        return self.arguments["norm"], {"affine": True}

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this, the product of all strides."""
        return self.stem_stride * math.prod(self.arguments["strides"])

    def depths(self, slices: int) -> list[int]:
        """Slices of the maps inside of the network, level by level, for an image of so many slices."""
        strides = [self.stem_stride, *self.arguments["strides"]]
        return [slices // math.prod(strides[: level + 1]) for level in range(len(strides))]

    def check_size(self, shape_zyx: Sequence[int]) -> None:
        """Raises ValueError unless the network takes arrays of this shape (z, y, x)."""
        if any(size % self.divisor for size in shape_zyx):
            nearest = [max(round(size / self.divisor), 1) * self.divisor for size in shape_zyx]
            raise InputError(
                f"every size must be a multiple of {self.divisor} (the product of the strides), not "
                f"{list(shape_zyx)}; the nearest that fits is {nearest}"
            )
        if self.arguments["norm"] == "instance" and max(shape_zyx) == self.divisor:
            raise InputError(f"instance norm needs some size above {self.divisor}, not {list(shape_zyx)}")


class SubpixelEnd(nn.Module):
    """Features to logits of twice the resolution: a convolution, and the logits of each block of voxels as channels.

    Nothing that normalises, rectifies or drops stands between the last features and the logits (Shi et al. 2016).

    Args:
        features: Features that come in.
        hidden: Features of the convolution.
        out_channels: Channels of the logits.
        stride: Edge of a block.
    """

    def __init__(self, features: int, hidden: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.hidden = Convolution(3, features, hidden, act=("PRELU", {"init": START_SLOPE}), norm="BATCH")
        self.head = nn.Conv3d(hidden, out_channels * stride**3, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, out_channels, s Z, s Y, s X) of features (B, features, Z, Y, X), with s the stride."""
        return pixelshuffle(self.head(self.hidden(features)), spatial_dims=3, scale_factor=self.stride)


class LungNodule3DUNet(SegmentationNetwork):
    """3-D U-Net with residual units, batch norm and PReLU (MONAI's ``UNet``; Kerfoot et al. 2019).

    MONAI's own last layers have one channel at full resolution, with a batch norm, PReLU and dropout of its own. A
    ``SubpixelEnd`` takes their place. It starts so that it learns fast at the small rates that AdamW is stable with:

    - Weights before a norm begin at a quarter of their usual size. The norm takes their size out again, so the network
      computes the same, but each step turns them by four times the angle (van Laarhoven 2017).
    - The last layer's weights begin at a quarter, too, and its output counts four times.
    - PReLU begins almost as a ReLU. MONAI's slope of 0.25 makes an untrained network nearly linear.

    Takes the arguments of ``SegmentationNetwork``.
    """

    logit_gain = LOGIT_GAIN

    def _build(self) -> nn.Module:
        if self.arguments["norm"] != "batch":
            # Its last layers have one channel: a norm within the sample would fix mean and spread of the logits.
            raise InputError(
                "this network must have batch norm; use SubpixelUNet (--network subpixel) for instance norm"
            )
        given = self.arguments
        unet = UNet(spatial_dims=3, act=("PRELU", {"init": START_SLOPE}), **given | {"norm": self._norm})
        finest, below = given["channels"][0], given["channels"][1]  # without a level between, the lowest one comes up
        features = finest + (below if len(given["channels"]) == 2 else finest)
        down, skip, _ = unet.model.children()
        end = SubpixelEnd(features, finest, given["out_channels"], given["strides"][0])
        unet.model = nn.Sequential(down, skip, end)
        for name, module in unet.named_modules():
            if name.endswith("adn") and hasattr(module, "N"):
                for weights in unet.get_submodule(name.removesuffix("adn") + "conv").parameters():
                    weights.data *= START_SHARE
        end.head.weight.data /= LOGIT_GAIN
        return unet

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X)."""
        self.check_size(image.shape[2:])
        return self.logit_gain * self.unet(image)


class SubpixelUNet(SegmentationNetwork):
    """nnU-Net's network at half resolution, with a sub-pixel output (MONAI's ``DynUNet``; Isensee et al. 2021).

    Its first convolution halves the resolution, as ``LungNodule3DUNet``'s does. On the way back that network passes
    through a single channel at full resolution, whose batch norm holds its logits back; this one computes the logits of
    a block of 2 x 2 x 2 voxels as channels and lays them out (Shi et al. 2016). It learns in a fraction of the steps.

    Takes the arguments of ``SegmentationNetwork``, of which ``channels`` must be three or more, ``strides`` 1 or 2, and
    ``num_res_units`` 2 (a residual block of two convolutions a level) or 0 (a plain one).
    """

    stem_stride = 2

    def _build(self) -> nn.Module:
        given = self.arguments
        if len(given["channels"]) < 3 or max(given["strides"]) > 2:
            raise InputError(
                "this network must have three or more channels and strides of 1 or 2, not "
                f"{given['channels']} and {given['strides']}"
            )
        if given["num_res_units"] not in (0, 2):
            raise InputError(f"num_res_units of this network must be 0 or 2, not {given['num_res_units']}")
        unet = DynUNet(
            spatial_dims=3,
            in_channels=given["in_channels"],
            out_channels=given["out_channels"] * self.stem_stride**3,
            kernel_size=[3] * len(given["channels"]),
            strides=[self.stem_stride, *given["strides"]],
            upsample_kernel_size=given["strides"],
            filters=given["channels"],
            dropout=given["dropout"] or None,
            norm_name=self._norm,
            res_block=given["num_res_units"] > 0,
        )
        # Its last layer drops logits, too: each becomes a probability of 0.5, and those were the hardest voxels.
        unet.output_block.conv.add_module("adn", nn.Identity())
        return unet

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X)."""
        self.check_size(image.shape[2:])
        return pixelshuffle(self.unet(image), spatial_dims=3, scale_factor=self.stem_stride)


# Constructors by name; each takes the arguments of SegmentationNetwork.
NETWORKS: dict[str, Callable[..., SegmentationNetwork]] = {
    "unet": LungNodule3DUNet,
    "subpixel": SubpixelUNet,
    "subpixel_instance": partial(SubpixelUNet, norm="instance"),
}


class DiceBCELoss(nn.Module):
    """Weighted sum of soft Dice loss and binary cross-entropy.

    Dice = (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), summed in float32 over the whole batch (Milletari et al.
    2016; batch-wise, so that scans without nodules count through the false positives in them). A batch without a single
    nodule voxel has no Dice to speak of: its Dice term would be 1 whatever is predicted, so the cross-entropy takes the
    weight of both.

    Summed like this, a nodule of 30 mm outweighs a thousand of 3 mm, and a false spot of a few voxels costs next to
    nothing. ``per_sample``, which ``LossSettings`` turns on, makes all samples with a nodule equal; ``hardest_share``
    makes wrong voxels count, however few they are (Wu et al. 2016, arXiv:1605.06885).

    Args:
        dice_weight: Weight of the Dice term.
        bce_weight: Weight of the cross-entropy, a mean over voxels.
        smooth: Keeps the fraction finite.
        per_sample: Take the Dice of each sample, and the mean over those with a nodule, not the Dice of the batch.
        hardest_share: Share of each sample's voxels, those with the largest cross-entropy, that it is averaged over.
        gather: Takes this process's sums (n, B) of its samples to those of all processes (n, all samples), so that all
            get the loss of the whole batch; None where one process has all of it.

    Raises:
        ValueError: A weight is negative, both are 0, ``smooth`` is not positive, or the share is not in (0, 1].
    """

    def __init__(
        self,
        dice_weight: float = 0.5,
        bce_weight: float = 0.5,
        smooth: float = 1e-6,
        per_sample: bool = False,
        hardest_share: float = 1.0,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if min(dice_weight, bce_weight) < 0 or dice_weight + bce_weight == 0:
            raise InputError(f"dice_weight and bce_weight must be >= 0 and not both 0, not {dice_weight}, {bce_weight}")
        if smooth <= 0:
            raise InputError(f"smooth must be positive, not {smooth}")
        if not 0 < hardest_share <= 1:
            raise InputError(f"hardest_share must be above 0 and at most 1, not {hardest_share}")
        self.dice_weight, self.bce_weight, self.smooth = dice_weight, bce_weight, smooth
        self.per_sample, self.hardest_share, self.gather = per_sample, hardest_share, gather

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar float32 loss of logits and a target of the same shape (B, 1, Z, Y, X) of 0, 1 and IGNORED.

        A voxel that is IGNORED counts as background that the network is sure of, so that it teaches nothing.
        """
        if logits.shape != target.shape:
            raise InputError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have the same shape")
        ignored = (target == IGNORED).flatten(1)
        logits = logits.float().flatten(1).masked_fill(ignored, SURE_LOGIT)  # (B, voxels)
        target = target.float().flatten(1).masked_fill(ignored, 0)
        bce = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if self.hardest_share < 1:
            bce = bce.topk(math.ceil(self.hardest_share * bce.shape[1]), dim=1, sorted=False).values
        probability = torch.sigmoid(logits)
        figures = [(probability * target).sum(1), probability.sum(1), target.sum(1), bce.mean(1)]
        samples = torch.stack(figures)
        overlap, predicted, size, bce = samples if self.gather is None else self.gather(samples)  # (B,) each
        if not self.per_sample:
            overlap, predicted, size = (figure.sum(0, keepdim=True) for figure in (overlap, predicted, size))
        dice_loss = 1 - (2 * overlap + self.smooth) / (predicted + size + self.smooth)
        shows_nodule = size > 0
        dice_loss = (dice_loss * shows_nodule).sum() / shows_nodule.sum().clamp(min=1)
        mixed = self.dice_weight * dice_loss + self.bce_weight * bce.mean()
        return torch.where(shows_nodule.any(), mixed, (self.dice_weight + self.bce_weight) * bce.mean())


# Each takes the arguments of DiceBCELoss, and as a target 0, 1 and IGNORED.
LOSSES: dict[str, Callable[..., nn.Module]] = {"dice_bce": DiceBCELoss}


# ------------------------------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True)
class InferenceSettings:
    """How a network looks at a scan, and what stays in the mask. Training chooses them, and checkpoints carry them.

    Args:
        threshold: Probability from which a voxel counts as nodule.
        min_score: Score from which a nodule stays in the mask; training chooses it at this threshold.
        mirrors: Number of test-time transforms whose probabilities are averaged with those of the scan itself.
        window: Shape (z, y, x) of the sliding window; None takes each scan whole.
        grid_spacing: Voxel size (x, y, z) in mm by which size and shape of nodules are judged, the median of the
            training scans; None takes that of each scan, and lets nodules be as small as a voxel.

    Raises:
        InputError: A value is out of its range.
    """

    threshold: float = 0.5
    min_score: float = 0.0
    mirrors: int = 0
    window: Shape | None = None
    grid_spacing: Vector | None = None

    def __post_init__(self) -> None:
        check(0 < self.threshold < 1, f"threshold must be between 0 and 1, not {self.threshold}")
        check(0 <= self.min_score <= 1, f"min_score must be 0 to 1 or null, not {self.min_score}")
        for name in ("window", "grid_spacing"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))  # of a list, as checkpoints hold it

    def to_dict(self) -> dict[str, Any]:
        """Built-in types, for checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Checkpoint:
    """All that a resume, an inference or a validation needs of a training.

    Args:
        network: Name of the network in NETWORKS.
        arguments: Arguments of the network's constructor.
        weights: The network's state_dict.
        preprocessing: How the training scans were prepared, as ``Preprocessing.to_dict`` gives it.
        inference: How the network looks at a scan.
        training: Settings of the Trainer, by the names of their options.
        epoch: Epochs done.
        progress: What only a resume needs, as built-in types and tensors.
        learnt: {name: (lowest, highest)} of what the training scans were like, as ``utils.scanning_of`` names it.
        seen: The scans that it has learnt from, or that chose it; see ``utils.SeenScans``.
        about: What it was trained and measured on, for weights that are handed on; every result repeats it.
        sha256: Of the file that it was read from; empty where it was made in memory.
    """

    network: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    preprocessing: dict[str, Any]
    inference: InferenceSettings
    training: dict[str, Any]
    epoch: int
    progress: dict[str, Any]
    learnt: dict[str, tuple[float, float]] = field(default_factory=dict)
    seen: SeenScans = field(default_factory=dict)
    about: str = ""
    sha256: str = ""

    def build_network(self) -> SegmentationNetwork:
        """The network with its weights, in evaluation mode.

        Raises:
            InputError: There is no network of this name.
        """
        check(
            self.network in NETWORKS, f"the checkpoint has the network {self.network!r}, which NETWORKS does not know"
        )
        network = NETWORKS[self.network](**self.arguments)
        network.load_state_dict(self.weights)
        return network.eval()


PRETRAINED = "pretrained"  # stands for the weights that come with the project
PRETRAINED_PATH = Path(__file__).parent / "data" / "pretrained.pth"


def checkpoint_file(path: str | Path) -> Path:
    """The file that a path of a checkpoint means; 'pretrained' means the weights that come with the project."""
    return PRETRAINED_PATH if str(path) == PRETRAINED and not Path(path).exists() else Path(path)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes tensors and built-in types, which ``load_checkpoint`` takes back without unpickling anything else."""
    names = [part.name for part in fields(Checkpoint) if part.name != "sha256"]
    values = {name: getattr(checkpoint, name) for name in names}
    torch.save({"format": CHECKPOINT_FORMAT, **values, "inference": checkpoint.inference.to_dict()}, path)


def hand_on(checkpoint: Checkpoint, about: str, seen: SeenScans) -> Checkpoint:
    """A checkpoint to be handed on: its weights in half precision, and nothing that only a resume needs.

    Statistics of norms, biases and slopes stay in single precision: they are few, and some are very small.

    Args:
        checkpoint: Of a training.
        about: What it was trained and measured on.
        seen: The scans that it has seen, by the names that others know them by.
    """
    weights = {
        name: value.half() if value.is_floating_point() and value.ndim > 1 else value
        for name, value in checkpoint.weights.items()
    }
    return replace(checkpoint, weights=weights, progress={}, about=about, seen=seen)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint after checking that it is whole; runs no code that the file might hold.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file cannot be read, for want of permission for example.
        UserError: It does not fit into memory.
        InputError: The file is damaged, or is no checkpoint of this version.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a checkpoint in it, such as checkpoints/best_model.pth")
    if not path.is_file():
        remedy = "download it with the project" if path == PRETRAINED_PATH else "run python train.py first"
        raise FileNotFoundError(f"{path} does not exist; {remedy} or name another checkpoint")
    data = path.read_bytes()  # what the disk refuses is told apart from damage
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if damaged := archive.testzip():  # torch.load does not compare the checksums
                raise zipfile.BadZipFile(f"in {damaged}")
        values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise UserError(f"{path} does not fit into memory; end other programs or use another machine") from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if _is_out_of_memory(error):
            raise UserError(f"{path} does not fit into memory ({reason}); end other programs") from error
        raise InputError(f"{path} is damaged or no checkpoint ({reason}); use another one") from error
    version = values.pop("format", None) if isinstance(values, dict) else None
    check(
        version == CHECKPOINT_FORMAT,
        f"{path} is no checkpoint of this version of train.py (its format is {version}, not {CHECKPOINT_FORMAT}); "
        "train again or use the version that wrote it",
    )
    try:
        inference = InferenceSettings(**values.pop("inference"))
        return Checkpoint(**values, inference=inference, sha256=hashlib.sha256(data).hexdigest())
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} lacks what a checkpoint must hold ({error}); use another one") from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch means a lack of memory; on a CPU it raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def to_device(network: SegmentationNetwork, device: torch.device) -> SegmentationNetwork:
    """Moves a network to its device, channels last: by measurement the faster memory format everywhere.

    On CPUs oneDNN's 3-D convolutions of few channels are several times slower on contiguous arrays. On a GPU a step of
    the default network takes half the time: batch norm reads whole lines, and cuDNN need not turn its arrays around.
    """
    return network.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
