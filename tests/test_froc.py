"""LUNA16's FROC on marks one can count by hand; a nodule of 10 mm at the world's origin unless said otherwise."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from validate import FP_PER_SCAN, FROC, draw_froc, froc

REFERENCE = Path(__file__).resolve().parents[1].parent / "shared" / "luna16" / "reference"
FAR = 500.0


def points(value: str, *rows: tuple) -> pd.DataFrame:
    """Rows (seriesuid, x, value) with y = z = 0."""
    table = pd.DataFrame(rows, columns=["seriesuid", "coordX", value])
    return table.assign(coordY=0.0, coordZ=0.0)


def marks(*rows: tuple) -> pd.DataFrame:
    return points("probability", *rows)


def findings(*rows: tuple) -> pd.DataFrame:
    return points("diameter_mm", *rows)


def score(predictions: pd.DataFrame, *args: object, **kwargs: object) -> FROC:
    """``froc`` with one nodule in scan a of the list [a], unless told otherwise, and without bootstraps."""
    annotations = kwargs.pop("annotations", findings(("a", 0.0, 10.0)))
    kwargs = {"seriesuids": ["a"], "num_bootstraps": 0, **kwargs}
    return froc(predictions, annotations, *args, **kwargs)  # type: ignore[arg-type]


def tp_fp_fn(result: FROC) -> tuple[int, int, int]:
    return result.counts["tp"], result.counts["fp"], result.counts["fn"]


# ------------------------------------------------------------------------------------------------------------- hits


@pytest.mark.parametrize(("distance_mm", "expected"), [(4.999, (1, 0, 0)), (5.0, (0, 1, 1))])
def test_hit_is_strictly_within_radius(distance_mm: float, expected: tuple[int, int, int]) -> None:
    assert tp_fp_fn(score(marks(("a", distance_mm, 0.9)))) == expected


def test_distance_is_measured_in_three_dimensions() -> None:
    diagonal = marks(("a", 3.0, 0.9)).assign(coordY=3.0, coordZ=3.0)  # 5.2 mm away
    assert tp_fp_fn(score(diagonal)) == (0, 1, 1)


@pytest.mark.parametrize(("distance_mm", "expected"), [(4.999, (1, 0, 0)), (5.0, (0, 1, 1))])
def test_negative_diameter_is_taken_as_10_mm(distance_mm: float, expected: tuple[int, int, int]) -> None:
    assert tp_fp_fn(score(marks(("a", distance_mm, 0.9)), annotations=findings(("a", 0.0, -1.0)))) == expected


def test_mark_in_another_scan_is_no_hit() -> None:
    assert tp_fp_fn(score(marks(("b", 0.0, 0.9)), seriesuids=["a", "b"])) == (0, 1, 1)


def test_marks_of_which_none_lies_in_a_listed_scan_are_refused() -> None:
    with pytest.raises(ValueError, match=r"none of the 2 marks .* theirs is 'a\.mhd', the list's 'a'"):
        score(marks(("a.mhd", 0.0, 0.9), ("b.mhd", 0.0, 0.9)))
    assert tp_fp_fn(score(marks())) == (0, 0, 1)  # no marks at all are a result


def test_nodule_listed_twice_counts_once() -> None:
    result = score(marks(("a", 0.0, 0.9)), annotations=findings(("a", 0.0, 10.0), ("a", 0.0, 10.0), ("a", 50.0, 10.0)))
    assert tp_fp_fn(result) == (1, 0, 1)


def test_further_hits_on_a_nodule_are_ignored() -> None:
    result = score(marks(("a", 0.0, 0.9), ("a", 1.0, 0.8), ("a", 2.0, 0.7)))
    assert tp_fp_fn(result) == (1, 0, 0)
    assert result.counts["repeated"] == 2


def test_nodule_keeps_its_most_probable_hit() -> None:
    result = score(marks(("a", 0.0, 0.2), ("a", 4.0, 0.8), ("a", 1.0, 0.5)))
    assert result.nodules["probability"].tolist() == [0.8]


def test_one_mark_can_find_two_overlapping_nodules() -> None:
    assert tp_fp_fn(score(marks(("a", 2.0, 0.9)), annotations=findings(("a", 0.0, 10.0), ("a", 4.0, 10.0)))) == (
        2,
        0,
        0,
    )


def test_mark_on_an_excluded_finding_is_dropped() -> None:
    result = score(marks(("a", FAR, 0.9)), findings(("a", FAR, 6.0)))
    assert tp_fp_fn(result) == (0, 0, 1)
    assert result.counts["on_excluded"] == 1


def test_excluded_finding_of_unknown_size_reaches_5_mm() -> None:
    result = score(marks(("a", FAR + 4.9, 0.9), ("a", FAR + 5.1, 0.9)), findings(("a", FAR, -1.0)))
    assert (result.counts["on_excluded"], result.counts["fp"]) == (1, 1)


def test_nodule_comes_before_an_excluded_finding() -> None:
    result = score(marks(("a", 0.0, 0.9)), findings(("a", 0.0, 20.0)))
    assert tp_fp_fn(result) == (1, 0, 0)
    assert result.counts["on_excluded"] == 0


# ---------------------------------------------------------------------------------------------------- marks and scans


def test_at_most_100_marks_a_scan_the_most_probable_first() -> None:
    crowd = [("a", FAR, 0.5 + i / 1000) for i in range(100)]
    result = score(marks(("a", 0.0, 0.1), *crowd))
    assert tp_fp_fn(result) == (0, 100, 1)
    assert result.counts["over_limit"] == 1


def test_100_marks_all_count() -> None:
    assert tp_fp_fn(score(marks(("a", 0.0, 0.1), *[("a", FAR, 0.5)] * 99))) == (1, 99, 0)


def test_limit_is_per_scan() -> None:
    predictions = marks(("a", FAR, 0.9), ("a", FAR, 0.8), ("b", FAR, 0.2), ("b", FAR, 0.1))
    assert score(predictions, seriesuids=["a", "b"], max_marks=1).thresholds.tolist() == [np.inf, 0.9, 0.2]


def test_marks_that_tie_with_the_first_one_too_many_go() -> None:
    result = score(marks(("a", FAR, 0.9), ("a", FAR, 0.5), ("a", FAR, 0.5)), max_marks=2)
    assert (result.counts["fp"], result.counts["over_limit"]) == (1, 2)


def test_marks_in_unlisted_scans_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = score(marks(("a", 0.0, 0.9), ("b", 0.0, 0.8)))
    assert tp_fp_fn(result) == (1, 0, 0)
    assert result.counts["unlisted"] == 1
    assert "1 of 2 marks" in caplog.text


def test_annotations_in_unlisted_scans_do_not_count() -> None:
    assert score(marks(("a", 0.0, 0.9)), annotations=findings(("a", 0.0, 10.0), ("b", 0.0, 10.0))).sensitivities[0] == 1


def test_without_a_list_the_named_scans_count() -> None:
    result = score(marks(("b", FAR, 0.9)), seriesuids=None)
    assert result.counts["scans"] == 2


@pytest.mark.parametrize("column", ["seriesuid", 0])
def test_seriesuids_may_be_a_table_of_one_column(column: str | int) -> None:
    assert score(marks(("a", 0.0, 0.9)), seriesuids=pd.DataFrame({column: ["a", "b"]})).counts["scans"] == 2


def test_row_labels_and_order_of_the_marks_do_not_matter() -> None:
    table = marks(("b", FAR, 0.4), ("a", 0.0, 0.9), ("b", FAR, 0.8), ("a", FAR, 0.3))
    shuffled = table.iloc[[3, 1, 0, 2]].set_axis([7, 7, 7, 7])
    expected, result = (score(marks_, seriesuids=["a", "b"]) for marks_ in (table, shuffled))
    assert (result.fps.tolist(), result.tps.tolist()) == (expected.fps.tolist(), expected.tps.tolist())


# ---------------------------------------------------------------------------------------------------------- the curve


def test_curve_counts_at_each_distinct_probability() -> None:
    nodules = findings(("a", 0.0, 10.0), ("a", 100.0, 10.0))
    result = score(marks(("a", 0.0, 0.9), ("a", FAR, 0.9), ("a", FAR, 0.7), ("a", 100.0, 0.3)), annotations=nodules)
    assert result.thresholds.tolist() == [np.inf, 0.9, 0.7, 0.3]
    assert result.fps.tolist() == [0, 1, 2, 2]
    assert result.tps.tolist() == [0, 1, 1, 2]


def test_scans_without_nodules_count_in_the_denominator() -> None:
    predictions = marks(("a", FAR, 0.9), ("a", 0.0, 0.8))  # the nodule comes after one false positive
    assert score(predictions).sensitivities.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert score(predictions, seriesuids=list("abcdefgh")).sensitivities.tolist() == [1] * 7  # 1 in 8 scans


def test_sensitivity_is_interpolated_linearly() -> None:
    result = score(marks(("a", 0.0, 0.9), ("a", FAR, 0.9)))  # equal marks: straight from (0, 0) to (1, 1)
    assert result.sensitivities.tolist() == [1 / 8, 1 / 4, 1 / 2, 1, 1, 1, 1]
    assert result.cpm == pytest.approx((1 / 8 + 1 / 4 + 1 / 2 + 4) / 7)


def test_false_positives_per_scan_are_rounded_as_in_the_official_script() -> None:
    """It computes 7 / 25 * 25 / 56, a hair above 1/8, so a nodule found after 7 false positives is late."""
    others = [("a", FAR, 0.9 - i / 100) for i in range(25)]
    result = score(marks(("a", 0.0, 0.835), *others), seriesuids=["a", *map(str, range(55))])
    assert result.sensitivities.tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_missed_nodule_stays_in_the_denominator() -> None:
    result = score(marks(("a", 0.0, 0.9)), annotations=findings(("a", 0.0, 10.0), ("a", 100.0, 10.0)))
    assert result.sensitivities.tolist() == [0.5] * 7
    assert np.isnan(result.nodules["probability"][1])


@pytest.mark.parametrize("predictions", [marks(), pd.DataFrame()])
def test_no_predictions_give_no_sensitivity(predictions: pd.DataFrame) -> None:
    result = score(predictions, num_bootstraps=10)
    assert result.sensitivities.tolist() == [0] * 7
    assert result.cpm == 0
    assert tp_fp_fn(result) == (0, 0, 1)


def test_only_false_positives_give_no_sensitivity() -> None:
    assert score(marks(("a", FAR, 0.9))).cpm == 0


def test_cpm_of_some_nodules_keeps_the_false_positives() -> None:
    nodules = findings(("a", 0.0, 4.0), ("a", 100.0, 10.0), ("a", 200.0, 4.0))
    result = score(marks(("a", 100.0, 0.9), ("a", FAR, 0.8), ("a", 0.0, 0.7)), annotations=nodules)
    assert result.cpm_of(result.nodules["diameter_mm"] > 5) == 1
    assert result.cpm_of(result.nodules["diameter_mm"] < 5) == pytest.approx(0.5 * 4 / 7)  # one of two, from 1 FP on
    assert result.cpm_of(np.ones(3, bool)) == pytest.approx(result.cpm)


# ---------------------------------------------------------------------------------------------------------- bootstraps


def test_interval_follows_the_scans_drawn() -> None:
    """A nodule is found in scan a and one is missed in b, so that a sample has sensitivity 1, 1/2 or 0."""
    nodules = findings(("a", 0.0, 10.0), ("b", 0.0, 10.0))
    result = score(marks(("a", 0.0, 0.9)), annotations=nodules, seriesuids=["a", "b"], num_bootstraps=400)
    assert result.intervals.tolist() == [[0, 1]] * 8
    assert result.band["mean"].between(0.4, 0.6).all()


def test_interval_takes_the_official_ranks() -> None:
    """Of 40 sorted samples the second and the last; 100 of 200 scans have their nodule found."""
    uids = [f"{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    shares = sorted(float(np.mean(rng.integers(200, size=200) < 100)) for _ in range(40))
    assert shares[0] < shares[1] < shares[2] < shares[38] < shares[39]
    nodules = findings(*[(uid, 0.0, 10.0) for uid in uids])
    result = froc(marks(*[(uid, 0.0, 0.9) for uid in uids[:100]]), nodules, None, uids, num_bootstraps=40, seed=0)
    assert result.intervals[0] == pytest.approx([shares[1], shares[39]])


def test_samples_without_a_nodule_are_left_out() -> None:
    found, both = marks(("a", 0.0, 0.9), ("b", 0.0, 0.9)), findings(("a", 0.0, 10.0), ("b", 0.0, 10.0))
    result = score(found, annotations=both, seriesuids=["a", "b", "c", "d"], num_bootstraps=100)
    assert result.intervals.tolist() == [[1, 1]] * 8 and len(result.cpm_draws) < 100


def test_weighted_scans_equal_repeated_scans() -> None:
    """A sample's curve is that of a list in which the drawn scans really stand several times."""
    rng = np.random.default_rng(1)
    uids = np.array(list("abcde"))
    predictions = marks(
        *zip(rng.choice(uids, 60), rng.choice([0.0, 100.0, FAR], 60), rng.random(60).round(1), strict=True)
    )
    nodules = findings(*[(uid, x, 10.0) for uid in "abc" for x in (0.0, 100.0)])
    drawn = np.random.default_rng(7).integers(5, size=5)

    def repeat(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table[table["seriesuid"] == uids[j]].assign(seriesuid=f"{i}") for i, j in enumerate(drawn)])

    sample = froc(predictions, nodules, None, uids, num_bootstraps=1, seed=7)
    repeated = froc(repeat(predictions), repeat(nodules), None, list("01234"), num_bootstraps=0)
    assert sample.intervals[:-1, 0] == pytest.approx(repeated.sensitivities)


def test_interval_is_the_same_for_the_same_seed() -> None:
    predictions, nodules = marks(("a", 0.0, 0.9), ("c", FAR, 0.5)), findings(("a", 0.0, 10.0), ("b", 0.0, 10.0))
    first, second = (froc(predictions, nodules, None, list("abc"), num_bootstraps=50, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first.band, second.band)


def test_draws_of_two_results_are_paired() -> None:
    """Either result finds the nodule of one of two scans, so that on each draw they find all nodules together."""
    nodules = findings(("a", 0.0, 10.0), ("b", 0.0, 10.0))
    one, two = (froc(marks((uid, 0.0, 0.9)), nodules, None, list("ab"), num_bootstraps=50) for uid in "ab")
    assert one.cpm_draws + two.cpm_draws == pytest.approx(np.ones(50))
    assert set(one.cpm_draws) == {0.0, 0.5, 1.0}


def test_without_bootstraps_the_interval_is_nan() -> None:
    assert np.isnan(score(marks(("a", 0.0, 0.9))).intervals).all()


def test_nodules_in_a_single_scan_have_no_interval() -> None:
    found = marks(("a", 0.0, 0.9), ("a", FAR, 0.8))
    nodules = findings(("a", 0.0, 10.0), ("a", 2 * FAR, 10.0))
    result = score(found, annotations=nodules, seriesuids=["a", "b"], num_bootstraps=10)
    assert np.isnan(result.intervals).all() and result.band[["lower", "upper"]].isna().all(axis=None)
    assert len(result.cpm_draws) and result.cpm == 0.5


# ------------------------------------------------------------------------------------------------------------- output


def test_table_has_the_seven_points_and_the_cpm() -> None:
    result = score(marks(("a", 0.0, 0.9), ("a", FAR, 0.9)), num_bootstraps=10)
    table = result.table()
    assert list(table.columns) == ["fp_per_scan", "sensitivity", "lower", "upper"]
    assert list(table["fp_per_scan"]) == ["0.125", "0.25", "0.5", "1", "2", "4", "8", "cpm"]
    assert list(table["sensitivity"]) == [*result.sensitivities, result.cpm]


def test_band_holds_the_operating_points() -> None:
    band = score(marks(("a", 0.0, 0.9), ("a", FAR, 0.9))).band.iloc[::16]
    assert band["fp_per_scan"].tolist() == FP_PER_SCAN.tolist() == [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]


@pytest.mark.parametrize("num_bootstraps", [0, 10])
def test_picture_names_the_cpm(num_bootstraps: int) -> None:
    found, both = marks(("a", 0.0, 0.9), ("b", 0.0, 0.9)), findings(("a", 0.0, 10.0), ("b", 0.0, 10.0))
    result = score(found, annotations=both, seriesuids=["a", "b"], num_bootstraps=num_bootstraps)
    axes = draw_froc(result).axes[0]
    assert axes.get_title().startswith("CPM 1.000")
    assert ("interval" in axes.get_title()) == bool(num_bootstraps)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]


# ------------------------------------------------------------------------------------------------------------- errors


def test_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"predictions must have the columns.*\['probability'\] are missing"):
        score(marks(("a", 0.0, 0.9)).drop(columns="probability"))


@pytest.mark.parametrize("value", [np.nan, np.inf, "abc", None])
@pytest.mark.parametrize("column", ["coordX", "probability"])
def test_value_that_is_no_finite_number(column: str, value: float | str | None) -> None:
    table = marks(("a", 0.0, 0.9), ("a", 1.0, 0.8)).astype(object)
    table.loc[1, column] = value
    with pytest.raises(ValueError, match=r"predictions must have a seriesuid and finite numbers.*1 of 2 rows"):
        score(table)


def test_annotation_without_diameter() -> None:
    with pytest.raises(ValueError, match="annotations must have a seriesuid and finite numbers"):
        score(marks(), annotations=findings(("a", 0.0, np.nan)))


def test_excluded_finding_without_seriesuid() -> None:
    with pytest.raises(ValueError, match="excluded must have a seriesuid"):
        score(marks(), findings((None, 0.0, 5.0)))


def test_repeated_seriesuid() -> None:
    with pytest.raises(ValueError, match=r"none twice.*\['a'\]"):
        score(marks(), seriesuids=["a", "b", "a"])


def test_missing_seriesuid_in_the_list() -> None:
    with pytest.raises(ValueError, match="repeated or missing"):
        score(marks(), seriesuids=["a", None])


def test_empty_list_of_scans() -> None:
    with pytest.raises(ValueError, match="must name some scan"):
        score(marks(), seriesuids=[])


def test_seriesuids_with_several_columns() -> None:
    with pytest.raises(ValueError, match="one column seriesuid"):
        score(marks(), seriesuids=pd.DataFrame({"seriesuid": ["a"], "subset": [0]}))


def test_list_file_whose_first_scan_became_the_heading() -> None:
    with pytest.raises(ValueError, match="header=None"):
        score(marks(), seriesuids=pd.DataFrame({"1.3.6.1": ["a", "b"]}))


def test_no_annotation_in_the_listed_scans() -> None:
    with pytest.raises(ValueError, match="annotation in a listed scan"):
        score(marks(("b", 0.0, 0.9)), seriesuids=["b"])


def test_max_marks_below_1() -> None:
    with pytest.raises(ValueError, match="max_marks"):
        score(marks(), max_marks=0)


@pytest.mark.parametrize("mask", [[True], [False, False], [0, 1]])
def test_nodule_mask_that_does_not_fit(mask: list) -> None:
    result = score(marks(), annotations=findings(("a", 0.0, 10.0), ("a", 100.0, 10.0)))
    with pytest.raises(ValueError, match="nodule_mask"):
        result.cpm_of(mask)


# ------------------------------------------------------------------------------------------------------- known answer


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="LUNA16's reference tables are not beside the repository")
def test_known_answer_of_deeplung() -> None:
    names = ["deeplung_predictions.csv.gz", "annotations.csv", "annotations_excluded.csv.gz"]
    predictions, annotations, excluded = (pd.read_csv(REFERENCE / name) for name in names)
    seriesuids = pd.read_csv(REFERENCE / "seriesuids.csv", header=None)
    result = froc(predictions, annotations, excluded, seriesuids, num_bootstraps=100)
    expected = [0.692243, 0.768971, 0.823777, 0.865093, 0.892917, 0.917369, 0.933390]
    assert result.sensitivities == pytest.approx(expected, abs=5e-7)
    assert result.cpm == pytest.approx(0.841966, abs=5e-7)
    assert tp_fp_fn(result) == (1136, 46078, 50)
    assert (result.intervals[:-1, 0] < expected).all()
    assert (result.intervals[:-1, 1] > expected).all()
