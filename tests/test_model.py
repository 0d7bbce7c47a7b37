"""The network, its loss and its checkpoints."""

import hashlib
import inspect
import itertools
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from monai.losses import DiceLoss, FocalLoss, TverskyLoss
from monai.networks.nets import VNet
from scipy import ndimage
from torch import nn
from torch.nn import functional

from infer import evaluation_mode
from model import (
    LOSSES,
    NETWORKS,
    PRETRAINED_PATH,
    Checkpoint,
    DiceBCELoss,
    InferenceSettings,
    LungNodule3DUNet,
    SubpixelUNet,
    boundary_distance,
    checkpoint_file,
    deeply_supervised,
    hand_on,
    load_checkpoint,
    save_checkpoint,
    to_device,
)
from utils import UserError

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 1, "dropout": 0.0}


def small_network(**changes):
    torch.manual_seed(0)
    return LungNodule3DUNet(**(SMALL | changes)).eval()


IS_MISSING = find_spec("dynamic_network_architectures") is None
RESIDUAL = pytest.param(
    "nnunet_residual", marks=pytest.mark.skipif(IS_MISSING, reason="needs dynamic-network-architectures")
)
ALL_NETWORKS = [RESIDUAL if name == "nnunet_residual" else name for name in NETWORKS]
FREE_BLOCKS = ("unet", "subpixel", "subpixel_instance")  # networks with num_res_units


def any_network(name, **changes):
    """A small network of any name, with levels that all of them can have."""
    torch.manual_seed(0)
    return NETWORKS[name](**({"channels": (4, 8, 16), "strides": (2, 2), "dropout": 0.0} | changes)).eval()


# ---------------------------------------------------------------------------------------------------------- network


def test_network_has_the_arguments_and_defaults_of_the_brief():
    defaults = {name: p.default for name, p in inspect.signature(LungNodule3DUNet).parameters.items()}
    assert defaults == {
        "in_channels": 1,
        "out_channels": 1,
        "channels": (32, 64, 128, 256, 512),
        "strides": (2, 2, 2, 2),
        "num_res_units": 2,
        "dropout": 0.1,
        "norm": "batch",
    }


def test_default_network_has_19_3_million_parameters():
    assert round(sum(p.numel() for p in LungNodule3DUNet().parameters()) / 1e6, 1) == 19.3


def test_output_has_the_size_of_the_input():
    network = small_network(in_channels=2, out_channels=3)
    assert network(torch.rand(2, 2, 4, 6, 8)).shape == (2, 3, 4, 6, 8)


def test_output_is_logits():
    network = small_network()
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        before = network(image)
        *_, bias = (p for name, p in network.named_parameters() if name.endswith("bias"))
        bias += 30
        after = network(image)
    assert before.min() < 0 or before.max() > 1
    torch.testing.assert_close(after, before + 30 * network.logit_gain)


def test_weights_before_a_norm_start_small_and_give_the_same(monkeypatch):
    outputs = []
    for share in (1.0, 0.25):
        monkeypatch.setattr("model.START_SHARE", share)
        torch.manual_seed(0)
        network = LungNodule3DUNet(channels=(4, 8, 8), strides=(2, 2), dropout=0.0).train()
        outputs.append(network(100 * torch.rand(2, 1, 16, 16, 16)))  # so large that the norm's epsilon is nothing
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    slopes = [module.weight.item() for module in network.modules() if isinstance(module, nn.PReLU)]
    assert slopes == pytest.approx([0.01] * len(slopes))


@pytest.mark.parametrize(
    ("name", "num_res_units"), [*((name, 0) for name in FREE_BLOCKS), *((name, 2) for name in FREE_BLOCKS)]
)
def test_network_starts_from_few_nodules(name, num_res_units):
    with torch.no_grad():
        probability = torch.sigmoid(any_network(name, num_res_units=num_res_units)(torch.rand(1, 1, 16, 16, 16)))
    assert 0.01 < probability.mean() < 0.15


@pytest.mark.parametrize("num_res_units", [0, 1, 2])
def test_untrained_network_takes_nearly_all_voxels_for_background(num_res_units):
    with torch.no_grad():
        probability = torch.sigmoid(small_network(num_res_units=num_res_units)(torch.rand(1, 1, 16, 16, 16)))
    assert probability.mean() < 0.15


@pytest.mark.parametrize("name", ALL_NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_network_starts_from_the_share_of_nodules_that_it_is_told(name, training):
    network = any_network(name)
    network.expect(1e-3)
    with torch.no_grad():
        logits = network.train(training)(torch.rand(2, 1, 16, 16, 16))
    for level in logits.split(1, dim=1):
        assert logit(1e-4) < level.mean() < logit(1e-2)


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_network_gives_a_logit_a_voxel(name):
    network = any_network(name, in_channels=2, out_channels=3)
    assert network(torch.rand(2, 2, 8, 16, 24)).shape == (2, 3, 8, 16, 24)


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_network_learns_one_nodule(name):
    network = any_network(name).train()
    network.expect(1e-3)
    image, mask = torch.zeros(2, 1, 16, 16, 16), torch.zeros(2, 1, 16, 16, 16)
    image[0, :, 4:9, 4:9, 4:9] = mask[0, :, 4:9, 4:9, 4:9] = 1
    image[1, :, 6:12, 7:12, 2:9] = mask[1, :, 6:12, 7:12, 2:9] = 1
    image += 0.1 * torch.rand_like(image)
    loss, optimizer = DiceBCELoss(per_sample=True), torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        deeply_supervised(loss, network(image), mask).backward()
        optimizer.step()
    with torch.no_grad():
        marked = network(image)[:, :1] > 0
    assert 2 * (marked & (mask > 0)).sum() / (marked.sum() + mask.sum()) > 0.8


@pytest.mark.parametrize("name", ["nnunet", RESIDUAL])
def test_training_gives_the_logits_of_each_level_finest_first(name):
    network = any_network(name)
    image = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        whole, trained = network(image), network.train()(image)
    assert trained.shape == (2, 2, 16, 16, 16)
    torch.testing.assert_close(trained[:, :1], whole)  # instance norm is the same in training
    coarse = functional.avg_pool3d(trained[:, 1:], 2)
    torch.testing.assert_close(trained[:, 1:], functional.interpolate(coarse, scale_factor=2.0))
    assert len(network.heads) == 2


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_weights_fit_whatever_the_dropout(name):
    any_network(name, dropout=0.1).load_state_dict(any_network(name, dropout=0.0).state_dict())


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_handed_on_weights_take_half_the_bytes(name, tmp_path):
    network = any_network(name, channels=(8, 16, 32))
    given = hand_on(checkpoint_of(weights=network.state_dict()), "about", {})
    save_checkpoint(tmp_path / "half.pth", given)
    weights = load_checkpoint(tmp_path / "half.pth").weights.values()
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    single = sum(4 * tensor.numel() for tensor in [*network.parameters(), *network.buffers()])
    assert sum(storages.values()) < 0.6 * single


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_network_trains_on_after_it_was_evaluated(name):
    network = any_network(name).train()
    image = torch.rand(2, 1, 16, 16, 16)
    shape = network(image).shape
    with evaluation_mode(network):
        assert network(image).shape == (2, 1, 16, 16, 16)
    assert network(image).shape == shape


@pytest.mark.parametrize("name", [name for name in ALL_NETWORKS if name not in FREE_BLOCKS])
def test_network_of_fixed_blocks_refuses_others(name):
    with pytest.raises(ValueError, match="leave num_res_units at 2, not 0"):
        any_network(name, num_res_units=0)


@pytest.mark.parametrize("name", ["vnet", "segresnet"])
@pytest.mark.parametrize(
    ("levels", "message"),
    [({"channels": (4, 8, 8)}, r"each twice the one before, not \[4, 8, 8\]"), ({"strides": (2, 1)}, "must be 2, not")],
)
def test_network_refuses_levels_that_it_cannot_have(name, levels, message):
    with pytest.raises(ValueError, match=message):
        any_network(name, **levels)


def test_vnet_has_the_blocks_of_monai():
    ours = any_network("vnet", channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), dropout=0.5)
    theirs = VNet(dropout_prob_up=(0.5, 0.5))
    names = [name for name, _ in theirs.named_children() if name != "out_tr"]
    pairs = zip([ours.unet.first, *ours.unet.down, *ours.unet.up], names, strict=True)
    assert [str(block) for block, _ in pairs] == [str(getattr(theirs, name)) for name in names]


def test_nothing_stands_between_the_last_features_and_the_logits():
    end = small_network().unet.model[-1]
    features = torch.randn(1, end.head.in_channels, 2, 2, 2)
    end.hidden = nn.Identity()
    doubled = end(2 * features) - end(0 * features)
    torch.testing.assert_close(doubled, 2 * (end(features) - end(0 * features)))  # linear, of all features
    assert end(features).shape == (1, 1, 4, 4, 4)


@pytest.mark.parametrize("layer", [nn.BatchNorm3d, nn.PReLU, nn.Dropout])
def test_network_is_made_of(layer):
    assert any(isinstance(module, layer) for module in small_network(dropout=0.1).modules())


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_no_logit_is_dropped(name):
    network = any_network(name, dropout=0.9).train()
    network.expect(1e-4)
    logits = network(torch.rand(2, 1, 16, 16, 16))
    assert torch.count_nonzero(logits) == logits.numel()


def test_dropout_has_the_given_probability():
    found = {m.p for m in small_network(dropout=0.25).modules() if isinstance(m, nn.Dropout)}
    assert found == {0.25}


def test_arguments_are_built_in_types_that_build_the_same_network():
    network = small_network()
    twin = LungNodule3DUNet(**network.arguments)
    assert type(network.arguments["channels"]) is list
    assert str(twin) == str(network)


def test_divisor_is_the_product_of_the_strides():
    assert LungNodule3DUNet(channels=(2, 2, 2), strides=(2, 3)).divisor == 6


def test_divisor_of_the_subpixel_network_counts_its_first_convolution():
    assert SubpixelUNet(channels=(2, 2, 2), strides=(2, 1)).divisor == 4


@pytest.mark.parametrize("size", [(8, 8, 8), (4, 12, 8)])
def test_subpixel_network_gives_logits_of_the_size_of_the_input(size):
    network = SubpixelUNet(2, 3, channels=(4, 8, 8), strides=(2, 1), dropout=0.0).eval()
    assert network(torch.rand(2, 2, *size)).shape == (2, 3, *size)


def test_subpixel_logits_lie_where_their_voxels_lie():
    torch.manual_seed(0)
    network = SubpixelUNet(channels=(4, 8, 8), strides=(2, 1), dropout=0.0).eval()
    image = torch.zeros(1, 1, 32, 32, 32)
    with torch.no_grad():
        empty = network(image)
        image[..., 16, 16, 16] = 5
        changed = torch.nonzero((network(image) - empty).abs()[0, 0] > 1e-6).float()
    middle = (changed.min(dim=0).values + changed.max(dim=0).values) / 2
    assert len(changed) and (middle - 16).abs().max() <= 2


@pytest.mark.parametrize("num_res_units", [1, 3])
def test_subpixel_network_refuses_blocks_that_it_does_not_have(num_res_units):
    with pytest.raises(ValueError, match="must be 0 or 2"):
        SubpixelUNet(channels=(4, 8, 8), strides=(2, 2), num_res_units=num_res_units)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({"channels": (4, 8), "strides": (2,)}, "must have 3 or more channels"),
        ({"channels": (4, 8, 8), "strides": (2, 3)}, "strides of this network must be 1 or 2"),
    ],
)
def test_subpixel_network_refuses_levels_that_it_cannot_have(levels, message):
    with pytest.raises(ValueError, match=message):
        SubpixelUNet(**levels)


@pytest.mark.parametrize("name", ALL_NETWORKS)
def test_placed_network_computes_the_same(name):
    network = any_network(name)
    image = torch.rand(1, 1, 8, 16, 8)
    with torch.no_grad():
        before = network(image)
        torch.testing.assert_close(to_device(network, torch.device("cpu"))(image), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (4,), "strides": ()}, "channels must be two or more positive numbers"),
        ({"channels": (4, 0)}, "channels must be two or more positive numbers"),
        ({"strides": (2, 2)}, "strides must be 1 positive numbers, one fewer than channels"),
        ({"strides": (0,)}, "strides must be 1 positive numbers"),
        ({"num_res_units": -1}, "num_res_units must not be negative"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_impossible_network_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_network(**changes)


def test_size_error_names_the_nearest_size_that_fits():
    network = small_network(channels=(2, 2, 2), strides=(2, 2))
    with pytest.raises(ValueError, match=r"multiple of 4 .* \[9, 11, 1\]; .* \[8, 12, 4\]"):
        network.check_size((9, 11, 1))


def test_fitting_size_passes():
    small_network().check_size((2, 4, 6))


def test_forward_refuses_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match=r"multiple of 2 .* \[4, 5, 4\]"):
        small_network()(torch.rand(1, 1, 4, 5, 4))


# ------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_half_precision_logits_is_finite_float32_with_a_finite_gradient(name):
    loss = LOSSES[name](per_sample=True, hardest_share=0.5)
    getattr(loss, "begin_epoch", lambda epoch, epochs: None)(3, 4)
    target = torch.zeros(2, 1, 4, 4, 4)
    target[1, :, :2] = 1
    for truth in (target, 0 * target, 1 + 0 * target):
        logits = (60 * torch.randn(2, 1, 4, 4, 4)).bfloat16().requires_grad_()
        value = loss(logits, truth)
        value.backward()
        assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_pulls_towards_the_truth(name):
    loss = LOSSES[name]()
    getattr(loss, "begin_epoch", lambda epoch, epochs: None)(1, 2)
    target = torch.zeros(1, 1, 4, 4, 4)
    target[..., 1:3, 1:3, 1:3] = 1
    logits = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)
    loss(logits, target).backward()
    assert (logits.grad[target == 1] < 0).all() and (logits.grad[target == 0] > 0).all()
    with torch.no_grad():
        assert loss(20 * (2 * target - 1), target) < loss(0 * target, target) < loss(20 * (1 - 2 * target), target)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_two_processes_is_that_of_the_whole_batch(name):
    torch.manual_seed(0)
    logits, target = torch.randn(4, 1, 4, 4, 4), (torch.rand(4, 1, 4, 4, 4) > 0.8).float()
    whole = LOSSES[name]()
    sent = []

    def gather(figures):
        sent.append(figures)
        return torch.cat([figures, theirs[len(sent) - 1]], dim=1) if theirs else figures

    theirs = []
    part = LOSSES[name](gather=gather)
    for loss in (whole, part):
        getattr(loss, "begin_epoch", lambda epoch, epochs: None)(1, 2)
    part(logits[2:], target[2:])
    theirs, sent = sent, []
    torch.testing.assert_close(part(logits[:2], target[:2]), whole(logits, target))


def test_focal_loss_by_hand():
    loss = LOSSES["dice_focal"](dice_weight=0.0, bce_weight=1.0)
    expected = -(0.2**2 * math.log(0.8) + 0.3**2 * math.log(0.7)) / 2
    assert loss(logit(0.8, 0.3), volume(1, 0)).item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_equals_monai():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 4, 5, 6), torch.randint(0, 2, (2, 1, 4, 5, 6)).float()
    focal = FocalLoss(gamma=2.0)(logits, target)
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1e-6, smooth_dr=1e-6)(logits, target)
    torch.testing.assert_close(LOSSES["focal"](0.3, 0.4)(logits, target), 0.7 * focal)
    torch.testing.assert_close(LOSSES["dice_focal"](0.3, 0.4)(logits, target), 0.3 * dice + 0.4 * focal)


def test_focal_loss_refuses_the_weights_that_all_losses_refuse():
    with pytest.raises(ValueError, match=r"not both 0, not -1\.0, 2\.0"):
        LOSSES["focal"](-1.0, 2.0)


def test_tversky_loss_by_hand():
    # common 0.8 of nodule 1, false 0.4, missed 0.2
    expected = 1 - 0.8 / (0.8 + 0.3 * 0.4 + 0.7 * 0.2)
    loss = LOSSES["tversky"](dice_weight=1.0, bce_weight=0.0)
    assert loss(logit(0.8, 0.4), volume(1, 0)).item() == pytest.approx(expected, rel=1e-5)


def test_tversky_loss_equals_monai():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 4, 5, 6), torch.randint(0, 2, (2, 1, 4, 5, 6)).float()
    theirs = TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7, smooth_nr=1e-6, smooth_dr=1e-6)(logits, target)
    torch.testing.assert_close(LOSSES["tversky"](1.0, 0.0, per_sample=True)(logits, target), theirs)


def test_boundary_distance_by_hand():
    distances = 10 * boundary_distance(volume(0, 0, 1, 1, 1, 0) == 1)
    assert distances.flatten().tolist() == pytest.approx([1.5, 0.5, -0.5, -1.5, -0.5, 0.5])


@pytest.mark.parametrize("share", [0.002, 0.5, 0.995])
def test_boundary_distance_is_euclidean_and_cut_off(share):
    torch.manual_seed(0)
    mask = torch.rand(1, 1, 9, 24, 30) < share
    outside, inside = (ndimage.distance_transform_edt(part[0, 0].numpy()) for part in (~mask, mask))
    expected = torch.from_numpy(outside - inside - 0.5 * (outside > 0) + 0.5 * (inside > 0)).float()
    torch.testing.assert_close(10 * boundary_distance(mask)[0, 0], expected.clamp(-10, 10))


@pytest.mark.parametrize(("filled", "distance"), [(False, 1.0), (True, -1.0)])
def test_boundary_of_a_sample_of_one_kind_is_far(filled, distance):
    assert (boundary_distance(torch.full((1, 1, 3, 4, 5), filled)) == distance).all()


def test_boundary_loss_by_hand():
    loss = LOSSES["boundary"](per_sample=True)
    logits, target = logit(0.1, 0.8, 0.3), volume(0, 1, 0)
    region = LOSSES["dice_bce"](per_sample=True)(logits, target).item()
    boundary = (0.1 * 0.05 - 0.8 * 0.05 + 0.3 * 0.05) / 3
    for epoch in (0, 3):
        loss.begin_epoch(epoch, 10)
        expected = (1 - epoch / 10) * region + epoch / 10 * boundary
        assert loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_levels_count_half_of_the_one_before():
    loss, target = DiceBCELoss(), volume(1, 0)
    levels = [logit(0.8, 0.4), logit(0.6, 0.3), logit(0.2, 0.9)]
    expected = sum(weight * loss(level, target) for weight, level in zip((4, 2, 1), levels, strict=True)) / 7
    torch.testing.assert_close(deeply_supervised(loss, torch.cat(levels, dim=1), target), expected)
    assert deeply_supervised(loss, levels[0], target) == loss(levels[0], target)


def volume(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, 1, -1)


def logit(*probabilities):
    return volume(*(math.log(p / (1 - p)) for p in probabilities))


def test_loss_has_the_arguments_and_defaults_of_the_brief():
    defaults = {name: p.default for name, p in inspect.signature(DiceBCELoss).parameters.items()}
    assert {name: defaults[name] for name in ("dice_weight", "bce_weight", "smooth")} == {
        "dice_weight": 0.5,
        "bce_weight": 0.5,
        "smooth": 1e-6,
    }
    assert (defaults["per_sample"], defaults["hardest_share"]) == (False, 1.0)  # nothing beyond the brief


def test_loss_equals_the_formula_by_hand():
    # Dice = (2 (0.8 + 0.5) + 1) / ((0.8 + 0.5 + 0.2 + 0.5) + 2 + 1) = 3.6 / 5
    dice = 1 - 3.6 / 5
    bce = -(math.log(0.8) + math.log(0.5) + math.log(0.8) + math.log(0.5)) / 4
    loss = DiceBCELoss(dice_weight=0.7, bce_weight=0.2, smooth=1.0)(logit(0.8, 0.5, 0.2, 0.5), volume(1, 1, 0, 0))
    assert loss.item() == pytest.approx(0.7 * dice + 0.2 * bce, rel=1e-5)


def test_loss_equals_monai_dice_over_the_batch_plus_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 4, 5, 6), (torch.rand(2, 1, 4, 5, 6) > 0.8).float()
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1e-6, smooth_dr=1e-6)(logits, target)
    bce = functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(DiceBCELoss()(logits, target), 0.5 * dice + 0.5 * bce)


def test_false_positives_of_a_scan_without_nodules_raise_the_dice_term_of_its_batch():
    target = torch.cat([volume(1, 0), volume(0, 0)])
    loss = DiceBCELoss(dice_weight=1, bce_weight=0)
    clean = loss(torch.cat([logit(0.9, 0.1), logit(0.1, 0.1)]), target)
    assert loss(torch.cat([logit(0.9, 0.1), logit(0.9, 0.9)]), target) > clean


def test_dice_per_sample_by_hand():
    # Dice 0.8 of the first, 0.4 of the second; the third shows no nodule and has none.
    target = torch.cat([volume(1, 0), volume(1, 0), volume(0, 0)])
    logits = torch.cat([logit(2 / 3, 1e-9), logit(0.25, 1e-9), logit(0.5, 0.5)])
    loss = DiceBCELoss(dice_weight=1, bce_weight=0, per_sample=True)(logits, target)
    assert loss.item() == pytest.approx(1 - (0.8 + 0.4) / 2, abs=1e-5)


def test_small_nodule_counts_like_a_large_one_per_sample():
    target = torch.cat([volume(1, 0, 0, 0, 0, 0), volume(1, 1, 1, 1, 1, 1)])
    large_missed = torch.cat([volume(20, -20, -20, -20, -20, -20), volume(*[-20] * 6)])
    small_missed = torch.cat([volume(*[-20] * 6), volume(*[20] * 6)])
    loss = DiceBCELoss(dice_weight=1, bce_weight=0, per_sample=True)
    assert loss(small_missed, target).item() == pytest.approx(loss(large_missed, target).item(), abs=1e-5)
    of_batch = DiceBCELoss(dice_weight=1, bce_weight=0)
    assert of_batch(small_missed, target) < of_batch(large_missed, target) - 0.5


def test_cross_entropy_of_the_hardest_share_by_hand():
    # Of four voxels each, the worst two: p = 0.5 and 0.2 for nodule, then p = 0.5 and 0.1 for background.
    logits, target = torch.cat([logit(0.9, 0.2, 0.5, 0.1), logit(0.1, 0.5, 0.01, 0.02)]), volume(1, 1, 1, 0)
    target = torch.cat([target, volume(0, 0, 0, 0)])
    expected = -(math.log(0.2) + math.log(0.5) + math.log(0.5) + math.log(0.9)) / 4
    loss = DiceBCELoss(dice_weight=0, bce_weight=1, hardest_share=0.5)(logits, target)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_hardest_share_takes_at_least_one_voxel():
    loss = DiceBCELoss(dice_weight=0, bce_weight=1, hardest_share=0.01)(logit(0.9, 0.2), volume(1, 1))
    assert loss.item() == pytest.approx(-math.log(0.2), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_impossible_hardest_share_is_refused(share):
    with pytest.raises(ValueError, match="hardest_share must be above 0 and at most 1"):
        DiceBCELoss(hardest_share=share)


def test_perfect_prediction_costs_nearly_nothing():
    assert DiceBCELoss()(volume(20, 20, -20, -20), volume(1, 1, 0, 0)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_is_float32(dtype):
    loss = DiceBCELoss()(volume(1, -1).to(dtype), volume(1, 0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(DiceBCELoss()(volume(1, -1), volume(1, 0)).item())


def test_integer_target_is_taken():
    logits = volume(1, -1)
    assert DiceBCELoss()(logits, volume(1, 0).to(torch.uint8)) == DiceBCELoss()(logits, volume(1, 0))


def test_loss_of_four_million_half_precision_voxels_is_right():
    logits = torch.zeros(1, 1, 160, 160, 160, dtype=torch.float16)
    target = torch.zeros(1, 1, 160, 160, 160, dtype=torch.uint8)
    target[0, 0, :10, :10, :10] = 1
    dice = 1 - 2 * 500 / (160**3 / 2 + 1000)
    assert DiceBCELoss()(logits, target).item() == pytest.approx(0.5 * dice + 0.5 * math.log(2), rel=1e-5)


def test_gradient_of_four_million_half_precision_voxels_is_finite():
    logits = torch.zeros(1, 1, 160, 160, 160, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(1, 1, 160, 160, 160, dtype=torch.uint8)
    target[0, 0, :10, :10, :10] = 1
    (65536 * DiceBCELoss()(logits, target)).backward()  # the scale a GradScaler begins with
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad != 0).all()


def test_batch_without_nodules_has_a_finite_loss():
    assert torch.isfinite(DiceBCELoss()(volume(3, -3), volume(0, 0)))


def test_batch_without_nodules_pulls_every_voxel_down():
    logits = volume(2, 0, -2).requires_grad_()
    DiceBCELoss()(logits, volume(0, 0, 0)).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad > 0.01).all()


def test_batch_without_nodules_costs_less_for_a_better_prediction():
    losses = [DiceBCELoss()(volume(value, value), volume(0, 0)).item() for value in (4.0, 0.0, -4.0)]
    assert losses[0] > losses[1] > losses[2]


def test_cross_entropy_of_a_batch_without_nodules_takes_the_weight_of_both_terms():
    loss = DiceBCELoss(dice_weight=0.7, bce_weight=0.2)(logit(0.6, 0.1), volume(0, 0))
    assert loss.item() == pytest.approx(-0.9 * (math.log(0.4) + math.log(0.9)) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dice_weight": -0.1}, "dice_weight and bce_weight must be >= 0"),
        ({"bce_weight": -0.1}, "dice_weight and bce_weight must be >= 0"),
        ({"dice_weight": 0, "bce_weight": 0}, "not both 0"),
        ({"smooth": 0}, "smooth must be positive"),
    ],
)
def test_impossible_loss_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiceBCELoss(**arguments)


def test_loss_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="must have the same shape"):
        DiceBCELoss()(volume(1, 2), volume(1))


# ------------------------------------------------------------------------------------------------------ checkpoints


def checkpoint_of(network=None, weights=None, **values):
    given = {"preprocessing": {}, "inference": InferenceSettings(), "training": {}, "epoch": 3, "progress": {}} | values
    arguments, weights = (network.arguments, network.state_dict()) if network else ({}, weights)
    return Checkpoint(network="unet", arguments=arguments, weights=weights, **given)


@pytest.fixture
def checkpoint_path(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, checkpoint_of(weights={"w": torch.arange(1000.0)}, training={"name": "x", "sizes": [1, 2]}))
    return path


def test_checkpoint_comes_back_as_it_was_saved(checkpoint_path):
    checkpoint = load_checkpoint(checkpoint_path)
    assert torch.equal(checkpoint.weights["w"], torch.arange(1000.0))
    assert (checkpoint.epoch, checkpoint.training) == (3, {"name": "x", "sizes": [1, 2]})


def test_network_comes_back_from_its_checkpoint(tmp_path):
    network = small_network()
    save_checkpoint(tmp_path / "n.pth", checkpoint_of(network))
    restored = load_checkpoint(tmp_path / "n.pth").build_network()
    image = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(restored(image), network(image))


def test_network_of_a_checkpoint_is_in_evaluation_mode():
    network = small_network().train()
    assert not checkpoint_of(network).build_network().training


def test_checkpoint_of_training_opens(run_dir):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    assert checkpoint.network == "unet" and checkpoint.weights and checkpoint.preprocessing and checkpoint.training
    assert checkpoint.epoch >= 1


def test_missing_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist; run python train\.py first"):
        load_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(checkpoint_path, share):
    whole = checkpoint_path.read_bytes()
    checkpoint_path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"checkpoint\.pth is damaged"):
        load_checkpoint(checkpoint_path)


@pytest.mark.parametrize("position", [0, 1, 2000, 3998, 3999])
@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit_in_the_weights_is_refused(checkpoint_path, position, bit):
    data = bytearray(checkpoint_path.read_bytes())
    start = data.find(torch.arange(1000.0).numpy().tobytes())
    assert start > 0
    data[start + position] ^= 1 << bit
    checkpoint_path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint\.pth is damaged"):
        load_checkpoint(checkpoint_path)


def test_flipped_bit_anywhere_is_harmless_or_a_value_error_that_names_the_file(checkpoint_path):
    save_checkpoint(
        checkpoint_path, checkpoint_of(weights=torch.arange(100.0))
    )  # a small file: every seventh byte is tried
    whole = checkpoint_path.read_bytes()
    wrong = []
    for position, bit in itertools.product(range(0, len(whole), 7), (3, 7)):
        data = bytearray(whole)
        data[position] ^= 1 << bit
        checkpoint_path.write_bytes(data)
        try:
            if not torch.equal(load_checkpoint(checkpoint_path).weights, torch.arange(100.0)):
                wrong.append("other weights")
        except Exception as error:  # noqa: BLE001 - whatever is raised is the subject
            if not isinstance(error, ValueError) or str(checkpoint_path) not in str(error):
                wrong.append(f"{type(error).__name__}: {error}")
    assert sorted(set(wrong)) == []


def test_missing_permission_is_not_called_damage(checkpoint_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        load_checkpoint(checkpoint_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"),
        MemoryError(),
    ],
)
def test_lack_of_memory_is_not_called_damage(checkpoint_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="does not fit into memory") as caught:
        load_checkpoint(checkpoint_path)
    assert "damaged" not in str(caught.value)


def test_checkpoint_says_the_hash_of_its_file(checkpoint_path):
    expected = hashlib.sha256(checkpoint_path.read_bytes()).hexdigest()
    assert load_checkpoint(checkpoint_path).sha256 == expected


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("seriesuid,coordX\n")
    with pytest.raises(ValueError, match=r"text\.pth is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "text.pth")


def test_checkpoint_of_another_program_is_refused(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is no checkpoint of this version"):
        load_checkpoint(tmp_path / "other.pth")


def test_file_that_holds_no_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth is no checkpoint of this version"):
        load_checkpoint(tmp_path / "list.pth")


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_checkpoint_that_would_run_code_is_refused_without_running_it(tmp_path):
    victim = tmp_path / "victim"
    save_checkpoint(tmp_path / "harmful.pth", checkpoint_of(weights=Harmful(str(victim))))
    with pytest.raises(ValueError, match=r"harmful\.pth is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "harmful.pth")
    assert not victim.exists()


def test_default_network_refuses_a_norm_that_would_fix_its_logits():
    with pytest.raises(ValueError, match="norm of this network must be 'batch', not 'instance'"):
        small_network(norm="instance")


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="norm of this network must be 'batch' or 'instance', not 'group'"):
        SubpixelUNet(norm="group")


def test_instance_norm_makes_samples_independent_of_each_other():
    torch.manual_seed(0)
    images = torch.rand(2, 1, 16, 16, 16)
    network = SubpixelUNet(channels=(4, 8, 8), strides=(2, 1), num_res_units=0, dropout=0.0, norm="instance").train()
    assert torch.allclose(network(images)[:1], network(images[:1]), atol=1e-5)
    with pytest.raises(ValueError, match="instance norm needs some size above 4"):
        network.check_size((4, 4, 4))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("settings", [{}, {"per_sample": True, "hardest_share": 0.05}, {"bce_weight": 0.0}])
def test_ignored_voxels_teach_nothing(settings, name):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1, 4, 5, 6), torch.randint(0, 2, (2, 1, 4, 5, 6), dtype=torch.uint8)
    target[:, :, :2, :2] = 2
    logits.requires_grad_()
    loss = LOSSES[name](**settings)
    getattr(loss, "begin_epoch", lambda epoch, epochs: None)(1, 2)
    value = loss(logits, target)
    value.backward()
    assert torch.isfinite(value) and (logits.grad[target == 2] == 0).all() and (logits.grad != 0).any()
    others = torch.where(target == 2, 50.0, logits.detach())  # whatever the network says there
    assert torch.equal(loss(others, target), value.detach())


def test_sample_with_ignored_voxels_alone_has_no_dice():
    logits, target = torch.zeros(1, 1, 2, 2, 2), torch.full((1, 1, 2, 2, 2), 2)
    assert DiceBCELoss()(logits, target) == 0


def test_checkpoint_that_is_handed_on_is_small_and_finds_the_same(run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    given = hand_on(checkpoint, "trained on phantoms", {"a": ("P", "train")})
    save_checkpoint(tmp_path / "given.pth", given)
    taken = load_checkpoint(tmp_path / "given.pth")
    assert (taken.about, taken.seen, taken.progress) == ("trained on phantoms", {"a": ("P", "train")}, {})
    halves = {name for name, value in taken.weights.items() if value.dtype == torch.float16}
    assert halves and all(name.endswith("weight") for name in halves)
    torch.manual_seed(0)
    image = torch.rand(1, 1, 16, 16, 16)
    with torch.inference_mode():
        before, after = (c.build_network()(image).sigmoid() for c in (checkpoint, taken))
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    assert checkpoint_file("pretrained") == PRETRAINED_PATH
    assert checkpoint_file(tmp_path / "given.pth") == tmp_path / "given.pth"
