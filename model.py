"""The network, its loss and its checkpoints."""

from __future__ import annotations

import math
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn import functional

CHECKPOINT_FORMAT = 1
# What zipfile, zlib and the unpickler raise on a file with flipped or missing bytes.
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
)
NODULE_PRIOR = 0.05  # probability that an untrained network gives a voxel


class LungNodule3DUNet(nn.Module):
    """3-D U-Net with residual units, batch norm and PReLU (MONAI's ``UNet``; Kerfoot et al. 2019).

    Args:
        in_channels: Channels of the input, 1 for CT.
        out_channels: Channels of the output, 1 for nodule against background.
        channels: Features at each level, from fine to coarse.
        strides: Downsampling between the levels, one fewer than ``channels``.
        num_res_units: Convolutions in each residual unit; 0 for plain convolutions.
        dropout: Dropout probability.

    Raises:
        ValueError: The arguments do not fit together.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[int] = (2, 2, 2, 2),
        num_res_units: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 1:
            raise ValueError(f"channels must be two or more positive numbers, not {channels}")
        if len(strides) != len(channels) - 1 or min(strides) < 1:
            raise ValueError(
                f"strides must be {len(channels) - 1} positive numbers, one fewer than channels, not {strides}"
            )
        if num_res_units < 0:
            raise ValueError(f"num_res_units must not be negative, not {num_res_units}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {dropout}")
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "strides": list(strides),
            "num_res_units": num_res_units,
            "dropout": dropout,
        }
        self.unet = UNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=tuple(channels),
            strides=tuple(strides),
            num_res_units=num_res_units,
            act="PRELU",
            norm="BATCH",
            dropout=dropout,
        )
        # Nearly all voxels are background. Without this the first hundreds of steps only teach that (Lin et al. 2017).
        last = [module for module in self.unet.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)][-1]
        if last.bias is not None:
            nn.init.constant_(last.bias, math.log(NODULE_PRIOR / (1 - NODULE_PRIOR)))

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this, the product of the strides."""
        return math.prod(self.arguments["strides"])

    def check_size(self, shape_zyx: Sequence[int]) -> None:
        """Raises ValueError unless the network takes arrays of this shape (z, y, x)."""
        if any(size % self.divisor for size in shape_zyx):
            nearest = [max(round(size / self.divisor), 1) * self.divisor for size in shape_zyx]
            raise ValueError(
                f"every size must be a multiple of {self.divisor} (the product of the strides), not "
                f"{list(shape_zyx)}; the nearest that fits is {nearest}"
            )

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X)."""
        self.check_size(image.shape[2:])
        return self.unet(image)


class DiceBCELoss(nn.Module):
    """Weighted sum of soft Dice loss and binary cross-entropy.

    Dice = (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth), summed in float32 over the whole batch (Milletari et al.
    2016; batch-wise, so that scans without nodules count through the false positives in them). A batch without a single
    nodule voxel has no Dice to speak of: its Dice term would be 1 whatever is predicted, so the cross-entropy takes the
    weight of both.

    Args:
        dice_weight: Weight of the Dice term.
        bce_weight: Weight of the cross-entropy, a mean over voxels.
        smooth: Keeps the fraction finite.

    Raises:
        ValueError: A weight is negative, both are 0, or ``smooth`` is not positive.
    """

    def __init__(self, dice_weight: float = 0.5, bce_weight: float = 0.5, smooth: float = 1e-6) -> None:
        super().__init__()
        if min(dice_weight, bce_weight) < 0 or dice_weight + bce_weight == 0:
            raise ValueError(f"dice_weight and bce_weight must be >= 0 and not both 0, not {dice_weight}, {bce_weight}")
        if smooth <= 0:
            raise ValueError(f"smooth must be positive, not {smooth}")
        self.dice_weight, self.bce_weight, self.smooth = dice_weight, bce_weight, smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar float32 loss of logits and a 0/1 target of the same shape (B, 1, Z, Y, X)."""
        if logits.shape != target.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have the same shape")
        logits, target = logits.float(), target.float()
        probability = torch.sigmoid(logits)
        overlap, size = (probability * target).sum(), target.sum()
        dice_loss = 1 - (2 * overlap + self.smooth) / (probability.sum() + size + self.smooth)
        bce = functional.binary_cross_entropy_with_logits(logits, target)
        mixed = self.dice_weight * dice_loss + self.bce_weight * bce
        return torch.where(size > 0, mixed, (self.dice_weight + self.bce_weight) * bce)


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Writes tensors and built-in types, which ``load_checkpoint`` takes back without unpickling anything else."""
    torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, path)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint after checking that it is whole; runs no code that the file might hold.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or is no checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run python train.py first or name another checkpoint_path")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not compare the checksums
                raise zipfile.BadZipFile(f"in {damaged}")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}); use another one") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of train.py; train again or use that version")
    return checkpoint


def build_network(checkpoint: dict[str, Any]) -> LungNodule3DUNet:
    """The network of a checkpoint, with its weights, in evaluation mode."""
    network = LungNodule3DUNet(**checkpoint["network"])
    network.load_state_dict(checkpoint["weights"])
    return network.eval()
