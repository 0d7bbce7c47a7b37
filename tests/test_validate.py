"""Metrics and the validator."""

import json
import math
import random
import shutil

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import validate
from infer import NoduleInferencer
from model import DiceBCELoss, LungNodule3DUNet
from utils import read_processed, read_processed_list
from validate import Validator, format_summary, match_nodules, summarize, voxel_metrics

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0, "dropout": 0.1}


class Oracle(nn.Module):
    """Knows one mask (z, y, x) and finds exactly that."""

    def __init__(self, mask):
        super().__init__()
        self.logits = 20.0 * torch.from_numpy(np.array(mask, np.float32)) - 10

    def forward(self, image):
        return self.logits.expand_as(image)


class Everything(nn.Module):
    """Takes every voxel for nodule."""

    def forward(self, image):
        return torch.full_like(image, 10)


class Nothing(nn.Module):
    """Finds no nodule."""

    def forward(self, image):
        return torch.full_like(image, -10)


# ----------------------------------------------------------------------------------------------------- voxel metrics


def masks(prediction, truth):
    return (np.array(values, np.uint8).reshape(1, 1, -1) for values in (prediction, truth))


def test_voxel_metrics_by_hand():
    metrics = voxel_metrics(*masks([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]))  # TP 2, FP 1, FN 2
    assert metrics == {
        "dice": 4 / 7,
        "sensitivity": 2 / 4,
        "precision": 2 / 3,
        "recall": 2 / 4,
        "tp_voxels": 2,
        "fp_voxels": 1,
        "fn_voxels": 2,
    }


def test_perfect_prediction_has_metrics_of_one():
    metrics = voxel_metrics(*masks([1, 0], [1, 0]))
    assert [metrics[name] for name in ("dice", "sensitivity", "precision", "recall")] == [1, 1, 1, 1]


def test_disjoint_masks_have_metrics_of_zero():
    metrics = voxel_metrics(*masks([1, 0], [0, 1]))
    assert [metrics[name] for name in ("dice", "sensitivity", "precision", "recall")] == [0, 0, 0, 0]


def undefined(metrics):
    return {name for name, value in metrics.items() if math.isnan(value)}


def test_all_metrics_of_two_empty_masks_are_undefined():
    assert undefined(voxel_metrics(*masks([0, 0], [0, 0]))) == {"dice", "sensitivity", "precision", "recall"}


def test_sensitivity_is_undefined_where_nothing_is_annotated():
    metrics = voxel_metrics(*masks([1, 0], [0, 0]))
    assert undefined(metrics) == {"sensitivity", "recall"}
    assert (metrics["dice"], metrics["precision"]) == (0, 0)


def test_precision_is_undefined_where_nothing_is_predicted():
    metrics = voxel_metrics(*masks([0, 0], [1, 0]))
    assert undefined(metrics) == {"precision"}
    assert (metrics["dice"], metrics["sensitivity"]) == (0, 0)


def test_whatever_is_not_zero_is_nodule():
    assert voxel_metrics(np.array([[[255, 0]]]), np.array([[[True, False]]]))["dice"] == 1


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"prediction \(1, 1, 2\) and truth \(1, 1, 3\) differ in shape"):
        voxel_metrics(np.zeros((1, 1, 2)), np.zeros((1, 1, 3)))


# ----------------------------------------------------------------------------------------------------------- nodules


def nodule(x, diameter=10.0):
    return {"center_world": [x, 0.0, 0.0], "diameter_mm": diameter}


def test_nodule_is_found_by_a_centre_nearer_than_its_radius():
    assert match_nodules([nodule(4.99)], [nodule(0)]) == (1, 0)


def test_centre_at_the_radius_finds_nothing():
    assert match_nodules([nodule(5.0)], [nodule(0)]) == (0, 1)


def test_radius_is_that_of_the_annotation():
    assert match_nodules([nodule(4, diameter=1)], [nodule(0, diameter=10)]) == (1, 0)
    assert match_nodules([nodule(4, diameter=10)], [nodule(0, diameter=1)]) == (0, 1)


def test_distance_is_measured_in_all_three_directions():
    found = {"center_world": [3.0, 3.0, 3.0], "diameter_mm": 1.0}  # 5.2 mm away
    assert match_nodules([found], [nodule(0)]) == (0, 1)


def test_second_hit_on_a_nodule_counts_neither_way():
    assert match_nodules([nodule(1), nodule(-1)], [nodule(0)]) == (1, 0)


def test_each_annotated_nodule_is_counted():
    assert match_nodules([nodule(0), nodule(50), nodule(99)], [nodule(1), nodule(51), nodule(200)]) == (2, 1)


@pytest.mark.parametrize(
    ("found", "annotated", "expected"),
    [([], [nodule(0)], (0, 0)), ([nodule(0)], [], (0, 1)), ([], [], (0, 0))],
)
def test_nodules_of_empty_lists_are_counted(found, annotated, expected):
    assert match_nodules(found, annotated) == expected


# ----------------------------------------------------------------------------------------------------------- summary


def row(uid, dice, nodules=1, found=1, false=0, fp_voxels=0, part="validation"):
    metrics = dict.fromkeys(("dice", "sensitivity", "precision", "recall"), dice)
    counts = {"nodules": nodules, "nodules_found": found, "false_positive_nodules": false, "fp_voxels": fp_voxels}
    return {"seriesuid": uid, "part": part} | metrics | counts


@pytest.fixture
def table():
    return pd.DataFrame(
        [
            row("a", 1.0, nodules=3, found=2),
            row("b", 0.5),
            row("c", math.nan, nodules=0, found=0),
            row("d", 0.0, nodules=0, found=0, false=4, fp_voxels=70),
        ]
    )


def test_mean_and_deviation_leave_out_what_is_undefined(table):
    assert summarize(table)["dice"] == {"mean": 0.5, "std": pytest.approx(math.sqrt(1 / 6)), "scans": 3}


def test_summary_counts_scans_and_nodules(table):
    summary = summarize(table)
    assert (summary["scans"], summary["nodules"], summary["nodules_found"]) == (4, 4, 3)
    assert summary["false_positive_nodules"] == 4


def test_dice_of_the_scans_with_nodules_leaves_out_the_others(table):
    assert summarize(table)["dice_of_scans_with_nodules"] == 0.75


def test_scans_without_nodules_are_reported(table):
    summary = summarize(table)
    assert summary["scans_without_nodules"] == 2
    assert summary["scans_without_nodules_but_predicted"] == 1
    assert summary["false_positive_nodules_there"] == 4
    assert summary["false_positive_voxels_there"] == 70


def test_training_scans_are_not_summarized(table):
    more = pd.concat([table, pd.DataFrame([{"seriesuid": "t", "part": "train"}])])
    assert summarize(more) == summarize(table)


def test_metric_that_is_undefined_everywhere_has_no_mean():
    summary = summarize(pd.DataFrame([row("c", math.nan, nodules=0, found=0)]))
    assert math.isnan(summary["dice"]["mean"])
    assert summary["dice"]["scans"] == 0


def test_summary_for_a_person_says_mean_deviation_and_how_many_scans(table):
    lines = format_summary(summarize(table)).splitlines()
    (dice,) = [line for line in lines if line.startswith("dice ")]
    assert dice.split() == ["dice", "0.500", "±", "0.408", "3", "of", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "Dice of the scans with nodules alone: 0.750",
        "nodules found: 3 of 4, false-positive nodules: 4",
        "scans without nodules: 2, of which 1 with a prediction (4 nodules, 70 voxels)",
    ],
)
def test_summary_for_a_person_says_what_a_mean_hides(table, text):
    assert text in format_summary(summarize(table))


def test_distribution_shows_only_defined_values(table):
    figure = validate.draw_distribution(table)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "dice\nn = 3",
        "sensitivity (recall)\nn = 3",
        "precision\nn = 3",
    ]


# ------------------------------------------------------------------------------------------------- with a live model


@pytest.fixture
def live(processed_dir, tmp_path):
    """A validator of a live model over the scans with these indices."""

    def make(model, scans=(0,), **arguments):
        uids = [read_processed_list(processed_dir)[index] for index in scans]
        arguments = {"device": "cpu", "mixed_precision": False, "seriesuids": uids} | arguments
        return Validator(processed_dir, output_dir=tmp_path / "out", model=model, **arguments)

    return make


def scan_of(processed_dir, index):
    return read_processed(processed_dir, read_processed_list(processed_dir)[index])


def test_perfect_model_has_a_dice_of_one(live, processed_dir):
    scan = scan_of(processed_dir, 0)
    result = live(Oracle(scan.mask)).run_validation()
    assert result.dice == 1
    assert result.table["tp_voxels"].tolist() == [np.count_nonzero(scan.mask)]


@pytest.mark.parametrize("index", [2, 3])  # in scan 0 two nodules touch on this coarse grid and are one component
def test_perfect_model_finds_every_nodule_at_its_place_in_mm(live, processed_dir, index):
    scan = scan_of(processed_dir, index)
    summary = live(Oracle(scan.mask), [index]).run_validation().summary
    assert (summary["nodules_found"], summary["false_positive_nodules"]) == (len(scan.metadata["nodules"]), 0)


def test_scan_without_nodules_and_prediction_is_scored_as_undefined(live):
    result = live(Nothing(), [1]).run_validation()
    assert math.isnan(result.dice)
    assert result.summary["scans_without_nodules"] == 1


def test_loss_is_the_mean_over_the_scans(live, processed_dir):
    expected = []
    for index in (0, 1):
        mask = torch.from_numpy(np.array(scan_of(processed_dir, index).mask))[None, None]
        expected.append(DiceBCELoss()(torch.full(mask.shape, -10.0), mask).item())
    assert live(Nothing(), (0, 1), loss=DiceBCELoss()).run_validation().loss == pytest.approx(np.mean(expected))


def test_loss_without_a_loss_function_is_nan(live):
    assert math.isnan(live(Nothing()).run_validation().loss)


def test_threshold_decides_what_is_predicted(live, processed_dir):
    class Doubtful(nn.Module):
        def forward(self, image):
            return torch.full_like(image, 0.0)

    counts = [live(Doubtful(), threshold=t).run_validation().table["fp_voxels"][0] for t in (0.5, 0.6)]
    assert counts == [32 * 48 * 48 - np.count_nonzero(scan_of(processed_dir, 0).mask), 0]


def test_validation_of_a_live_model_writes_nothing(live, tmp_path):
    live(Nothing()).run_validation()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("training", [True, False])
def test_validation_leaves_the_training_mode_as_it_was(live, training):
    network = LungNodule3DUNet(**SMALL).train(training)
    live(network, loss=DiceBCELoss()).run_validation()
    assert {module.training for module in network.modules()} == {training}


def random_states():
    """States of Python's, numpy's legacy and torch's generator."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_validation_leaves_random_states_as_they_were(live):
    validator = live(LungNodule3DUNet(**SMALL).train(), loss=DiceBCELoss())
    before = random_states()
    validator.run_validation()
    assert random_states() == before


def test_validation_leaves_gradients_as_they_were(live):
    network = LungNodule3DUNet(**SMALL).train()
    live(network, loss=DiceBCELoss()).run_validation()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_example_shows_the_scan_with_the_most_nodule_voxels(live, processed_dir):
    uids = read_processed_list(processed_dir)
    most = max(range(4), key=lambda index: np.count_nonzero(scan_of(processed_dir, index).mask))
    assert live(Nothing(), (0, 1, 2, 3)).draw_example().get_suptitle().startswith(f"{uids[most]}\n")


def test_live_model_needs_the_scans_to_score(processed_dir):
    with pytest.raises(ValueError, match="a live model needs the seriesuids to score"):
        Validator(processed_dir, model=Nothing(), device="cpu")


# ------------------------------------------------------------------------------------------------ with a checkpoint


@pytest.fixture(scope="module")
def all_run(run_dir, processed_dir, tmp_path_factory):
    """A validation of all scans: (output folder, result)."""
    folder = tmp_path_factory.mktemp("validation")
    path = run_dir / "checkpoints" / "best_model.pth"
    return folder, Validator(processed_dir, path, folder, "cpu", mixed_precision=False).run_validation("all")


@pytest.fixture
def parts(run_dir):
    split = json.loads((run_dir / "checkpoints" / "split.json").read_text())
    return {uid: part for part, uids in split.items() for uid in uids}


@pytest.mark.parametrize("name", ["validation_results.csv", "validation_summary.json", "metrics_distribution.png"])
def test_validation_writes(all_run, name):
    assert (all_run[0] / name).stat().st_size > 100


def test_written_table_is_the_one_returned(all_run):
    folder, result = all_run
    table = pd.read_csv(folder / "validation_results.csv", dtype={"seriesuid": str})
    pd.testing.assert_frame_equal(table, result.table, check_dtype=False)


def test_written_summary_is_the_one_returned(all_run):
    folder, result = all_run
    np.testing.assert_equal(json.loads((folder / "validation_summary.json").read_text()), result.summary)


def test_picture_of_the_distribution_opens(all_run):
    assert matplotlib.image.imread(all_run[0] / "metrics_distribution.png").std() > 0.05


def test_all_scans_are_listed_with_their_part(all_run, parts):
    table = all_run[1].table
    assert dict(zip(table["seriesuid"], table["part"], strict=True)) == parts


def test_training_scans_are_never_scored(all_run):
    table = all_run[1].table
    assert table.loc[table["part"] == "train"].drop(columns=["seriesuid", "part"]).isna().all(axis=None)
    assert table.loc[table["part"] == "validation", "tp_voxels"].notna().all()
    assert all_run[1].summary["scans"] == 1


def test_mask_scored_is_the_one_that_infer_predicts(all_run, run_dir, processed_dir, parts):
    inferencer = NoduleInferencer(run_dir / "checkpoints" / "best_model.pth", device="cpu", mixed_precision=False)
    table = all_run[1].table.set_index("seriesuid")
    (uid,) = [uid for uid, part in parts.items() if part == "validation"]
    scan = read_processed(processed_dir, uid)
    expected = voxel_metrics(inferencer.predict(scan.image), scan.mask)
    assert table.loc[uid, list(expected)].to_dict() == pytest.approx(expected, nan_ok=True)


def test_mask_scored_of_a_sliding_window_is_the_one_that_infer_writes(run_dir, processed_dir, tmp_path, parts):
    path = run_dir / "checkpoints" / "best_model.pth"
    inferencer = NoduleInferencer(path, tmp_path / "infer", "cpu", mixed_precision=False)
    validator = Validator(processed_dir, path, tmp_path / "validate", "cpu", mixed_precision=False)
    inferencer.window = validator.inferencer.window = (16, 24, 24)
    inferencer.model = validator.inferencer.model = Everything()
    inferencer.infer_dataset(processed_dir)
    (uid,) = [uid for uid, part in parts.items() if part == "validation"]
    written = np.load(tmp_path / "infer" / "predicted_masks" / f"{uid}.npy")
    expected = voxel_metrics(written, read_processed(processed_dir, uid).mask)
    assert 0 < np.count_nonzero(written) < written.size  # the lungs' box alone
    (scored,) = validator.run_validation().table[list(expected)].to_dict("records")
    assert scored == pytest.approx(expected, nan_ok=True)


def test_validation_scans_alone_are_listed_by_default(run_dir, processed_dir, tmp_path, parts):
    validator = Validator(processed_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path, "cpu")
    validator.inferencer.model = Nothing()
    assert dict.fromkeys(validator.run_validation().table["seriesuid"], "validation").items() <= parts.items()


@pytest.fixture
def copied_run(run_dir, tmp_path):
    """Path of a copy of the checkpoint, beside which another split can be written."""
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "best_model.pth"


def test_undefined_metrics_are_empty_in_the_table(copied_run, processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    split = {"train": uids[2:], "validation": [uids[0], uids[1]]}
    (copied_run.parent / "split.json").write_text(json.dumps(split))
    validator = Validator(processed_dir, copied_run, tmp_path / "out", "cpu")
    validator.inferencer.model = Nothing()
    validator.run_validation()
    lines = (tmp_path / "out" / "validation_results.csv").read_text().splitlines()
    assert lines[1].split(",")[2:6] == ["0.0", "0.0", "", "0.0"]  # a missed nodule: dice, sensitivity, -, recall
    assert lines[2].split(",")[2:6] == ["", "", "", ""]  # no nodule


def test_validation_with_everything_undefined_still_writes_its_picture(copied_run, processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    (copied_run.parent / "split.json").write_text(json.dumps({"train": uids[2:], "validation": [uids[1]]}))
    validator = Validator(processed_dir, copied_run, tmp_path / "out", "cpu")
    validator.inferencer.model = Nothing()
    assert math.isnan(validator.run_validation().dice)
    assert (tmp_path / "out" / "metrics_distribution.png").is_file()


def test_folder_with_training_scans_alone_cannot_be_validated(copied_run, processed_dir, tmp_path):
    split = {"train": read_processed_list(processed_dir), "validation": ["1.2.3"]}
    (copied_run.parent / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="validation"):
        Validator(processed_dir, copied_run, tmp_path / "out", "cpu").run_validation("all")


def test_data_prepared_with_other_settings_is_refused(run_dir, processed_dir, tmp_path):
    shutil.copytree(processed_dir, tmp_path / "other")
    for path in (tmp_path / "other").glob("*_metadata.json"):
        metadata = json.loads(path.read_text())
        metadata["preprocessing"]["mask_lungs"] = False
        path.write_text(json.dumps(metadata))
    validator = Validator(tmp_path / "other", run_dir / "checkpoints" / "best_model.pth", tmp_path / "out", "cpu")
    with pytest.raises(ValueError, match=r"preprocessed otherwise .*mask_lungs: False instead of True"):
        validator.run_validation()


def test_threshold_outside_of_0_and_1_is_refused(run_dir, processed_dir):
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, not 2"):
        Validator(processed_dir, run_dir / "checkpoints" / "best_model.pth", device="cpu", threshold=2)


# ------------------------------------------------------------------------------------------------------ command line


def test_command_line_prints_the_summary_and_ends_with_status_0(run_dir, processed_dir, tmp_path, capsys):
    arguments = {
        "data_dir": processed_dir,
        "checkpoint_path": run_dir / "checkpoints" / "best_model.pth",
        "output_dir": tmp_path,
        "device": "cpu",
    }
    assert validate.main([f"--{name}={value}" for name, value in arguments.items()]) == 0
    summary = json.loads((tmp_path / "validation_summary.json").read_text())
    assert capsys.readouterr().out.startswith(format_summary(summary))


def test_command_line_without_a_checkpoint_ends_with_status_1(tmp_path, caplog):
    assert validate.main([f"--checkpoint_path={tmp_path / 'none.pth'}", "--device=cpu"]) == 1
    assert "run python train.py first" in caplog.text


def test_command_line_without_data_ends_with_status_1(run_dir, tmp_path, caplog):
    path = run_dir / "checkpoints" / "best_model.pth"
    assert validate.main([f"--checkpoint_path={path}", f"--data_dir={tmp_path}", "--device=cpu"]) == 1
    assert "run python preprocess.py first" in caplog.text
