"""Metrics and the validator."""

import hashlib
import json
import logging
import math
import random
import shutil
from dataclasses import replace
from datetime import datetime, timedelta

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import metadata_of, nodule_at
from scipy import ndimage
from torch import nn

import validate
from infer import FoundNodule, NoduleInferencer, Segmentation, find_candidates, map_scans
from model import DiceBCELoss, LungNodule3DUNet, load_checkpoint, save_checkpoint
from utils import (
    POSITION_COLUMNS,
    AnnotatedNodule,
    Box,
    Geometry,
    InputError,
    Nodule,
    ProcessedScan,
    read_metadata,
    read_processed,
    read_processed_list,
    read_split,
    write_metadata,
)
from validate import (
    NODULE_RESULT_COLUMNS,
    ExaminedScan,
    Overlap,
    Validator,
    choose_min_score,
    draw_agreement,
    format_summary,
    froc,
    match_nodules,
    nodule_crop,
    score_predictions,
    size_agreement,
    summarize,
    table_by_size,
    voxel_metrics,
)

LEVELS = {"threshold": 0.5, "min_score": 0.25}
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
    return Nodule((x, 0.0, 0.0), (0.0, 0.0, x), diameter)


def test_nodule_is_found_by_a_centre_nearer_than_its_radius():
    assert match_nodules([nodule(4.99)], [nodule(0)]) == (1, 0)


def test_centre_at_the_radius_finds_nothing():
    assert match_nodules([nodule(5.0)], [nodule(0)]) == (0, 1)


def test_radius_is_that_of_the_annotation():
    assert match_nodules([nodule(4, diameter=1)], [nodule(0, diameter=10)]) == (1, 0)
    assert match_nodules([nodule(4, diameter=10)], [nodule(0, diameter=1)]) == (0, 1)


def test_distance_is_measured_in_all_three_directions():
    found = Nodule((3.0, 3.0, 3.0), (3.0, 3.0, 3.0), 1.0)  # 5.2 mm away
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


CUBE = Geometry((40, 40, 40), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
MIDDLE = nodule_at(20.0, 20.0, 20.0, diameter_mm=4.0)  # its crop reaches 2 + 5 mm: voxels 13 to 27


def lines(**boxes):
    """Masks of CUBE's shape by name: 1 in the box (z, y, x)."""
    arrays = []
    for box in boxes.values():
        array = np.zeros(CUBE.shape_zyx, np.uint8)
        array[box] = 1
        arrays.append(array)
    return arrays


def nodule_dice(mask, truth, geometry, nodule):
    box = nodule_crop(geometry, nodule).slices
    return voxel_metrics(mask[box], truth[box])["dice"]


def test_dice_of_a_nodule_by_hand():
    mask, truth = lines(mask=np.s_[20, 20, 20:24], truth=np.s_[20, 20, 18:22])  # TP 2, FP 2, FN 2
    assert nodule_dice(mask, truth, CUBE, MIDDLE) == 0.5


@pytest.mark.parametrize(("x", "expected"), [(12, 1.0), (13, 0.8), (27, 0.8), (28, 1.0)])
def test_dice_of_a_nodule_counts_its_diameter_and_5_mm_around(x, expected):
    mask, truth = lines(mask=np.s_[20, 20, 20:22], truth=np.s_[20, 20, 20:22])
    mask[20, 20, x] = 1
    assert nodule_dice(mask, truth, CUBE, MIDDLE) == expected


@pytest.mark.parametrize(("z", "expected"), [(16, 1.0), (17, 0.8), (23, 0.8), (24, 1.0)])
def test_crop_of_a_nodule_is_measured_in_mm(z, expected):
    thick = Geometry(CUBE.shape_zyx, CUBE.origin, (1.0, 1.0, 2.5))  # 7 mm are 2.8 slices
    mask, truth = lines(mask=np.s_[20, 20, 20:22], truth=np.s_[20, 20, 20:22])
    mask[z, 20, 20] = 1
    assert nodule_dice(mask, truth, thick, MIDDLE) == expected


def test_dice_of_a_nodule_at_the_edge_is_that_of_what_lies_on_the_grid():
    mask, truth = lines(mask=np.s_[0, 0, 0:2], truth=np.s_[0, 0, 0:2])
    assert nodule_dice(mask, truth, CUBE, replace(MIDDLE, index_zyx=(0.5, -1.0, 0.0))) == 1


@pytest.mark.parametrize("place", [-50.0, 90.0])
def test_dice_of_a_nodule_off_the_grid_is_undefined(place):
    (mask,) = lines(mask=np.s_[:, :, :])
    assert math.isnan(nodule_dice(mask, mask, CUBE, replace(MIDDLE, index_zyx=(20.0, 20.0, place))))


def test_missed_nodule_has_a_dice_of_zero():
    (truth,) = lines(truth=np.s_[20, 20, 18:22])
    assert nodule_dice(0 * truth, truth, CUBE, MIDDLE) == 0


# ------------------------------------------------------------------------------------------------- smallest score


def test_overlap_gives_the_metrics_of_any_choice_of_labels():
    labels, truth = np.array([[[0, 1, 1, 2, 3, 3, 0]]]), np.array([[[1, 1, 0, 1, 0, 0, 0]]])
    overlap = Overlap.of(labels, truth, 4)  # label 4 has no voxel
    for chosen in ([0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 1, 1, 1, 0]):
        chosen = np.array(chosen, bool)
        np.testing.assert_equal(overlap.metrics(chosen), voxel_metrics(chosen[labels], truth))


def examined(truth_voxels, *spots):
    """A scan of so many nodule voxels, with spots of (score, voxels, of them nodule)."""
    voxels, hits = ([0, *(spot[i] for spot in spots)] for i in (1, 2))
    hits[0] = truth_voxels - sum(hits)
    box = Box((0, 0, 0), (1, 1, 1))
    candidates = [FoundNodule((0.0,) * 3, (0.0,) * 3, 5.0, 1, 1.0, box, score) for score, _, _ in spots]
    found = Segmentation(np.zeros((0, 1, 1), int), candidates, list(range(1, len(spots) + 1)))
    overlap = Overlap(np.array(voxels), np.array(hits))
    return ExaminedScan("1.2.3", [], found, overlap, [], [], np.zeros((0, 4)), math.nan)


@pytest.mark.parametrize(("true", "false", "chosen"), [(0.8, 0.2, 0.5), (0.8, 0.6, 0.61), (0.4, 0.2, 0.4)])
def test_chosen_score_lies_between_false_and_true_spots_nearest_to_the_expected_one(true, false, chosen):
    scans = [examined(10, (true, 10, 10), (false, 5, 0)), examined(10, (true, 10, 10), (false, 3, 0))] * 6
    assert choose_min_score(scans) == pytest.approx(chosen)


def test_chosen_score_passes_over_what_hardly_changes_the_dice():
    clear, odd = examined(10, (0.8, 10, 10), (0.2, 5, 0)), examined(1000, (0.8, 1000, 1000), (0.7, 1, 0))
    assert choose_min_score([clear] * 9 + [odd]) == pytest.approx(0.5)  # the one voxel costs 0.00005


@pytest.mark.parametrize(("repeats", "chosen"), [(1, 0.5), (40, 0.61)])
def test_chosen_score_leaves_the_expected_one_where_enough_scans_say_so(repeats, chosen):
    """With the spots of 0.6 the mean Dice is 3 / 5, without them 2 / 3; the error is 0.35 for six scans."""
    scans = [examined(10, (0.8, 10, 10)), examined(10, (0.9, 10, 10)), examined(10, (0.6, 10, 10)), examined(0)]
    scans += [examined(0, (0.6, 5, 0))] * 2
    assert choose_min_score(scans * repeats) == pytest.approx(chosen)


def test_chosen_score_gives_up_a_nodule_that_would_cost_more_than_it_brings():
    scans = [examined(10, (0.9, 10, 10)), examined(10, (0.3, 2, 2)), *[examined(0, (0.5, 1, 0))] * 3] * 8
    assert 0.5 < choose_min_score(scans) < 0.9


def test_chosen_score_is_no_mean_of_two_that_exclude_each_other():
    low, high, empty = examined(10, (0.2, 10, 10)), examined(10, (0.9, 10, 10)), examined(0, (0.6, 5, 0))
    scans = [low] * 7 + [high] * 9 + [empty] * 10
    scores = (0.1, 0.4, choose_min_score(scans), 0.8)
    first, middle, chosen, last = (
        np.nanmean([scan.dice_without_excluded(score) for scan in scans]) for score in scores
    )
    assert middle < min(first, last) <= chosen


def test_chosen_score_without_any_dice_keeps_all():
    assert choose_min_score([examined(0)]) == 0
    assert choose_min_score([examined(10, (0.9, 3, 0))]) == 0


def test_row_counts_only_what_reaches_the_score():
    scan = examined(10, (0.9, 8, 8), (0.3, 5, 0))
    assert scan.row(0.5)["fp_voxels"] == 0 and scan.row(0.3)["fp_voxels"] == 5
    assert scan.row(0.5)["false_positive_nodules"] == 1  # nothing is annotated
    assert scan.dice_without_excluded(0.5) == scan.row(0.5)["dice"] == 16 / 18


@pytest.mark.parametrize(
    ("x", "diameter_mm", "ignored"),
    [
        (30.0, 5.0, True),
        (32.4, 5.0, True),
        (32.6, 5.0, False),  # as far as its radius, and a little more
        (34.9, -1.0, True),  # unknown: 10 mm
        (10.0, 5.0, False),  # the nodule itself
    ],
)
def test_predicted_nodule_on_an_excluded_finding_counts_neither_way(x, diameter_mm, ignored):
    probability = np.zeros((9, 9, 40), np.float32)
    truth = np.zeros(probability.shape, np.uint8)
    probability[3:6, 3:6, 9:12] = probability[3:6, 3:6, 29:32] = 0.9
    truth[3:6, 3:6, 9:12] = 1
    metadata = metadata_of(nodule_at(4.0, 4.0, 10.0, diameter_mm=4.0), shape_zyx=probability.shape)
    scan = ProcessedScan("a", probability, truth, metadata)
    excluded = pd.DataFrame(
        [("a", x, 4.0, 4.0, diameter_mm), ("b", 30.0, 4.0, 4.0, 20.0)],  # another scan's does not matter
        columns=["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"],
    )
    found = find_candidates(probability, scan.geometry, 0.5)
    row = ExaminedScan.of(scan, found, excluded=excluded).row(0.0)
    assert (row["dice"], row["false_positive_nodules"]) == (2 / 3, 1)  # strict, as ever
    assert row["dice_without_excluded"] == (1 if ignored else 2 / 3)
    assert row["on_excluded_findings"] == int(ignored)


def test_live_validation_chooses_the_score_and_a_given_one_stays(processed_dir):
    uids = read_processed_list(processed_dir)
    arguments = {"device": "cpu", "model": Everything(), "seriesuids": uids}
    assert Validator(processed_dir, min_score=0.25, **arguments).run_validation().min_score == 0.25
    result = Validator(processed_dir, **arguments).run_validation()
    assert result.summary["min_score"] == result.min_score


# ----------------------------------------------------------------------------------------------------- table by size


def marks_of(*rows):
    """Table of (seriesuid, x, probability)."""
    table = pd.DataFrame(rows, columns=["seriesuid", "coordX", "probability"])
    return table.assign(coordY=0.0, coordZ=0.0)[["seriesuid", "coordX", "coordY", "coordZ", "probability"]]


def annotated_of(*rows):
    """Table of (seriesuid, x, diameter in mm, dice)."""
    table = pd.DataFrame(rows, columns=["seriesuid", "coordX", "diameter_mm", "dice"])
    return table.assign(coordY=0.0, coordZ=0.0)


def test_table_by_size_by_hand():
    nodules = annotated_of(
        ("a", 0.0, 5.9, 0.2), ("a", 50.0, 6.0, 0.4), ("a", 100.0, 10.0, math.nan), ("a", 150.0, 10.1, 0.0)
    )
    curve = froc(marks_of(("a", 0.0, 0.9), ("a", 50.0, 0.3)), nodules, num_bootstraps=0)
    assert table_by_size(nodules, curve).to_dict("records") == [
        {"diameter": "< 6 mm", "nodules": 1, "dice_per_nodule": 0.2, "found": 1.0, "cpm": 1.0},
        {"diameter": "6-10 mm", "nodules": 2, "dice_per_nodule": 0.4, "found": 0.5, "cpm": 0.5},
        {"diameter": "> 10 mm", "nodules": 1, "dice_per_nodule": 0.0, "found": 0.0, "cpm": 0.0},
    ]


def sized(*rows):
    """Rows of nodule_results.csv: annotated, grid and found diameter."""
    table = [("a", 0.0, 0.0, 0.0, true, 0.5, grid, found) for true, grid, found in rows]
    return pd.DataFrame(table, columns=NODULE_RESULT_COLUMNS)


def test_agreement_of_diameters_by_hand():
    nan = math.nan
    rows = size_agreement(
        sized((5.0, 5.2, 5.5), (5.9, nan, nan), (6.0, 6.1, 7.0), (10.0, 10.3, 9.0), (20.0, 20.2, 21.5))
    )
    assert [(row["diameter"], row["found"]) for row in rows] == [("all", 4), ("< 6 mm", 1), ("6 mm and more", 3)]
    assert [row["bias_mm"] for row in rows] == pytest.approx([0.5, 0.5, 0.5])
    assert [row["grid_bias_mm"] for row in rows] == pytest.approx([0.2, 0.2, 0.2])
    spread = math.sqrt((0.5**2 + 1.5**2 + 1.0**2) / 2)
    quantile = 4.3027  # of Student's t with two degrees of freedom
    error, limit = quantile * spread / math.sqrt(3), quantile * spread * math.sqrt(4 / 3)
    assert rows[2]["limits_mm"] == pytest.approx([0.5 - limit, 0.5 + limit], rel=1e-4)
    assert rows[2]["bias_interval_mm"] == pytest.approx([0.5 - error, 0.5 + error], rel=1e-4)
    assert np.isnan(rows[1]["limits_mm"]).all()


def test_nothing_found_has_no_agreement():
    assert size_agreement(sized((5.0, 5.2, math.nan))) == []


def found_ball(x_mm, diameter_mm, score):
    return FoundNodule((x_mm, 0.0, 0.0), (0.0,) * 3, diameter_mm, 1, 1.0, Box((0, 0, 0), (1, 1, 1)), score)


def test_size_of_a_nodule_is_that_of_the_surest_that_hits_it_alone():
    annotated = [
        AnnotatedNodule((x, 0.0, 0.0), (0.0,) * 3, diameter, 1)
        for x, diameter in ((0.0, 10.0), (50.0, 8.0), (100.0, 10.0), (104.0, 10.0))
    ]
    balls = [
        found_ball(1.0, 7.0, 0.6),
        found_ball(-1.0, 9.0, 0.8),
        found_ball(50.0, 8.5, 0.3),
        found_ball(102.0, 15.0, 0.9),
    ]
    found = Segmentation(np.zeros((0, 1, 1), int), balls, [1, 2, 3, 4])
    overlap = Overlap(np.ones(5, int), np.zeros(5, int))
    scan = ExaminedScan("a", annotated, found, overlap, [overlap] * 4, [9.9, 8.2, 9.8, math.nan], np.zeros((0, 4)), 0.0)
    sizes = [row["found_diameter_mm"] for row in scan.nodule_rows(0.5)]
    np.testing.assert_equal(sizes, [9.0, math.nan, math.nan, math.nan])
    assert scan.nodule_rows(0.2)[1]["found_diameter_mm"] == 8.5
    np.testing.assert_equal([row["grid_diameter_mm"] for row in scan.nodule_rows(0.5)], [9.9, 8.2, 9.8, math.nan])


def test_size_that_no_nodule_has_is_left_out():
    nodules = annotated_of(("a", 0.0, 12.0, 0.5))
    curve = froc(marks_of(("a", 0.0, 0.9)), nodules, num_bootstraps=0)
    assert table_by_size(nodules, curve)["diameter"].tolist() == ["> 10 mm"]


# ----------------------------------------------------------------------------------------------------------- summary


def row(uid, dice, nodules=1, found=1, false=0, part="validation", **voxels):
    metrics = dict.fromkeys(("dice", "sensitivity", "precision", "recall", "dice_without_excluded"), dice)
    counts = {"nodules": nodules, "nodules_found": found, "false_positive_nodules": false, "on_excluded_findings": 0}
    counts |= {"tp_voxels": 0, "fp_voxels": 0, "fn_voxels": 0} | voxels
    return {"seriesuid": uid, "part": part} | metrics | counts


@pytest.fixture
def table():
    return pd.DataFrame(
        [
            row("a", 1.0, nodules=3, found=2, tp_voxels=8),
            row("b", 0.5, tp_voxels=2, fp_voxels=1, fn_voxels=3),
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


def test_pooled_dice_counts_the_voxels_of_all_scans_together(table):
    assert summarize(table)["dice_pooled"] == 20 / (20 + 71 + 3)  # TP 8 + 2, FP 1 + 70, FN 3


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
    assert math.isnan(summary["dice_pooled"])
    assert summary["dice"]["scans"] == 0


def test_summary_for_a_person_says_mean_deviation_and_how_many_scans(table):
    lines = format_summary(LEVELS | summarize(table)).splitlines()
    (dice,) = [line for line in lines if line.startswith("dice ")]
    assert dice.split() == ["dice", "0.500", "±", "0.408", "3", "of", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "Dice per scan, scans with nodules alone: 0.750",
        "Dice pooled over all voxels of all scans: 0.213",
        "nodules found: 3 of 4, false-positive nodules: 4, of which 0 on excluded findings",
        "scans without nodules: 2, of which 1 with a prediction (4 nodules, 70 voxels)",
    ],
)
def test_summary_for_a_person_says_what_a_mean_hides(table, text):
    assert text in format_summary(LEVELS | summarize(table))


def test_summary_for_a_person_has_the_cpm_and_the_table_by_size(table):
    size = {"diameter": "< 6 mm", "nodules": 1, "dice_per_nodule": 0.25, "found": 1.0, "cpm": 0.8125}
    text = format_summary(
        LEVELS | summarize(table) | {"cpm": {"value": 0.75, "interval": [0.5, 0.875]}, "by_size": [size]}
    )
    assert "FROC: CPM 0.750 (95 % interval 0.500 to 0.875)" in text
    assert text.splitlines()[-1].split() == ["<", "6", "mm", "1", "0.25", "1.0", "0.812"]


def test_summary_for_a_person_without_nodules_has_no_froc(table):
    assert "FROC" not in format_summary(LEVELS | summarize(table) | {"by_size": []})


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
    assert (summary["nodules_found"], summary["false_positive_nodules"]) == (len(scan.metadata.nodules), 0)


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

    counts = [live(Doubtful(), threshold=t, min_score=0.0).run_validation().table["fp_voxels"][0] for t in (0.5, 0.6)]
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
    return {uid: part for part in ("train", "validation", "test") for uid in split[part]}


@pytest.mark.parametrize(
    "name",
    ["validation_results.csv", "validation_summary.json", "metrics_distribution.png"]
    + ["froc.csv", "froc.png", "nodule_results.csv"],
)
def test_validation_writes(all_run, name):
    assert (all_run[0] / name).stat().st_size > 100


def test_written_table_is_the_one_returned(all_run):
    folder, result = all_run
    table = pd.read_csv(folder / "validation_results.csv", dtype={"seriesuid": str})
    pd.testing.assert_frame_equal(table, result.table, check_dtype=False)


def test_written_summary_is_the_one_returned(all_run):
    folder, result = all_run
    written = json.loads((folder / "validation_summary.json").read_text())
    assert written == json.loads(json.dumps(result.summary).replace("NaN", "null"))


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
    for predictor in (inferencer.predictor, validator.inferencer.predictor):
        predictor.settings = replace(predictor.settings, window=(16, 24, 24))
        predictor.model = Everything()
    inferencer.infer_dataset(processed_dir)
    (uid,) = [uid for uid, part in parts.items() if part == "validation"]
    written = np.load(tmp_path / "infer" / "predicted_masks" / f"{uid}.npy")
    expected = voxel_metrics(written, read_processed(processed_dir, uid).mask)
    assert 0 < np.count_nonzero(written) < written.size  # the lungs' box alone
    (scored,) = validator.run_validation().table[list(expected)].to_dict("records")
    assert scored == pytest.approx(expected, nan_ok=True)


def test_validation_scans_alone_are_listed_by_default(run_dir, processed_dir, tmp_path, parts):
    validator = Validator(processed_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path, "cpu")
    validator.inferencer.predictor.model = Nothing()
    assert dict.fromkeys(validator.run_validation().table["seriesuid"], "validation").items() <= parts.items()


# ---------------------------------------------------------------------------------------------- whose results they are


def test_summary_says_whose_results_it_holds(all_run, run_dir, processed_dir):
    summary = json.loads((all_run[0] / "validation_summary.json").read_text())
    path = run_dir / "checkpoints" / "best_model.pth"
    assert (summary["checkpoint"], summary["data_dir"]) == (str(path), str(processed_dir))
    assert summary["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (summary["subset"], summary["fold"], summary["threshold"], summary["mirrors"]) == ("all", None, 0.5, 0)
    assert abs(datetime.now().astimezone() - datetime.fromisoformat(summary["date"])) < timedelta(hours=1)


@pytest.mark.parametrize(
    ("arguments", "subset"), [({}, "all"), ({"threshold": 0.6}, "validation"), ({"min_score": 0.9}, "validation")]
)
def test_results_of_other_scans_or_settings_are_not_replaced(run_dir, processed_dir, tmp_path, arguments, subset):
    path = run_dir / "checkpoints" / "best_model.pth"
    Validator(processed_dir, path, tmp_path, "cpu").run_validation()
    Validator(processed_dir, path, tmp_path, "cpu").run_validation()  # the same again is no other
    (tmp_path / "froc.png").write_text("of the earlier run")
    before = (tmp_path / "validation_summary.json").read_text()
    with pytest.raises(FileExistsError, match=r"holds results of .*threshold 0\.5.*\(what differs: .*overwrite=True"):
        Validator(processed_dir, path, tmp_path, "cpu", **arguments).run_validation(subset)
    assert (tmp_path / "validation_summary.json").read_text() == before
    Validator(processed_dir, path, tmp_path, "cpu", overwrite=True, **arguments).run_validation(subset)
    assert (tmp_path / "validation_summary.json").read_text() != before
    assert not [path for path in tmp_path.iterdir() if path.read_bytes() == b"of the earlier run"]


def test_summary_says_where_epoch_and_score_were_chosen_on_the_scans_it_scores(
    all_run, fold_run, processed_dir, tmp_path
):
    held_out = Validator(processed_dir, fold_run / "checkpoints" / "best_model.pth", tmp_path, "cpu").run_validation(
        "test"
    )
    assert (all_run[1].summary["chosen_on_these_scans"], held_out.summary["chosen_on_these_scans"]) == (True, False)
    assert "flatter the network; a held-out fold" in format_summary(all_run[1].summary)
    assert "flatter" not in format_summary(held_out.summary)


def test_score_learnt_at_another_threshold_is_dropped_and_told(run_dir, processed_dir, tmp_path, caplog):
    path = tmp_path / "checkpoints" / "best_model.pth"
    shutil.copytree(run_dir / "checkpoints", path.parent)
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, replace(checkpoint, inference=replace(checkpoint.inference, min_score=0.4)))
    assert Validator(processed_dir, path, tmp_path / "out", "cpu").inferencer.settings.min_score == 0.4
    assert not caplog.text
    assert Validator(processed_dir, path, tmp_path / "out", "cpu", threshold=0.3).inferencer.settings.min_score == 0
    assert "the min_score of 0.40 was learnt at a threshold of 0.5, not 0.3" in caplog.text
    assert (
        Validator(processed_dir, path, tmp_path / "out", "cpu", 0.3, min_score=0.2).inferencer.settings.min_score == 0.2
    )


@pytest.fixture
def damaged_data(processed_dir, tmp_path):
    """(processed data of which one scan is cut off, its series UID); for a split of validation scans alone."""
    shutil.copytree(processed_dir, tmp_path / "damaged")
    uid = read_processed_list(processed_dir)[1]
    path = tmp_path / "damaged" / "images" / f"{uid}.npy"
    path.write_bytes(path.read_bytes()[:2000])
    return tmp_path / "damaged", uid


def test_one_bad_scan_costs_none_of_the_others(copied_run, damaged_data, tmp_path, capsys, caplog):
    (data, uid), uids = damaged_data, read_processed_list(damaged_data[0])
    (copied_run.parent / "split.json").write_text(json.dumps({"train": [], "validation": uids}))
    words = {"data_dir": data, "checkpoint_path": copied_run, "output_dir": tmp_path / "out", "device": "cpu"}
    assert validate.main([f"--{name}={value}" for name, value in words.items()]) == 1
    failed = pd.read_csv(tmp_path / "out" / "failed_scans.csv", dtype={"seriesuid": str})
    assert failed["seriesuid"].tolist() == [uid]
    assert "is damaged" in failed["reason"][0] and "run python preprocess.py again" in failed["reason"][0]
    table = pd.read_csv(tmp_path / "out" / "validation_results.csv", dtype={"seriesuid": str})
    assert table["seriesuid"].tolist() == [other for other in uids if other != uid]
    summary = json.loads((tmp_path / "out" / "validation_summary.json").read_text())
    assert (summary["scans"], summary["failed_scans"]) == (3, 1)
    assert (tmp_path / "out" / "froc.csv").is_file()
    assert "1 scan could not be used" in capsys.readouterr().out
    assert uid in caplog.text


def test_list_of_failures_goes_with_them(copied_run, processed_dir, damaged_data, tmp_path):
    (copied_run.parent / "split.json").write_text(
        json.dumps({"train": [], "validation": read_processed_list(processed_dir)})
    )
    Validator(damaged_data[0], copied_run, tmp_path / "out", "cpu").run_validation()
    assert (tmp_path / "out" / "failed_scans.csv").is_file()
    shutil.copytree(processed_dir, damaged_data[0], dirs_exist_ok=True)
    Validator(damaged_data[0], copied_run, tmp_path / "out", "cpu").run_validation()
    assert not (tmp_path / "out" / "failed_scans.csv").exists()


def test_bug_in_one_scan_keeps_its_traceback_and_is_called_unexpected(run_dir, processed_dir, tmp_path, caplog):
    class Buggy(nn.Module):
        def forward(self, image):
            return image[9, 9]

    validator = Validator(processed_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path, "cpu")
    validator.inferencer.predictor.model = Buggy()
    with pytest.raises(InputError, match=r"no scan could be scored.*unexpected IndexError"):
        validator.run_validation()
    assert "Traceback" in caplog.text and "in forward" in caplog.text


def test_bad_validation_scan_ends_a_validation_of_a_live_network(damaged_data):
    data, uid = damaged_data
    validator = Validator(data, device="cpu", model=Nothing(), seriesuids=read_processed_list(data))
    with pytest.raises(InputError, match=rf"{uid}\.npy is damaged"):
        validator.run_validation()


def test_validated_scan_is_not_predicted_again_for_its_picture(processed_dir):
    class Counting(Nothing):
        seen = 0

        def forward(self, image):
            self.seen += 1
            return super().forward(image)

    network, uids = Counting(), read_processed_list(processed_dir)
    validator = Validator(processed_dir, device="cpu", model=network, seriesuids=uids)
    validator.run_validation()
    assert validator.draw_example().get_suptitle().split("\n")[0] in uids
    assert network.seen == len(uids)


# ------------------------------------------------------------------------------------------------- what a person reads


def told(rows, **further):
    extra = {"cpm": {"value": 1.0, "interval": [1.0, 1.0]}, "by_size": [{"diameter": "< 6 mm", "nodules": 1}]}
    return format_summary(LEVELS | summarize(pd.DataFrame(rows)) | extra | further)


def test_one_scan_has_no_deviation_and_one_nodule_no_interval():
    text = told([row("a", 0.5, nodules=1, found=1)], cpm={"value": 1.0, "interval": [None, None]})
    assert "±" not in text.splitlines()[2] and "dice" in text.splitlines()[2]
    assert "CPM 1.000\n" in text
    two = told([row("a", 0.5, nodules=1, found=1), row("b", 0.5, nodules=1, found=1)])
    assert "±" in two.splitlines()[2] and "95 % interval" in two


def test_nothing_defined_is_said_once():
    text = told([row("c", math.nan, nodules=0, found=0)], by_size=[])
    assert text.count("undefined") == 1


def test_summary_says_how_many_training_scans_were_left_out(all_run):
    assert "3 training scans left out" in format_summary(all_run[1].summary)


def test_counts_are_whole_numbers_in_the_table(all_run):
    lines = (all_run[0] / "validation_results.csv").read_text().splitlines()
    columns = lines[0].split(",")
    for line in lines[1:]:
        cells = dict(zip(columns, line.split(","), strict=True))
        assert all("." not in cells[name] for name in validate.COUNTS)


def test_counts_of_a_froc_are_told_in_words(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE, HITS_AND_MISTAKE[0])
    text = validate.format_froc(score("marks.csv", seriesuids_path="seriesuids.csv"))
    assert "scans: " in text and " found, " in text and " missed" in text
    assert "1 false positives; marks that count neither way: 1 further hits on a nodule" in text
    assert "_" not in text.replace("fp_per_scan", "")


def test_score_of_marks_says_whose_they_are(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    curve = score("marks.csv", seriesuids_path="seriesuids.csv")
    origin = json.loads((challenge / "out" / "froc.json").read_text())
    assert origin["predictions"] == [str((challenge / "marks.csv").resolve())]
    assert (origin["annotations"], origin["seriesuids"]) == ("annotations.csv", "seriesuids.csv")
    assert origin["cpm"]["value"] == curve.cpm


def test_score_of_other_marks_is_not_replaced(challenge):
    for name in ("marks.csv", "others.csv"):
        write_marks(challenge / name, *HITS_AND_MISTAKE)
    score("marks.csv", seriesuids_path="seriesuids.csv")
    score("marks.csv", seriesuids_path="seriesuids.csv")  # the same again is no other
    with pytest.raises(FileExistsError, match=r"out holds the score of .*marks\.csv; name another output_dir"):
        score("others.csv", seriesuids_path="seriesuids.csv")
    score("others.csv", seriesuids_path="seriesuids.csv", overwrite=True)


def test_annotations_of_other_scans_are_named_as_the_culprit(challenge):
    write_fold(challenge / "fold0", [("x", 0, 0.9)], {"x": "test", "y": "test"})
    with pytest.raises(InputError, match=r"annotations\.csv has no annotation in any of the 2 scans.*annotations_path"):
        score("fold0/candidates.csv")


def test_default_folder_for_marks_is_not_that_of_a_network(challenge, capsys):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    write_fold(challenge / "experiments/luna16_unet/validation", [("a", 0, 0.9)], {"a": "test"})
    words = ["--predictions=marks.csv", "--seriesuids_path=seriesuids.csv", "--annotations_path=annotations.csv"]
    assert validate.main(words) == 0
    assert (challenge / "experiments" / "predictions" / "froc.csv").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ["--predictions=marks.csv", "--threshold=0.5"],
        ["--predictions=marks.csv", "--subset=new"],
        ["--predictions=marks.csv", "--fold=1"],
        ["--annotations_path=annotations.csv"],
        ["--seriesuids_path=seriesuids.csv"],
    ],
)
def test_option_that_would_be_ignored_is_refused(challenge, caplog, words):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    assert validate.main(words) == 1
    assert f"{words[-1].partition('=')[0]} would be ignored" in caplog.text


@pytest.fixture
def copied_run(run_dir, tmp_path):
    """Path of a copy of the checkpoint, beside which another split can be written."""
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "best_model.pth"
    save_checkpoint(path, replace(load_checkpoint(path), seen={}))  # which would contradict it
    return path


def test_undefined_metrics_are_empty_in_the_table(copied_run, processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    split = {"train": uids[2:], "validation": [uids[0], uids[1]]}
    (copied_run.parent / "split.json").write_text(json.dumps(split))
    validator = Validator(processed_dir, copied_run, tmp_path / "out", "cpu")
    validator.inferencer.predictor.model = Nothing()
    validator.run_validation()
    lines = (tmp_path / "out" / "validation_results.csv").read_text().splitlines()
    assert lines[1].split(",")[2:6] == ["0.0", "0.0", "", "0.0"]  # a missed nodule: dice, sensitivity, -, recall
    assert lines[2].split(",")[2:6] == ["", "", "", ""]  # no nodule


def test_validation_with_everything_undefined_still_writes_its_picture(copied_run, processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    (copied_run.parent / "split.json").write_text(json.dumps({"train": uids[2:], "validation": [uids[1]]}))
    validator = Validator(processed_dir, copied_run, tmp_path / "out", "cpu")
    validator.inferencer.predictor.model = Nothing()
    assert math.isnan(validator.run_validation().dice)
    assert (tmp_path / "out" / "metrics_distribution.png").is_file()


def test_folder_with_training_scans_alone_cannot_be_validated(copied_run, processed_dir, tmp_path):
    split = {"train": read_processed_list(processed_dir), "validation": ["1.2.3"]}
    (copied_run.parent / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match="are all training scans, which are never scored; name a data_dir with others"):
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


# ------------------------------------------------------------------------------------------------- folds, new scans


def table_of(folder):
    table = pd.read_csv(folder / "validation_results.csv", dtype={"seriesuid": str})
    return dict(zip(table["seriesuid"], table["part"], strict=True))


def test_fold_scores_exactly_the_scans_that_were_held_out(fold_run, processed_dir, tmp_path, capsys):
    path = fold_run / "checkpoints" / "best_model.pth"
    arguments = {"data_dir": processed_dir, "checkpoint_path": path, "output_dir": tmp_path, "device": "cpu", "fold": 2}
    assert validate.main([f"--{name}={value}" for name, value in arguments.items()]) == 0
    assert table_of(tmp_path) == {read_processed_list(processed_dir)[2]: "test"}
    assert "1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("fold", [0, 1])
def test_fold_that_was_not_held_out_is_refused(fold_run, processed_dir, tmp_path, fold):
    validator = Validator(processed_dir, fold_run / "checkpoints" / "best_model.pth", tmp_path, "cpu")
    with pytest.raises(ValueError, match=f"was trained with fold 2 held out, not fold {fold}"):
        validator.run_validation(fold=fold)


def test_fold_of_a_training_without_one_is_refused(run_dir, processed_dir, tmp_path):
    validator = Validator(processed_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path, "cpu")
    with pytest.raises(ValueError, match="was trained with no fold held out, not fold 2"):
        validator.run_validation(fold=2)


def test_validation_scans_of_a_fold_are_scored_by_default(fold_run, processed_dir, tmp_path):
    path = fold_run / "checkpoints" / "best_model.pth"
    validator = Validator(processed_dir, path, tmp_path, "cpu")
    validator.inferencer.predictor.model = Nothing()
    validator.run_validation()
    assert table_of(tmp_path) == dict.fromkeys(
        json.loads((path.parent / "split.json").read_text())["validation"], "validation"
    )


def test_new_scans_are_scored_without_those_of_the_training(copied_run, processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    split = {"train": uids[:1], "validation": uids[1:2], "test": [], "fold": None}
    (copied_run.parent / "split.json").write_text(json.dumps(split))
    validator = Validator(processed_dir, copied_run, tmp_path / "out", "cpu")
    validator.inferencer.predictor.model, validator.inferencer.seen = Nothing(), {}
    validator.run_validation("new")
    assert table_of(tmp_path / "out") == dict.fromkeys(uids[2:], "new")


# ----------------------------------------------------------------------------------------------- FROC of a checkpoint


class KnowsAndErrs(nn.Module):
    """Finds the nodules of one mask (z, y, x) and, more surely, a block in the corner of the grid."""

    def __init__(self, mask):
        super().__init__()
        self.logits = 11.0 * torch.from_numpy(np.array(mask, np.float32)) - 10
        self.logits[0:6, 0:6, 0:6] = 10

    def forward(self, image):
        return self.logits.expand_as(image)


@pytest.fixture(scope="module")
def erring_run(run_dir, processed_dir, tmp_path_factory):
    """Validates scan 2 with KnowsAndErrs: a function of the path of the excluded findings -> (folder, result)."""
    folder = tmp_path_factory.mktemp("erring")
    shutil.copytree(run_dir / "checkpoints", folder / "checkpoints")
    uids = read_processed_list(processed_dir)
    split = {"train": uids[:2], "validation": uids[2:3], "test": [], "fold": None}
    (folder / "checkpoints" / "split.json").write_text(json.dumps(split))

    def run(excluded_path):
        output_dir = folder / f"out{len(list(folder.iterdir()))}"
        path = folder / "checkpoints" / "best_model.pth"
        validator = Validator(processed_dir, path, output_dir, "cpu", mixed_precision=False)
        validator.inferencer.seen = {}  # which would contradict the split
        validator.inferencer.predictor.model = KnowsAndErrs(read_processed(processed_dir, uids[2]).mask)
        return output_dir, validator.run_validation(excluded_path=excluded_path)

    return run


class Dim(nn.Module):
    """Gives all of one mask (z, y, x) a probability of 0.35, and its rim as much again around it one of 0.25."""

    def __init__(self, mask):
        super().__init__()
        mask = np.asarray(mask) > 0
        probability = np.where(mask, 0.35, np.where(ndimage.binary_dilation(mask), 0.25, 0.01)).astype(np.float32)
        self.logits = torch.logit(torch.from_numpy(probability))

    def forward(self, image):
        return self.logits.expand_as(image)


@pytest.fixture
def dim(run_dir, processed_dir, tmp_path):
    """A validator of scan 2 alone, whose network is Dim."""
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    uids = read_processed_list(processed_dir)
    split = {"train": uids[:2], "validation": uids[2:3], "test": [], "fold": None}
    (tmp_path / "checkpoints" / "split.json").write_text(json.dumps(split))

    def make(name="best_model.pth", **options):
        path = tmp_path / "checkpoints" / name
        validator = Validator(processed_dir, path, tmp_path / "out", "cpu", mixed_precision=False, **options)
        validator.inferencer.seen = {}
        validator.inferencer.predictor.model = Dim(read_processed(processed_dir, uids[2]).mask)
        return validator

    return make


def test_tuned_checkpoint_finds_what_the_old_one_missed(dim, tmp_path):
    assert dim().run_validation().summary["nodules_found"] == 0
    table = dim().tune(tmp_path / "checkpoints" / "tuned.pth")
    assert table.loc[table["chosen"], "threshold"].tolist() == [0.3]
    assert table["dice"][1] == 1 and 0 < table["dice"][0] < 1 and table["dice"][2:].tolist() == [0] * 8
    cleanings = ["conditional random field", "nodules of 4 mm and more", "nodules in the lungs"]
    assert table["cleaning"].tolist() == ["none"] * 7 + cleanings  # a ball of 2 mm is less than a voxel
    old, new = (load_checkpoint(tmp_path / "checkpoints" / name) for name in ("best_model.pth", "tuned.pth"))
    assert new.inference == replace(old.inference, threshold=0.3, min_score=table["min_score"][1])
    assert new.training == old.training and all(map(torch.equal, new.weights.values(), old.weights.values()))
    result = dim("tuned.pth", overwrite=True).run_validation()
    assert result.summary["dice"]["mean"] == 1 and result.summary["chosen_on_these_scans"]


def test_tuning_scores_nothing(dim, tmp_path):
    dim().tune(tmp_path / "checkpoints" / "tuned.pth")
    assert not (tmp_path / "out").exists()


def test_tuning_keeps_the_threshold_where_others_are_no_better(dim, processed_dir, tmp_path):
    validator = dim()
    validator.inferencer.predictor.model = Oracle(
        read_processed(processed_dir, read_processed_list(processed_dir)[2]).mask
    )
    table = validator.tune(tmp_path / "checkpoints" / "tuned.pth")
    chosen = table[table["chosen"]]
    assert table["dice"][:7].tolist() == [1] * 7
    assert (chosen["threshold"].tolist(), chosen["cleaning"].tolist()) == ([0.5], ["none"])


def test_tuning_that_finds_nothing_writes_nothing(dim, tmp_path):
    validator = dim()
    validator.inferencer.predictor.model = Nothing()
    with pytest.raises(InputError, match="no nodule of the validation scans is found by any choice"):
        validator.tune(tmp_path / "checkpoints" / "tuned.pth")
    assert not (tmp_path / "checkpoints" / "tuned.pth").exists()


@pytest.mark.parametrize(
    "name", ["elsewhere/tuned.pth", "checkpoints/tuned", "tuned.pth", "checkpoints/best_model.pth"]
)
def test_tuned_checkpoint_has_a_name_of_its_own_beside_the_split(dim, tmp_path, name):
    before = (tmp_path / "checkpoints" / "best_model.pth").read_bytes()
    with pytest.raises(InputError, match=r"must name a file in .*checkpoints that is called tuned\.pth or"):
        dim(overwrite=True).tune(tmp_path / name)
    assert (tmp_path / "checkpoints" / "best_model.pth").read_bytes() == before


def test_checkpoint_without_a_split_is_not_tuned(dim, tmp_path):
    (tmp_path / "checkpoints" / "split.json").unlink()
    with pytest.raises(InputError, match=r"has no split\.json: only the checkpoint of a training can be tuned"):
        dim().tune(tmp_path / "checkpoints" / "tuned.pth")


def test_checkpoint_that_changes_while_it_is_tuned_is_not_mixed_with_the_new_one(dim, tmp_path):
    validator, path = dim(), tmp_path / "checkpoints" / "best_model.pth"
    save_checkpoint(path, replace(load_checkpoint(path), epoch=99))
    with pytest.raises(InputError, match="has changed meanwhile"):
        validator.tune(tmp_path / "checkpoints" / "tuned.pth")
    assert not (tmp_path / "checkpoints" / "tuned.pth").exists()


def test_scan_that_cannot_be_tuned_on_is_told_and_gives_status_1(run_dir, processed_dir, tmp_path, monkeypatch, caplog):
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    words = ["--data_dir", str(processed_dir), "--checkpoint_path", str(tmp_path / "checkpoints" / "best_model.pth")]
    words += ["--device", "cpu", "--tune", str(tmp_path / "checkpoints" / "tuned.pth")]
    monkeypatch.setattr(Validator, "_predict", lambda self, scan: (torch.from_numpy(0.6 * (scan.mask > 0)), math.nan))

    def all_but_one(*arguments, failed, **options):
        failed["a"] = "is damaged"
        return map_scans(*arguments, failed=failed, **options)

    monkeypatch.setattr(validate, "map_scans", all_but_one)
    assert validate.main(words) == 1
    assert "a is left out: is damaged" in caplog.text


def test_tuning_does_not_overwrite_a_file_unasked(dim, tmp_path):
    path = tmp_path / "checkpoints" / "tuned-earlier.pth"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="name another file for tune"):
        dim().tune(path)
    assert path.read_text() == "precious"


def test_tuning_from_the_command_line(run_dir, processed_dir, tmp_path, capsys, monkeypatch):
    shutil.copytree(run_dir / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "tuned.pth"
    words = ["--data_dir", str(processed_dir), "--checkpoint_path", str(path.with_name("best_model.pth"))]
    words += ["--output_dir", str(tmp_path / "out"), "--device", "cpu", "--tune", str(path)]
    assert validate.main([*words, "--min_score", "0.3"]) == 1 and not path.exists()
    monkeypatch.setattr(Validator, "_predict", lambda self, scan: (torch.from_numpy(0.6 * (scan.mask > 0)), math.nan))
    assert validate.main(words) == 0
    assert f"{path} carries a threshold of 0.5" in capsys.readouterr().out
    assert validate.main([*words, "--subset", "all"]) == 1


@pytest.fixture(scope="module")
def erred(erring_run):
    """Scan 2 without excluded findings: (output folder, result)."""
    return erring_run("there is none.csv")


def read_csv(path):
    return pd.read_csv(path, dtype={"seriesuid": str, "fp_per_scan": str})


def test_froc_file_is_the_curve_of_the_candidates_file(erred, processed_dir):
    folder, _ = erred
    uid = read_processed_list(processed_dir)[2]
    curve = froc(read_csv(folder / "candidates.csv"), read_csv(folder / "nodule_results.csv"), None, [uid])
    pd.testing.assert_frame_equal(read_csv(folder / "froc.csv"), curve.table())


def test_froc_of_nodules_behind_one_surer_mistake_by_hand(erred):
    # One scan, so its one false positive is 1 a scan; below that no nodule is found, above it all are.
    table = read_csv(erred[0] / "froc.csv")
    assert table["fp_per_scan"].tolist() == ["0.125", "0.25", "0.5", "1", "2", "4", "8", "cpm"]
    assert table["sensitivity"][:3].tolist() == [0, 0, 0]
    assert table["sensitivity"][4:7].tolist() == [1, 1, 1]


def test_picture_of_the_diameters_is_that_of_the_nodules_file(erred):
    folder, _ = erred
    (axes,) = draw_agreement(read_csv(folder / "nodule_results.csv")).axes
    assert matplotlib.image.imread(folder / "diameters.png").std() > 0.02
    table = read_csv(folder / "nodule_results.csv")
    expected = table[["diameter_mm"]].assign(less=table["found_diameter_mm"] - table["diameter_mm"])
    np.testing.assert_allclose(axes.collections[1].get_offsets(), expected)


def test_picture_of_the_froc_opens(erred):
    assert matplotlib.image.imread(erred[0] / "froc.png").std() > 0.05


def test_candidates_and_nodules_have_a_row_each(erred, processed_dir):
    folder, result = erred
    nodules = scan_of(processed_dir, 2).metadata.nodules
    table = read_csv(folder / "nodule_results.csv")
    assert table["diameter_mm"].tolist() == [nodule.diameter_mm for nodule in nodules]
    assert table["dice"].tolist() == [1.0] * len(nodules)
    volumes = [nodule.voxels * scan_of(processed_dir, 2).geometry.voxel_volume_mm3 for nodule in nodules]
    np.testing.assert_allclose(table["grid_diameter_mm"], [(6 * volume / np.pi) ** (1 / 3) for volume in volumes])
    np.testing.assert_allclose(table["found_diameter_mm"], table["grid_diameter_mm"])  # the network finds the true mask
    assert list(read_csv(folder / "candidates.csv")) == ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    assert len(result.candidates) == len(nodules) + 1


def test_summary_has_the_cpm_and_the_table_by_size(erred, processed_dir):
    folder, _ = erred
    summary = json.loads((folder / "validation_summary.json").read_text())
    assert summary["cpm"]["value"] == read_csv(folder / "froc.csv")["sensitivity"].iloc[-1]
    assert sum(size["nodules"] for size in summary["by_size"]) == len(scan_of(processed_dir, 2).metadata.nodules)
    assert {size["found"] for size in summary["by_size"]} == {1.0}


def test_missing_excluded_file_warns_that_such_marks_count(erring_run, caplog):
    erring_run("there is none.csv")
    assert "there is none.csv does not exist: marks on excluded findings count as false positives" in caplog.text


def test_mark_on_an_excluded_finding_does_not_count(erring_run, erred, tmp_path, caplog):
    marks = read_csv(erred[0] / "candidates.csv")
    surest = marks.loc[[marks["probability"].idxmax()]]
    surest.assign(diameter_mm=-1.0).drop(columns="probability").to_csv(tmp_path / "excluded.csv", index=False)
    folder, _ = erring_run(tmp_path / "excluded.csv")
    assert read_csv(folder / "froc.csv")["sensitivity"].tolist() == [1.0] * 8
    assert "excluded findings" not in caplog.text


def test_faint_candidate_is_marked_but_not_in_the_mask(live, processed_dir):
    class Faint(nn.Module):
        def forward(self, image):
            logits = torch.full_like(image, -10)
            logits[..., 10:14, 20:24, 20:24] = -1  # p = 0.27
            return logits

    result = live(Faint(), [1]).run_validation()
    assert len(result.candidates) == 1
    assert result.table[["tp_voxels", "fp_voxels", "false_positive_nodules"]].to_numpy().tolist() == [[0, 0, 0]]


def test_scans_without_nodules_have_no_froc(copied_run, processed_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    (copied_run.parent / "split.json").write_text(json.dumps({"train": uids[2:], "validation": [uids[1]]}))
    validator = Validator(processed_dir, copied_run, tmp_path / "out", "cpu")
    validator.inferencer.predictor.model = Everything()
    result = validator.run_validation()
    assert not (tmp_path / "out" / "froc.csv").exists()
    assert result.summary["by_size"] == []


# --------------------------------------------------------------------------------------------------- anyone's marks

# Five scans, a nodule of 10 mm in a and in b. A mistake in c, less sure than the hit in a and surer than that in b, is
# 0.2 false positives a scan: at 1/8 one nodule of two is found, from 1/4 on both are.
HITS_AND_MISTAKE = [("a", 0.0, 0.9), ("c", 0.0, 0.85), ("b", 0.0, 0.8)]
EXPECTED = [0.5, 1, 1, 1, 1, 1, 1]
HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"


@pytest.fixture
def challenge(tmp_path, monkeypatch):
    """A folder with annotations.csv, excluded.csv and seriesuids.csv, and no checkpoint; marks are to be written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotations.csv").write_text(f"{HEADER}a,0,0,0,10\nb,0,0,0,10\n")
    (tmp_path / "excluded.csv").write_text(HEADER)
    (tmp_path / "seriesuids.csv").write_text("a\nb\nc\nd\ne\n")
    return tmp_path


def write_marks(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    marks_of(*rows).to_csv(path, index=False)


def write_fold(folder, rows, parts):
    """What validate.py leaves of a fold: candidates.csv, and validation_results.csv of {scan: part}."""
    write_marks(folder / "candidates.csv", *rows)
    pd.DataFrame(parts.items(), columns=["seriesuid", "part"]).to_csv(folder / "validation_results.csv", index=False)


def score(predictions, **options):
    options = {"annotations_path": "annotations.csv", "excluded_path": "excluded.csv", "output_dir": "out"} | options
    return score_predictions(str(predictions), **options)


def test_one_file_of_marks_is_scored_over_the_listed_scans(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    curve = score("marks.csv", seriesuids_path="seriesuids.csv")
    assert curve.counts["scans"] == 5
    assert curve.sensitivities.tolist() == EXPECTED


def test_scored_curve_is_written(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    curve = score("marks.csv", seriesuids_path="seriesuids.csv")
    pd.testing.assert_frame_equal(read_csv(challenge / "out" / "froc.csv"), curve.table())
    assert (challenge / "out" / "froc.png").stat().st_size > 1000


def test_excluded_findings_are_no_mistakes(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    (challenge / "excluded.csv").write_text(f"{HEADER}c,0,0,0,-1\n")
    assert score("marks.csv", seriesuids_path="seriesuids.csv").sensitivities.tolist() == [1] * 7


def test_source_of_excluded_findings_is_what_was_read(tmp_path):
    table = pd.DataFrame()
    assert validate._source_of(None, tmp_path) is None
    assert validate._source_of(table, tmp_path / "none.csv") == "noted by preprocess.py"
    (tmp_path / "excluded.csv").touch()
    assert validate._source_of(table, tmp_path / "excluded.csv") == str(tmp_path / "excluded.csv")


def test_missing_excluded_file_warns(challenge, caplog):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    curve = score("marks.csv", seriesuids_path="seriesuids.csv", excluded_path="none.csv")
    assert curve.sensitivities.tolist() == EXPECTED
    assert "none.csv does not exist" in caplog.text


def write_two_folds(folder):
    write_fold(folder / "fold0", HITS_AND_MISTAKE[:2], {"a": "test", "b": "train", "c": "test", "d": "train"})
    write_fold(folder / "fold1", HITS_AND_MISTAKE[2:], {"a": "train", "b": "test", "d": "test", "e": "validation"})


def test_folds_are_joined_over_the_scans_that_each_scored(challenge):
    write_two_folds(challenge)
    curve = score("fold*/candidates.csv")
    assert curve.counts["scans"] == 5  # training rows are left out
    assert curve.sensitivities.tolist() == EXPECTED


@pytest.mark.parametrize("missing", [True, False])
def test_missing_fold_is_told(challenge, caplog, missing):
    write_two_folds(challenge)
    score("fold0/candidates.csv" if missing else "fold*/candidates.csv")
    assert ("scans with nodules of annotations.csv were not searched" in caplog.text) == missing


def test_pattern_may_be_absolute(challenge):
    write_two_folds(challenge)
    assert score(challenge / "fold*" / "candidates.csv").sensitivities.tolist() == EXPECTED


def test_one_fold_takes_the_scans_of_its_own_validation(challenge):
    write_two_folds(challenge)
    assert score("fold0/candidates.csv").counts["scans"] == 2


def test_scores_of_a_network_are_not_replaced_by_those_of_other_marks(challenge):
    write_two_folds(challenge)
    with pytest.raises(FileExistsError, match="fold0 holds the scores of a network"):
        score("fold*/candidates.csv", output_dir="fold0")
    assert not (challenge / "fold0" / "froc.csv").exists()


def test_own_marks_are_scored_again_beside_the_scores_of_their_network(challenge):
    write_two_folds(challenge)
    score("fold0/candidates.csv", output_dir="fold0")
    assert (challenge / "fold0" / "froc.csv").is_file()


def test_marks_of_one_scan_in_two_files_are_refused(challenge):
    write_two_folds(challenge)
    write_marks(challenge / "fold1" / "candidates.csv", *HITS_AND_MISTAKE[1:])
    with pytest.raises(ValueError, match="two files have marks in the scan c; each fold must be there once"):
        score("fold*/candidates.csv")


def test_scan_that_two_files_scored_is_refused(challenge):
    write_two_folds(challenge)
    write_fold(challenge / "fold1", HITS_AND_MISTAKE[2:], {"a": "test", "b": "test"})
    with pytest.raises(ValueError, match="two files have a result for the scan a"):
        score("fold*/candidates.csv")


@pytest.mark.parametrize("name", ["marks.csv", "fold*/candidates.csv"])
def test_missing_file_of_marks_is_an_error(challenge, name):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        score(name, seriesuids_path="seriesuids.csv")


def test_marks_without_the_scans_that_were_searched_are_an_error(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    with pytest.raises(FileNotFoundError, match="name the scans that were searched by seriesuids_path"):
        score("marks.csv")


def test_missing_list_of_scans_is_an_error(challenge):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        score("marks.csv", seriesuids_path="none.csv")


def test_marks_without_a_column_are_refused(challenge):
    (challenge / "marks.csv").write_text(HEADER)
    with pytest.raises(ValueError, match="missing: probability"):
        score("marks.csv", seriesuids_path="seriesuids.csv")


def challenge_words(predictions):
    paths = {"annotations_path": "annotations.csv", "excluded_path": "excluded.csv", "output_dir": "out"}
    paths |= {"seriesuids_path": "seriesuids.csv", "predictions": predictions}
    return [word for name, path in paths.items() for word in (f"--{name}", path)]


def test_command_line_scores_marks_without_a_checkpoint(challenge, capsys):
    write_marks(challenge / "marks.csv", *HITS_AND_MISTAKE)
    assert validate.main(challenge_words("marks.csv")) == 0
    text = capsys.readouterr().out
    assert [line.split()[:2] for line in text.splitlines() if line.split()[0] in ("0.125", "cpm")] == [
        ["0.125", "0.500000"],
        ["cpm", "0.928571"],  # (0.5 + 6) / 7
    ]
    assert (challenge / "out" / "froc.csv").is_file()


def test_command_line_without_the_marks_ends_with_status_1(challenge, caplog):
    assert validate.main(challenge_words("none.csv")) == 1
    assert "no file matches none.csv" in caplog.text


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


# ------------------------------------------------------------------- several folders, seen scans, excluded findings


def test_scans_of_two_folders_are_scored_as_those_of_one(two_folders, processed_dir, run_dir, tmp_path):
    results = []
    for name, data_dir in (("one", processed_dir), ("two", two_folders)):
        validator = Validator(data_dir, run_dir / "checkpoints" / "best_model.pth", tmp_path / name, "cpu")
        results.append(validator.run_validation("all", excluded_path="none").table)
    pd.testing.assert_frame_equal(*results)
    provenance = json.loads((tmp_path / "two" / "validation.json").read_text())
    assert provenance["data_dir"] == [str(folder.resolve()) for folder in two_folders]


def copy_without_split(run_dir, folder, **changes):
    """A checkpoint alone, as it is handed on."""
    checkpoint = load_checkpoint(run_dir / "checkpoints" / "best_model.pth")
    folder.mkdir()
    save_checkpoint(folder / "model.pth", replace(checkpoint, **changes))
    return folder / "model.pth"


def test_scans_that_a_handed_on_checkpoint_has_seen_are_left_out(processed_dir, run_dir, tmp_path):
    uids = read_processed_list(processed_dir)
    path = copy_without_split(run_dir, tmp_path / "given", seen={uids[0]: (None, "train"), uids[1]: ("P", "earlier")})
    table = Validator(processed_dir, path, tmp_path / "all", "cpu").run_validation("all", excluded_path="none").table
    assert dict(zip(table["seriesuid"], table["part"], strict=True)) == {
        uids[0]: "seen in training",
        uids[1]: "seen in training",
        uids[2]: "new",
        uids[3]: "new",
    }
    assert table["dice_without_excluded"].isna()[:2].all()
    result = Validator(processed_dir, path, tmp_path / "new", "cpu").run_validation("new", excluded_path="none")
    assert result.table["part"].tolist() == ["seen in training"] * 2 + ["new"] * 2
    assert result.summary["training_scans_left_out"] == 2
    with pytest.raises(FileNotFoundError, match=r"keep split\.json"):
        Validator(processed_dir, path, tmp_path / "validation", "cpu").run_validation()


def test_scan_of_a_patient_that_was_seen_is_left_out(processed_dir, run_dir, tmp_path):
    shutil.copytree(processed_dir, tmp_path / "data")
    uids = read_processed_list(processed_dir)
    write_metadata(tmp_path / "data", replace(read_metadata(processed_dir, uids[2]), patient="P"))
    path = copy_without_split(run_dir, tmp_path / "given", seen={"another": ("P", "train")})
    table = (
        Validator(tmp_path / "data", path, tmp_path / "all", "cpu").run_validation("all", excluded_path="none").table
    )
    assert table["part"].tolist() == ["new", "new", "seen in training", "new"]


def test_findings_that_preprocessing_excluded_count_neither_way(copied_run, processed_dir, tmp_path, caplog):
    shutil.copytree(processed_dir, tmp_path / "data")
    uids = read_processed_list(processed_dir)
    (copied_run.parent / "split.json").write_text(json.dumps({"train": uids[:2], "validation": uids[2:3]}))
    scan = read_processed(processed_dir, uids[2])
    wrong = KnowsAndErrs(scan.mask)
    results = {}
    for name, path in (
        ("without", tmp_path / "none.csv"),
        ("with", tmp_path / "none.csv"),
        ("both", tmp_path / "of.csv"),
    ):
        if name == "with":
            marks = results["without"].candidates
            places = marks.loc[[marks["probability"].idxmax()], list(POSITION_COLUMNS)].to_numpy()
            metadata = replace(scan.metadata, excluded=((*places[0].tolist(), -1.0),))
            write_metadata(tmp_path / "data", metadata)
            (tmp_path / "of.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\nanother,1,2,3,4\n")
            caplog.clear()
        validator = Validator(tmp_path / "data", copied_run, tmp_path / name, "cpu", mixed_precision=False)
        validator.inferencer.predictor.model = wrong
        results[name] = validator.run_validation(excluded_path=path)
    found = {name: result.summary["on_excluded_findings"] for name, result in results.items()}
    assert found == {"without": 0, "with": 1, "both": 1}
    assert [results[name].summary["cpm"]["value"] < 1 for name in results] == [True, False, False]
    assert "count as false positives" not in caplog.text
    assert "none.csv does not exist: only findings that preprocess.py noted are excluded" in caplog.text


def test_checkpoint_that_knows_nothing_of_its_scans_scores_none(processed_dir, run_dir, tmp_path):
    path = copy_without_split(run_dir, tmp_path / "given", seen={})
    with pytest.raises(InputError, match="does not say what it learnt from; keep its split"):
        Validator(processed_dir, path, tmp_path / "all", "cpu").run_validation("all")


def test_held_out_scan_that_taught_the_initial_weights_is_not_scored(processed_dir, run_dir, copied_run, tmp_path):
    checkpoint = load_checkpoint(copied_run)
    split = read_split(copied_run.with_name("split.json"))
    seen = checkpoint.seen | {split.validation[0]: (None, "earlier")}
    save_checkpoint(copied_run, replace(checkpoint, seen=seen))
    with pytest.raises(InputError, match=r"the validation scans .* are all training scans"):
        Validator(processed_dir, copied_run, tmp_path / "out", "cpu").run_validation()


def test_score_is_chosen_without_what_lies_on_findings_that_preprocessing_excluded():
    grid = Geometry((20, 20, 20), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mask, probability = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.float32)
    mask[2:7, 2:7, 2:7], probability[2:7, 2:7, 2:7], probability[12:17, 12:17, 12:17] = 1, 0.9, 0.95
    nodule = AnnotatedNodule((4.0, 4.0, 4.0), (4.0, 4.0, 4.0), 6.2, 125)
    scans = {}
    for name, excluded in (("with", ((14.0, 14.0, 14.0, 6.0),)), ("without", ())):
        metadata = replace(metadata_of(nodule, shape_zyx=(20, 20, 20)), excluded=excluded)
        scan = ProcessedScan("a", probability, mask, metadata)
        rows = [("a", *finding) for finding in excluded]
        table = pd.DataFrame(rows, columns=["seriesuid", *POSITION_COLUMNS, "diameter_mm"])
        scans[name] = ExaminedScan.of(scan, find_candidates(probability, grid, 0.5), excluded=table)
    assert (scans["with"].dice_without_excluded(0.1), scans["without"].dice_without_excluded(0.1)) == (1.0, 2 / 3)
    assert scans["with"].row(0.1)["on_excluded_findings"] == 1


def test_results_of_handed_on_weights_say_what_these_are(processed_dir, run_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    given = {"about": "phantoms alone; no medical device", "seen": {"another": (None, "train")}}
    path = copy_without_split(run_dir, tmp_path / "given", **given)
    inferencer = NoduleInferencer(path, tmp_path / "inference", "cpu")
    inferencer.infer_dataset(processed_dir, "new")
    Validator(processed_dir, path, tmp_path / "all", "cpu").run_validation("all", excluded_path="none")
    for name in ("inference/inference_summary.json", "inference/inference.json", "all/validation_summary.json"):
        assert json.loads((tmp_path / name).read_text())["about"] == "phantoms alone; no medical device"
    assert "model.pth: phantoms alone; no medical device" in caplog.text
