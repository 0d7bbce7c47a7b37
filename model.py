"""The network, its loss and its checkpoints."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from monai.losses.focal_loss import sigmoid_focal_loss
from monai.networks import nets
from monai.networks.blocks.convolutions import Convolution
from monai.networks.nets.vnet import DownTransition, InputTransition, UpTransition
from monai.networks.utils import pixelshuffle
from torch import Tensor, nn
from torch.nn import functional

from data.rescoring import LearntScore
from utils import IGNORED, InputError, SeenScans, Shape, UserError, Vector, check

CHECKPOINT_FORMAT = 9  # raised whenever older checkpoints can no longer be read
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
MEAN_EPS = 1e-7  # keeps the logit of a mean probability finite
FOCAL_GAMMA = 2.0
TVERSKY_FALSE, TVERSKY_MISSED = 0.3, 0.7  # what a false and a missed voxel cost
BOUNDARY_REACH = 10  # voxels
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)  # of nnU-Net's residual encoder, level by level
VNET_ACTIVATION = ("elu", {"inplace": True})


class SegmentationNetwork(nn.Module):
    """Base class of the networks: checks arguments and sizes of images, and keeps the arguments for checkpoints.

    Args:
        in_channels: Channels of the input, 1 for CT.
        out_channels: Channels of the output, 1 for nodule against background.
        channels: Features at each level, from fine to coarse.
        strides: Downsampling between the levels, one fewer than ``channels``.
        num_res_units: Convolutions in each residual unit; 0 for plain convolutions. Networks whose blocks are fixed
            take 2, the default, alone.
        dropout: Dropout probability.
        norm: 'batch', or, where the network has it, 'instance' or 'group', which do not depend on the other samples of
            a batch.

    Raises:
        ValueError: The arguments do not fit together.
    """

    norms: tuple[str, ...] = ("batch",)  # that the network may have
    has_own_blocks = False  # so that num_res_units means nothing
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
        norm: Literal["batch", "instance", "group"] = "batch",
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
        if self.has_own_blocks and num_res_units != 2:
            raise InputError(f"the blocks of this network are fixed: leave num_res_units at 2, not {num_res_units}")
        if norm not in self.norms:
            raise InputError(f"norm of this network must be {' or '.join(map(repr, self.norms))}, not {norm!r}")
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "strides": list(strides),
            "num_res_units": num_res_units,
            "dropout": dropout,
            "norm": norm,
        }
        self.unet: Any = self._build()
        self.expect(NODULE_PRIOR)

    def expect(self, nodule_share: float) -> None:
        """Makes an untrained network give each voxel this probability (Lin et al. 2017), by its last layer's bias.

        Where it is far from the true share, the first steps teach that alone, by gradients thousands of times as large
        as those of the nodules. AdamW divides by what it remembers of them, and nothing else is learnt for hundreds of
        steps.
        """
        for head in self.heads:
            if head.bias is not None:
                nn.init.constant_(head.bias, math.log(nodule_share / (1 - nodule_share)) / self.logit_gain)

    @property
    def heads(self) -> Sequence[nn.Conv3d | nn.ConvTranspose3d]:
        """The layers that give logits."""
        return [module for module in self.modules() if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)][-1:]

    def _build(self) -> nn.Module:
        """The layers, by ``arguments``."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X)."""
        self.check_size(image.shape[2:])
        return self.unet(image)

    def _check_levels(self, fewest: int, doubling: bool = False, strides: tuple[int, ...] = (1, 2)) -> None:
        """Raises InputError unless this network can have the levels, which ``channels`` and ``strides`` describe."""
        channels = self.arguments["channels"]
        doubles = all(below == 2 * above for above, below in itertools.pairwise(channels))
        if len(channels) < fewest or (doubling and not doubles):
            rule = ", each twice the one before" if doubling else ""
            raise InputError(f"this network must have {fewest} or more channels{rule}, not {channels}")
        if not set(self.arguments["strides"]) <= set(strides):
            raise InputError(
                f"strides of this network must be {' or '.join(map(str, strides))}, not {self.arguments['strides']}"
            )

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
        given = self.arguments
        unet = nets.UNet(spatial_dims=3, act=("PRELU", {"init": START_SLOPE}), **given | {"norm": self._norm()})
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
        return self.logit_gain * super().forward(image)


class SubpixelUNet(SegmentationNetwork):
    """nnU-Net's network at half resolution, with a sub-pixel output (MONAI's ``DynUNet``; Isensee et al. 2021).

    Its first convolution halves the resolution, as ``LungNodule3DUNet``'s does. It computes the logits of a block of
    2 x 2 x 2 voxels as channels and lays them out (Shi et al. 2016).

    Takes the arguments of ``SegmentationNetwork``, of which ``channels`` must be three or more, ``strides`` 1 or 2, and
    ``num_res_units`` 2 (a residual block of two convolutions a level) or 0 (a plain one).
    """

    norms = ("batch", "instance")
    stem_stride = 2

    def _build(self) -> nn.Module:
        given = self.arguments
        self._check_levels(fewest=3)
        if given["num_res_units"] not in (0, 2):
            raise InputError(f"num_res_units of this network must be 0 or 2, not {given['num_res_units']}")
        unet = nets.DynUNet(
            spatial_dims=3,
            in_channels=given["in_channels"],
            out_channels=given["out_channels"] * self.stem_stride**3,
            kernel_size=[3] * len(given["channels"]),
            strides=[self.stem_stride, *given["strides"]],
            upsample_kernel_size=given["strides"],
            filters=given["channels"],
            dropout=given["dropout"] or None,
            norm_name=self._norm(),
            res_block=given["num_res_units"] > 0,
        )
        # Its last layer drops logits, too: each becomes a probability of 0.5, and those were the hardest voxels.
        unet.output_block.conv.add_module("adn", nn.Identity())
        return unet

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X)."""
        return pixelshuffle(super().forward(image), spatial_dims=3, scale_factor=self.stem_stride)


class NNUNet(SegmentationNetwork):
    """nnU-Net's plain network with deep supervision (MONAI's ``DynUNet``; Isensee et al. 2021).

    In training it gives logits of every level but the lowest, for ``deeply_supervised``. Unlike in nnU-Net, the lowest
    of these counts as well.

    Takes the arguments of ``SegmentationNetwork``, of which ``channels`` must be three or more.
    """

    norms = ("batch", "instance")
    has_own_blocks = True

    def _build(self) -> nn.Module:
        given = self.arguments
        self._check_levels(fewest=3, strides=(1, 2, 3, 4))
        unet = nets.DynUNet(
            spatial_dims=3,
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            kernel_size=[3] * len(given["channels"]),
            strides=[1, *given["strides"]],
            upsample_kernel_size=given["strides"],
            filters=given["channels"],
            dropout=given["dropout"] or None,
            norm_name=self._norm(),
            deep_supervision=True,
            deep_supr_num=len(given["channels"]) - 2,
        )
        for block in (unet.output_block, *unet.deep_supervision_heads.children()):
            block.conv.add_module("adn", nn.Identity())  # which drops logits
        return unet

    @property
    def heads(self) -> Sequence[nn.Conv3d | nn.ConvTranspose3d]:
        """The layers that give logits, of the finest level first."""
        return [block.conv.conv for block in (self.unet.output_block, *self.unet.deep_supervision_heads)]

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X).

        In training (B, levels out_channels, Z, Y, X), the finest level first, the others with their values repeated.
        """
        logits = super().forward(image)
        return logits.flatten(1, 2) if self.training else logits


class ResidualEncoderUNet(SegmentationNetwork):
    """nnU-Net's network with a residual encoder and deep supervision (Isensee et al. 2024).

    It needs the package ``dynamic-network-architectures``. In training it gives logits of every level, as ``NNUNet``.

    Takes the arguments of ``SegmentationNetwork``.
    """

    norms = ("batch", "instance")
    has_own_blocks = True

    def _build(self) -> nn.Module:
        try:
            from dynamic_network_architectures.architectures import unet as architectures
        except ImportError as error:
            raise UserError("nnunet_residual needs: pip install --no-deps dynamic-network-architectures") from error
        given = self.arguments
        levels = len(given["channels"])
        return architectures.ResidualEncoderUNet(
            input_channels=given["in_channels"],
            n_stages=levels,
            features_per_stage=given["channels"],
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=[1, *given["strides"]],
            n_blocks_per_stage=[*RESIDUAL_BLOCKS, *[RESIDUAL_BLOCKS[-1]] * levels][:levels],
            num_classes=given["out_channels"],
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=nn.BatchNorm3d if given["norm"] == "batch" else nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            dropout_op=nn.Dropout3d,  # also of 0: the names of the weights count the layers
            dropout_op_kwargs={"p": given["dropout"]},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        )

    @property
    def heads(self) -> Sequence[nn.Conv3d | nn.ConvTranspose3d]:
        """The layers that give logits, of the finest level first."""
        return list(self.unet.decoder.seg_layers)[::-1]

    def train(self, mode: bool = True) -> ResidualEncoderUNet:
        """Sets the mode, as any module does; in evaluation there are no logits of lower levels."""
        self.unet.decoder.deep_supervision = mode
        return super().train(mode)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X).

        In training (B, levels out_channels, Z, Y, X), the finest level first, the others with their values repeated.
        """
        if self.unet.decoder.deep_supervision != self.training:  # where only the flags of the modules were set
            self.unet.decoder.deep_supervision = self.training
        logits = super().forward(image)
        if not self.training:
            return logits
        return torch.cat([functional.interpolate(level, image.shape[2:]) for level in logits], dim=1)


class VNet(SegmentationNetwork):
    """V-Net (Milletari et al. 2016), of MONAI's blocks, with a plain convolution at the end.

    MONAI's own end passes through a single channel with a norm, which holds the logits back.

    Takes the arguments of ``SegmentationNetwork``, of which each of ``channels`` must be twice the one before, and all
    strides 2.
    """

    has_own_blocks = True

    def _build(self) -> nn.Module:
        self._check_levels(fewest=2, doubling=True, strides=(2,))
        return VNetLayers(
            **{name: self.arguments[name] for name in ("in_channels", "out_channels", "channels", "dropout")}
        )


class VNetLayers(nn.Module):
    """The layers of ``VNet``, whose arguments it takes; they are those of MONAI's ``VNet`` but for the last ones."""

    def __init__(self, in_channels: int, out_channels: int, channels: Sequence[int], dropout: float) -> None:
        super().__init__()
        finest, *lower = channels
        if finest % in_channels:
            raise InputError(f"the first of channels must be a multiple of in_channels ({in_channels}), not {finest}")
        drops = [dropout if level >= len(lower) - 2 else None for level in range(len(lower))]  # in the lowest two
        counts = [min(level + 1, 3) if level < len(lower) - 1 else 2 for level in range(len(lower))]
        self.first = InputTransition(3, in_channels, finest, VNET_ACTIVATION)
        self.down = nn.ModuleList(
            DownTransition(3, features // 2, count, VNET_ACTIVATION, drop)
            for features, count, drop in zip(lower, counts, drops, strict=True)
        )
        self.up = nn.ModuleList()
        below = channels[-1]
        for level in reversed(range(len(lower))):
            features = 2 * channels[level]
            self.up.append(
                UpTransition(3, below, features, 2 if level >= 2 else 1, VNET_ACTIVATION, (drops[level], dropout))
            )
            below = features
        self.last = nn.Conv3d(below, out_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, out_channels, Z, Y, X) of images (B, in_channels, Z, Y, X)."""
        levels = [self.first(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        features = levels.pop()
        for up in self.up:
            features = up(features, levels.pop())
        return self.last(features)


class AttentionUNet(SegmentationNetwork):
    """U-Net whose skip connections pass through attention gates (MONAI's ``AttentionUnet``; Oktay et al. 2018).

    Takes the arguments of ``SegmentationNetwork``.
    """

    has_own_blocks = True

    def _build(self) -> nn.Module:
        names = ("in_channels", "out_channels", "channels", "strides", "dropout")
        self._check_levels(fewest=2, strides=(1, 2))
        return nets.AttentionUnet(spatial_dims=3, **{name: self.arguments[name] for name in names})


class SegResNet(SegmentationNetwork):
    """Residual encoder and a small decoder (MONAI's ``SegResNet``; Myronenko 2018, without its autoencoder).

    Takes the arguments of ``SegmentationNetwork``, of which each of ``channels`` must be twice the one before, and all
    strides 2.
    """

    norms = ("batch", "instance", "group")
    has_own_blocks = True

    def _build(self) -> nn.Module:
        self._check_levels(fewest=2, doubling=True, strides=(2,))
        given = self.arguments
        levels, finest = len(given["channels"]), given["channels"][0]
        is_group = given["norm"] == "group"
        return nets.SegResNet(
            spatial_dims=3,
            init_filters=finest,
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            dropout_prob=given["dropout"] or None,
            norm=("group", {"num_groups": math.gcd(8, finest)}) if is_group else self._norm(),
            blocks_down=(1, *[2] * (levels - 2), 4),
            blocks_up=(1,) * (levels - 1),
        )


# Constructors by name; each takes the arguments of SegmentationNetwork.
NETWORKS: dict[str, Callable[..., SegmentationNetwork]] = {
    "unet": LungNodule3DUNet,
    "subpixel": SubpixelUNet,
    "subpixel_instance": partial(SubpixelUNet, norm="instance"),
    "nnunet": partial(NNUNet, norm="instance"),
    "nnunet_residual": partial(ResidualEncoderUNet, norm="instance"),
    "vnet": VNet,
    "attention_unet": AttentionUNet,
    "segresnet": partial(SegResNet, norm="group"),
}


@dataclass(frozen=True)
class Zoom:
    """The image on a finer grid, or on a coarser one, each voxel of which is the mean of what it covers.

    Args:
        factor: Voxels of the grid along the axes (z, y, x), over those of the image; one number for all three.
        shape_zyx: Shape of the image without the air that it was padded with at its end.
        divisor: The network takes sizes that are multiples of it; two at least, since some norms need more than one.
    """

    factor: float | Sequence[float]
    shape_zyx: tuple[int, ...]
    divisor: int

    @property
    def grid_zyx(self) -> list[int]:
        """Shape of the grid."""
        factors = self.factor if isinstance(self.factor, Sequence) else [self.factor] * 3
        return [max(1, round(size * factor)) for size, factor in zip(self.shape_zyx, factors, strict=True)]

    def apply(self, image: Tensor) -> Tensor:
        """The image that the network looks at, padded with air."""
        (z, y, x), grid = self.shape_zyx, self.grid_zyx
        samples = [max(1, math.ceil(size / wanted - 1e-3)) for size, wanted in zip((z, y, x), grid, strict=True)]
        fine = [size * count for size, count in zip(grid, samples, strict=True)]
        zoomed = functional.interpolate(image[..., :z, :y, :x], fine, mode="trilinear")
        zoomed = functional.avg_pool3d(zoomed, samples)
        least = 2 * self.divisor if self.divisor > 1 else 1
        return padded(zoomed, [max(least, size + -size % self.divisor) for size in grid])

    def undo(self, logits: Tensor) -> Tensor:
        """The logits, as they lie on the image."""
        z, y, x = self.grid_zyx
        return functional.interpolate(logits[..., :z, :y, :x], self.shape_zyx, mode="trilinear")


def padded(image: Tensor, shape_zyx: Sequence[int]) -> Tensor:
    """An image (B, C, Z, Y, X) with air at its end, up to a shape."""
    missing = [size - there for size, there in zip(shape_zyx, image.shape[2:], strict=True)]
    return functional.pad(image, [n for size in reversed(missing) for n in (0, size)])


ENSEMBLE = "ensemble"


class Ensemble(SegmentationNetwork):
    """Several trained networks, whose probabilities are averaged; they look one after the other.

    Args:
        members: For each ``network``, its name in NETWORKS, its ``arguments``, and where its voxels are larger than
            those of the ensemble, ``scale``, by which (z, y, x) the image is shrunk for it.
    """

    def __init__(self, members: Sequence[Mapping[str, Any]]) -> None:
        nn.Module.__init__(self)
        self.arguments = {"members": [dict(member) for member in members]}
        self.members = nn.ModuleList(NETWORKS[member["network"]](**member["arguments"]) for member in members)

    @property
    def divisor(self) -> int:
        """Every spatial size must be a multiple of this, which suits all networks."""
        return math.lcm(*(member.divisor for member in self.members))  # type: ignore[arg-type]

    def check_size(self, shape_zyx: Sequence[int]) -> None:
        """Raises ValueError unless all networks take arrays of this shape (z, y, x)."""
        for member, given in self._pairs():
            if "scale" not in given:  # else it is padded
                member.check_size(shape_zyx)  # type: ignore[operator]

    def forward(self, image: Tensor) -> Tensor:
        """Float32 logits (B, out_channels, Z, Y, X) of the mean probability of images (B, in_channels, Z, Y, X)."""
        looks = [self._look(member, image, given.get("scale")) for member, given in self._pairs()]
        return torch.logit(torch.stack([torch.sigmoid(look) for look in looks]).mean(dim=0), eps=MEAN_EPS)

    def _pairs(self) -> Iterator[tuple[nn.Module, Mapping[str, Any]]]:
        return zip(self.members, self.arguments["members"], strict=True)

    @staticmethod
    def _look(member: nn.Module, image: Tensor, scale: Sequence[float] | None) -> Tensor:
        """Float32 logits of a member, on the grid of the image."""
        if scale is None:
            return member(image).float()
        zoom = Zoom(scale, tuple(image.shape[2:]), member.divisor)  # type: ignore[arg-type]
        return zoom.undo(member(zoom.apply(image)).float())


def check_weights(dice_weight: float, bce_weight: float) -> None:
    """Raises InputError unless these can be the weights of a loss."""
    if min(dice_weight, bce_weight) < 0 or dice_weight + bce_weight == 0:
        raise InputError(f"dice_weight and bce_weight must be >= 0 and not both 0, not {dice_weight}, {bce_weight}")


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
        check_weights(dice_weight, bce_weight)
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
        errors = self._errors(logits, target)
        if self.hardest_share < 1:
            errors = errors.topk(math.ceil(self.hardest_share * errors.shape[1]), dim=1, sorted=False).values
        probability = torch.sigmoid(logits)
        figures = [(probability * target).sum(1), probability.sum(1), target.sum(1), errors.mean(1)]
        samples = torch.stack(figures)
        overlap, predicted, size, error = samples if self.gather is None else self.gather(samples)  # (B,) each
        if not self.per_sample:
            overlap, predicted, size = (figure.sum(0, keepdim=True) for figure in (overlap, predicted, size))
        missed = self._missed(overlap, predicted, size)
        shows_nodule = size > 0
        missed = (missed * shows_nodule).sum() / shows_nodule.sum().clamp(min=1)
        mixed = self.dice_weight * missed + self.bce_weight * error.mean()
        return torch.where(shows_nodule.any(), mixed, (self.dice_weight + self.bce_weight) * error.mean())

    def _errors(self, logits: Tensor, target: Tensor) -> Tensor:
        """What each voxel costs, of the shape of logits and target."""
        return functional.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def _missed(self, overlap: Tensor, predicted: Tensor, size: Tensor) -> Tensor:
        """What regions cost whose common, predicted and true volumes are these, in voxels."""
        return 1 - (2 * overlap + self.smooth) / (predicted + size + self.smooth)


class DiceFocalLoss(DiceBCELoss):
    """``DiceBCELoss`` with MONAI's focal loss (Lin et al. 2017) in the place of the cross-entropy.

    It is the cross-entropy times (1 - p)^2, with p the probability of the truth, so that voxels that are nearly right
    cost next to nothing. ``bce_weight`` is its weight.
    """

    def _errors(self, logits: Tensor, target: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, target, gamma=FOCAL_GAMMA)


class FocalLoss(DiceFocalLoss):
    """The focal loss alone; it has the weight of both terms."""

    def __init__(self, dice_weight: float = 0.5, bce_weight: float = 0.5, **arguments: Any) -> None:
        check_weights(dice_weight, bce_weight)
        super().__init__(0.0, dice_weight + bce_weight, **arguments)


class TverskyLoss(DiceBCELoss):
    """``DiceBCELoss`` with the Tversky index in the place of Dice (Salehi et al. 2017).

    It is sum(p t) / (sum(p t) + 0.3 false positives + 0.7 false negatives), so that missed voxels cost more than false
    ones; with 0.5 and 0.5 it would be Dice. ``dice_weight`` is its weight.
    """

    def _missed(self, overlap: Tensor, predicted: Tensor, size: Tensor) -> Tensor:
        wrong = TVERSKY_FALSE * (predicted - overlap) + TVERSKY_MISSED * (size - overlap)
        return 1 - (overlap + self.smooth) / (overlap + wrong + self.smooth)


class BoundaryLoss(DiceBCELoss):
    """``DiceBCELoss``, of which a boundary loss takes over more and more (Kervadec et al. 2019).

    That is the mean over voxels of the probability times the distance to the true boundary, in voxels, negative inside.
    Distances are cut off at BOUNDARY_REACH and divided by it; without a nodule all are 1. Its share is epoch /
    num_epochs, so that the first epoch learns by ``DiceBCELoss`` alone. The share starts at 0 and stays there unless
    ``begin_epoch`` is called.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.share: Tensor
        self.register_buffer("share", torch.zeros(()), persistent=False)  # a tensor, so that recorded steps read it

    def begin_epoch(self, epoch: int, num_epochs: int) -> None:
        """Sets the share of the boundary loss; ``epoch`` counts from 0."""
        self.share.fill_(epoch / num_epochs)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Scalar float32 loss, as that of ``DiceBCELoss``; it may be negative."""
        region = super().forward(logits, target)
        probability = torch.sigmoid(logits.float()).masked_fill(target == IGNORED, 0)
        sample = (probability * boundary_distance(target == 1)).flatten(1).mean(1)[None]
        boundary = (sample if self.gather is None else self.gather(sample)).mean()
        return (1 - self.share) * region + self.share * boundary


def boundary_distance(mask: Tensor) -> Tensor:
    """Distance of each voxel to the boundary of a mask (B, 1, Z, Y, X), negative inside, from -1 to 1.

    It is the exact Euclidean distance between voxel centres, less half a voxel, cut off at BOUNDARY_REACH voxels, over
    BOUNDARY_REACH. It is computed along one axis after the other (Saito & Toriwaki 1994), on the device.
    """
    with torch.no_grad():
        outside, inside = (_squared_distance(part).sqrt() - 0.5 for part in (mask, ~mask))
        return torch.where(mask, -inside, outside).clamp(-BOUNDARY_REACH, BOUNDARY_REACH) / BOUNDARY_REACH


def _squared_distance(mask: Tensor) -> Tensor:
    """Squared distance in voxels from each voxel to the nearest one of a mask, right up to BOUNDARY_REACH."""
    squared = torch.where(mask, 0.0, 4.0 * BOUNDARY_REACH**2)
    for axis in range(-3, 0):
        size, nearest = squared.shape[axis], squared.clone()
        for step in range(1, min(BOUNDARY_REACH + 1, size)):
            for ours, theirs in ((0, step), (step, 0)):
                part = nearest.narrow(axis, ours, size - step)
                torch.minimum(part, squared.narrow(axis, theirs, size - step) + step**2, out=part)
        squared = nearest
    return squared


def deeply_supervised(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """The loss of logits (B, levels, Z, Y, X) of one or more levels: each level counts half of the one before it."""
    weights = [0.5**level for level in range(logits.shape[1])]
    losses = [loss(level, target) * weight for level, weight in zip(logits.split(1, dim=1), weights, strict=True)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum() / sum(weights)


# Each takes the arguments of DiceBCELoss, and as a target 0, 1 and IGNORED. One with a method begin_epoch(epoch,
# num_epochs) is told of each epoch before it begins.
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "dice_bce": DiceBCELoss,
    "dice_focal": DiceFocalLoss,
    "focal": FocalLoss,
    "tversky": TverskyLoss,
    "boundary": BoundaryLoss,
}


# ------------------------------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True)
class Cleaning:
    """What is done to the mask besides the threshold; by default nothing. A map that is mostly noise is left as it is.

    Args:
        crf: Let probabilities follow the edges of the image before the threshold, by a conditional random field.
        opening_mm: Radius of a ball, 0 to 20; the parts of a nodule that it cannot enter are taken off. Less than a
            voxel does nothing.
        closing_mm: Radius of a ball, 0 to 20; the gaps and dents of a nodule that it cannot enter are filled. Less than
            a voxel does nothing.
        smallest_mm: Diameter of the sphere of equal volume; a smaller nodule is left out. One below 2 mm always is.
        in_lungs: Leave out nodules that lie mostly in air or outside the lungs; preprocessing must have masked these.

    Raises:
        InputError: A length is negative or too large.
    """

    crf: bool = False
    opening_mm: float = 0.0
    closing_mm: float = 0.0
    smallest_mm: float = 0.0
    in_lungs: bool = False

    def __post_init__(self) -> None:
        for name, most in (("opening_mm", 20), ("closing_mm", 20), ("smallest_mm", 100)):
            value = getattr(self, name)
            check(0 <= value <= most, f"cleaning.{name} must be 0 to {most}, not {value}")

    def __str__(self) -> str:
        texts = {
            "crf": "conditional random field",
            "opening_mm": f"opening by {self.opening_mm:g} mm",
            "closing_mm": f"closing by {self.closing_mm:g} mm",
            "smallest_mm": f"nodules of {self.smallest_mm:g} mm and more",
            "in_lungs": "nodules in the lungs",
        }
        return ", ".join(text for name, text in texts.items() if getattr(self, name)) or "none"


EXTRAS = {  # of InferenceSettings; results note them only where they do something
    "cleaning": "cleaning of the mask",
    "scales": "magnification of further looks",
    "everywhere": "place of further looks",
    "learnt_score": "score of nodules",
}


@dataclass(frozen=True)
class InferenceSettings:
    """How a network looks at a scan, and what stays in the mask. Training chooses them, and checkpoints carry them.

    Args:
        threshold: Probability from which a voxel counts as nodule.
        min_score: Score from which a nodule stays in the mask; training chooses it at this threshold.
        mirrors: Number of test-time transforms whose probabilities are averaged with those of the scan itself.
        window: Shape (z, y, x) of the patches that the network was trained on, and of its windows; None takes each scan
            whole.
        grid_spacing: Voxel size (x, y, z) in mm by which size and shape of nodules are judged, the median of the
            training scans; None takes that of each scan, and lets nodules be as small as a voxel.
        cleaning: What is done to the mask besides the threshold.
        scales: Factors by which the scan is magnified for further looks, whose probabilities are averaged, too.
        everywhere: Whether a network trained on patches looks again in each of its windows, instead of in one around
            each spot that may be a nodule.
        learnt_score: What the score of a nodule is computed by; None takes ``Features.score``.
        first_window: Largest shape (z, y, x) of the windows of the first look, which are no smaller than ``window``: in
            wide ones, fewer voxels lie at an edge. None takes ``window``.

    Raises:
        InputError: A value is out of its range.
    """

    threshold: float = 0.5
    min_score: float = 0.0
    mirrors: int = 0
    window: Shape | None = None
    grid_spacing: Vector | None = None
    cleaning: Cleaning = Cleaning()
    scales: tuple[float, ...] = ()
    everywhere: bool = False
    learnt_score: LearntScore | None = None
    first_window: Shape | None = None

    def __post_init__(self) -> None:
        check(0 < self.threshold < 1, f"threshold must be between 0 and 1, not {self.threshold}")
        check(0 <= self.min_score <= 1, f"min_score must be 0 to 1 or null, not {self.min_score}")
        for scale in self.scales:
            check(0.5 <= scale <= 2 and scale != 1, f"scales must each be 0.5 to 2 and not 1, not {scale}")
        check(len(set(self.scales)) == len(self.scales), f"scales must differ, not {self.scales}")
        for name in ("window", "first_window", "grid_spacing", "scales"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))  # of a list, as checkpoints hold it
        if isinstance(self.cleaning, dict):
            object.__setattr__(self, "cleaning", Cleaning(**self.cleaning))
        if isinstance(self.learnt_score, dict):
            object.__setattr__(self, "learnt_score", LearntScore(**self.learnt_score))

    @property
    def looks_everywhere(self) -> bool:
        """Whether there are further looks, and they are at all windows."""
        return bool(self.everywhere and self.window and (self.mirrors or self.scales))

    def to_dict(self) -> dict[str, Any]:
        """Built-in types, for checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Checkpoint:
    """All that a resume, an inference or a validation needs of a training.

    Args:
        network: Name of the network in NETWORKS, or 'ensemble' for an ``Ensemble``.
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
        constructors = {ENSEMBLE: Ensemble} | NETWORKS
        check(
            self.network in constructors,
            f"the checkpoint has the network {self.network!r}, which NETWORKS does not know",
        )
        network = constructors[self.network](**self.arguments)
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
    halves: dict[tuple[int, torch.Size], Tensor] = {}  # some networks list a layer under several names
    weights = dict(checkpoint.weights)
    for name, value in weights.items():
        if value.is_floating_point() and value.ndim > 1:
            weights[name] = halves.setdefault((value.data_ptr(), value.shape), value.half())
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
