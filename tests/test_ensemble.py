"""Several checkpoints joined to one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from data.ensemble import Ensembler, join_checkpoints, main
from data.export import Exporter
from data.rescoring import LearntScore
from infer import NoduleInferencer
from model import NETWORKS, Checkpoint, Ensemble, InferenceSettings, load_checkpoint, save_checkpoint
from utils import InputError, Split, read_processed, read_processed_list, write_split
from validate import Validator

LEVELS = {"unet": {"channels": (4, 8), "strides": (2,)}, "subpixel": {"channels": (4, 4, 8), "strides": (2, 2)}}


def member(name, seed=0, preprocessing=None, **more):
    torch.manual_seed(seed)
    network = NETWORKS[name](**LEVELS[name], dropout=0.0)
    network.expect(0.3)
    values = {"inference": InferenceSettings(), "training": {}, "epoch": seed, "progress": {}} | more
    values.setdefault("seen", {"a": (None, "train")})
    return Checkpoint(name, network.arguments, network.state_dict(), preprocessing or {"target_size": None}, **values)


def test_probability_is_the_mean_of_theirs():
    members = [member("unet"), member("subpixel"), member("unet", seed=1)]
    image = torch.rand(1, 1, 8, 8, 16)
    joined = join_checkpoints(members, "abc").build_network()
    assert isinstance(joined, Ensemble) and not joined.training and joined.divisor == 8
    with torch.no_grad():
        found = torch.sigmoid(joined(image))
        expected = torch.stack([torch.sigmoid(one.build_network()(image)) for one in members]).mean(dim=0)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="multiple of 8"):
        joined(torch.rand(1, 1, 8, 8, 12))


def test_weights_are_averaged_by_shares(tmp_path):
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    members = [member("unet", seed=3), member("unet", seed=1)]
    for path, one in zip(paths, members, strict=True):
        save_checkpoint(path, one)
    joined = load_checkpoint(Ensembler(paths, tmp_path / "mean.pth", shares=[0.75, 0.25]).join())
    assert joined.network == "unet" and joined.epoch == 3
    for name, value in joined.weights.items():
        first, second = (one.weights[name] for one in members)
        expected = 0.75 * first + 0.25 * second if value.is_floating_point() else first
        torch.testing.assert_close(value, expected)
    joined.build_network()


@pytest.mark.parametrize("other", ["subpixel", "larger voxels"])
def test_weights_of_different_networks_have_no_mean(other):
    spacings = [{"target_size": None, "target_spacing": [step] * 3} for step in (1.0, 2.0)]
    first = member("unet", preprocessing=spacings[0])
    second = member("unet", preprocessing=spacings[1]) if other == "larger voxels" else member("subpixel")
    first = first if other == "larger voxels" else member("unet")
    with pytest.raises(InputError, match="b has another network or voxel size than a"):
        join_checkpoints([first, second], "ab", [0.5, 0.5])


@pytest.mark.parametrize(
    ("shares", "message"),
    [([1.0], "shares must be 2, not 1"), ([0.5, 0.6], "add up to 1"), ([1.5, -0.5], "0 or more")],
)
def test_impossible_shares_are_refused(tmp_path, shares, message):
    with pytest.raises(InputError, match=message):
        Ensembler([tmp_path / "a.pth", tmp_path / "b.pth"], tmp_path / "mean.pth", shares)


def test_settings_are_joined():
    settings = [
        InferenceSettings(min_score=0.2, mirrors=3, window=(48, 32, 32), grid_spacing=(1.0, 1.0, 2.0)),
        InferenceSettings(min_score=0.4, mirrors=0, window=(32, 48, 48), grid_spacing=(1.0, 1.0, 1.0)),
    ]
    joined = join_checkpoints([member("unet", inference=one) for one in settings], "ab").inference
    assert joined.min_score == pytest.approx(0.3) and joined.first_window is None
    assert replace(joined, min_score=0.3) == InferenceSettings(0.5, 0.3, 3, (48, 48, 48), (1.0, 1.0, 1.5))


def test_mean_of_weights_has_the_settings_of_the_largest_share():
    settings = [
        InferenceSettings(0.5, 0.2, window=(48, 32, 32), grid_spacing=(1.0, 1.0, 2.0)),
        InferenceSettings(0.4, 0.3, mirrors=1, learnt_score=LearntScore((1.0,) * 7, 0.5, 40), window=(32, 48, 48)),
    ]
    members = [member("unet", inference=one) for one in settings]
    first, second = (join_checkpoints(members, "ab", shares).inference for shares in ([0.6, 0.4], [0.4, 0.6]))
    assert replace(first, window=None, grid_spacing=None) == InferenceSettings(0.5, 0.2)
    assert replace(second, window=None) == replace(settings[1], window=None)
    assert first.window == second.window == (48, 48, 48)


def test_what_one_has_seen_all_have_seen():
    seen = [
        {"a": (None, "train"), "b": ("p", "validation"), "c": (None, "validation")},
        {"a": ("q", "validation"), "b": (None, "train"), "c": (None, "earlier"), "d": (None, "validation")},
    ]
    learnt = [{"spacing": (1.0, 2.0), "dose": (5.0, 6.0)}, {"spacing": (0.5, 1.5)}]
    members = [
        member("unet", seen=s, learnt=r, about=a) for s, r, a in zip(seen, learnt, ["One.", "Two."], strict=True)
    ]
    joined = join_checkpoints(members, "ab")
    expected = {"a": ("q", "train"), "b": ("p", "train"), "c": (None, "earlier"), "d": (None, "validation")}
    assert joined.seen == expected
    assert joined.learnt == {"spacing": (0.5, 2.0)} and joined.about == "One. Two."


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"preprocessing": {"target_size": [8, 8, 8]}}, "b takes scans that are prepared otherwise than those of a"),
        ({"inference": InferenceSettings(threshold=0.4)}, "b has a threshold of 0.4, a one of 0.5"),
        ({"inference": InferenceSettings(window=(8, 8, 8))}, "trained on patches, the other one on whole scans"),
    ],
)
def test_checkpoints_that_do_not_fit_together_are_refused(other, message):
    with pytest.raises(InputError, match=message):
        join_checkpoints([member("unet"), member("unet", **other)], "ab")


def test_member_that_does_not_say_what_it_has_seen_is_refused():
    with pytest.raises(InputError, match=r"b does not say which scans it has seen; put the split\.json"):
        join_checkpoints([member("unet"), member("unet", seen={})], "ab")


def test_split_beside_a_member_says_what_it_has_seen(run_dir, tmp_path):
    """As of checkpoints that do not say it themselves."""
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_checkpoint(folder / "best_model.pth", member("unet", number, seen={}))
        write_split(folder / "split.json", Split((f"a{number}",), (f"b{number}",), ("c",)))
    paths = [tmp_path / str(number) / "best_model.pth" for number in range(2)]
    joined = load_checkpoint(Ensembler(paths, tmp_path / "joined.pth").join())
    expected = {"a0": "train", "a1": "train", "b0": "validation", "b1": "validation"}
    assert joined.seen == {uid: (None, part) for uid, part in expected.items()}


def test_ensemble_of_ensembles_is_refused():
    joined = join_checkpoints([member("unet"), member("unet")], "ab")
    with pytest.raises(InputError, match="b is an ensemble itself; name its members"):
        join_checkpoints([member("unet"), joined], "ab")


@pytest.fixture
def paths(run_dir, processed_dir, tmp_path):
    """Two checkpoints of one preparation, without a split beside them, that have seen a scan each."""
    uids = read_processed_list(processed_dir)
    known = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    settings = replace(known.inference, min_score=0.1)
    for number in range(2):
        one = member("unet", number, known.preprocessing, inference=settings, seen={uids[number]: (None, "train")})
        save_checkpoint(tmp_path / f"{number}.pth", one)
    return [tmp_path / "0.pth", tmp_path / "1.pth"]


def test_joined_file_infers_and_validates_as_any_other(paths, processed_dir, tmp_path, capsys):
    path = tmp_path / "joined.pth"
    assert main(["--checkpoint_paths", *map(str, paths), "--output_path", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    image = read_processed(processed_dir, read_processed_list(processed_dir)[0]).image
    maps = [
        NoduleInferencer(one, tmp_path / "out", "cpu", mixed_precision=False).predict_probability(image)
        for one in (path, *paths)
    ]
    np.testing.assert_allclose(maps[0], (maps[1] + maps[2]) / 2, atol=1e-5)
    result = Validator(processed_dir, path, tmp_path / "scored", "cpu", mixed_precision=False).run_validation("all")
    assert result.table["part"].tolist()[:3] == ["seen in training", "seen in training", "new"]


def test_joined_file_does_not_replace_another_unasked(paths):
    before = paths[0].read_bytes()
    with pytest.raises(FileExistsError, match="name another output_path"):
        Ensembler(paths, paths[0]).join()
    assert paths[0].read_bytes() == before


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [(1, "joined.pth", "must be two or more files, not 1"), (2, "joined", "output_path must end in .pth")],
)
def test_impossible_ensemble_is_refused(paths, tmp_path, count, name, message):
    with pytest.raises(InputError, match=message):
        Ensembler(paths[:count], tmp_path / name)


def test_joined_file_does_not_lie_beside_the_split_of_one_training(paths, run_dir):
    with pytest.raises(InputError, match=r"holds the split\.json of one training"):
        Ensembler(paths, run_dir / "checkpoints" / "joined.pth")


def spaced(name, spacing, seed=0, **more):
    """A member whose scans are prepared on a grid of that voxel size."""
    return member(name, seed, {"target_size": None, "target_spacing": [spacing] * 3, "mask_lungs": True}, **more)


def test_window_of_several_voxel_sizes_holds_no_air():
    windows = {1.0: (48, 48, 48), 1.25: (48, 48, 48)}
    members = [spaced("unet", step, inference=InferenceSettings(window=size)) for step, size in windows.items()]
    joined = join_checkpoints(members, "ab")
    assert joined.inference.window == (60, 60, 60) and joined.build_network().divisor == 2
    members = [spaced("subpixel", step, inference=InferenceSettings(window=size)) for step, size in windows.items()]
    joined = join_checkpoints(members, "ab")
    assert joined.inference.window == (64, 64, 64) and joined.build_network().divisor == 8
    members = [spaced("unet", step, inference=InferenceSettings(window=(96, 96, 96))) for step in (0.6, 0.75)]
    assert join_checkpoints(members, "ab").inference.window == (120, 120, 120)


def test_first_window_of_an_ensemble_is_the_largest_of_its_members():
    settings = {
        1.0: InferenceSettings(window=(32, 32, 32), first_window=(64, 64, 96)),
        1.25: InferenceSettings(window=(32, 32, 64)),
    }
    members = [spaced("unet", step, inference=one) for step, one in settings.items()]
    assert join_checkpoints(members, "ab").inference.first_window == (64, 64, 96)
    settings[1.25] = replace(settings[1.25], first_window=(60, 32, 80))
    members = [spaced("unet", step, inference=one) for step, one in settings.items()]
    assert join_checkpoints(members, "ab").inference.first_window == (75, 64, 100)


def test_members_of_larger_voxels_look_at_a_shrunk_image():
    coarse, fine = spaced("unet", 2.0), spaced("subpixel", 1.0)
    joined = join_checkpoints([coarse, fine], "ab")
    assert joined.preprocessing["target_spacing"] == [1.0] * 3
    assert [one.get("scale") for one in joined.arguments["members"]] == [None, [0.5] * 3]
    image = torch.rand(1, 1, 16, 24, 24)
    with torch.no_grad():
        found = torch.sigmoid(joined.build_network()(image))
        small = functional.avg_pool3d(image, 2)
        again = functional.interpolate(coarse.build_network()(small), (16, 24, 24), mode="trilinear")
        expected = (torch.sigmoid(fine.build_network()(image)) + torch.sigmoid(again)) / 2
    torch.testing.assert_close(found, expected)


def test_member_of_larger_voxels_takes_sizes_that_are_no_multiple_of_its_own():
    joined = join_checkpoints([spaced("unet", 1.0), spaced("subpixel", 1.5)], "ab").build_network()
    assert joined(torch.rand(2, 1, 8, 8, 16)).shape == (2, 1, 8, 8, 16)


def test_grid_and_window_of_several_voxel_sizes_are_those_of_the_finest():
    given = {1.0: (32, 32, 40), 2.0: (24, 16, 16)}
    settings = {mm: InferenceSettings(window=given[mm], grid_spacing=(mm, mm, mm)) for mm in given}
    joined = join_checkpoints([spaced("unet", mm, inference=settings[mm]) for mm in (2.0, 1.0)], "ab").inference
    assert (joined.window, joined.grid_spacing) == ((48, 32, 40), (1.0, 1.0, 1.0))


def test_ensemble_of_several_voxel_sizes_is_not_exported(tmp_path):
    save_checkpoint(tmp_path / "joined.pth", join_checkpoints([spaced("unet", 1.0), spaced("unet", 2.0)], "ab"))
    with pytest.raises(InputError, match="joins networks of several voxel sizes, which is not exported"):
        Exporter("torch", checkpoint_path=tmp_path / "joined.pth", output_dir=tmp_path / "out").export()


def test_members_that_differ_in_more_than_the_voxel_size_are_refused():
    other = spaced("unet", 2.0)
    other.preprocessing["mask_lungs"] = False
    with pytest.raises(InputError, match="prepared otherwise than those of a: mask_lungs"):
        join_checkpoints([spaced("unet", 1.0), other], "ab")
    stretched = member("unet", 0, {"target_size": [8, 8, 8], "target_spacing": [1.0] * 3, "mask_lungs": True})
    with pytest.raises(InputError, match="target_size"):
        join_checkpoints([spaced("unet", 1.0), stretched], "ab")


def test_learnt_scores_are_averaged_and_all_or_none_have_one():
    scores = [LearntScore((1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0), 1.0, 30), LearntScore((3.0,) * 7, 0.0, 50)]
    tuned = [member("unet", inference=InferenceSettings(learnt_score=score)) for score in scores]
    joined = join_checkpoints(tuned, "ab").inference.learnt_score
    assert joined == LearntScore((2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0), 0.5, 80)
    with pytest.raises(InputError, match="name checkpoints that are all tuned, or none of them"):
        join_checkpoints([tuned[0], member("unet")], "ab")
    averaged = join_checkpoints(tuned, "ab", [1.0, 0.0]).inference.learnt_score
    assert averaged is not None and averaged.weights == scores[0].weights and averaged.intercept == 1
    grids = [{"target_size": None, "target_spacing": [step] * 3} for step in (1.0, 2.0)]
    coarse = [replace(one, preprocessing=grid) for one, grid in zip(tuned, grids, strict=True)]
    with pytest.raises(InputError, match="b has another voxel size than a, and both have scores that were learnt"):
        join_checkpoints(coarse, "ab")


def test_weights_have_a_mean_whatever_the_dropout():
    first, second = member("unet"), member("unet", seed=1)
    second = replace(second, arguments=second.arguments | {"dropout": 0.1})
    joined = join_checkpoints([first, second], "ab", [0.5, 0.5])
    assert joined.network == "unet"
