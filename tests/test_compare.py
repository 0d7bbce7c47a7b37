"""Two results of validate.py held against each other."""

import math

import numpy as np
import pandas as pd
import pytest

import validate
from utils import InputError
from validate import ScoredScans, Validator, compare_results, format_comparison

NODULES = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm", "dice", "grid_diameter_mm")


def write_result(folder, dice, scores=None, false=0, first="s00"):
    """A validation of one nodule a scan, found by a mark of a score (None: missed), with false marks beside it."""
    scores = [0.9] * len(dice) if scores is None else scores
    names = [f"{first[0]}{number:02d}" for number in range(len(dice))]
    folder.mkdir(parents=True)
    table = pd.DataFrame({"seriesuid": names, "part": "new", "dice": dice, "nodules": 1})
    table["nodules_found"], table["false_positive_nodules"] = [int(s is not None) for s in scores], false
    table["dice_without_excluded"], table["on_excluded_findings"] = dice, 0
    table.to_csv(folder / "validation_results.csv", index=False)
    rows = [(name, 0.0, 0.0, 0.0, 8.0, value, 8.0) for name, value in zip(names, dice, strict=True)]
    pd.DataFrame(rows, columns=list(NODULES)).to_csv(folder / "nodule_results.csv", index=False)
    marks = [(name, 0.0, 0.0, 0.0, s) for name, s in zip(names, scores, strict=True) if s is not None]
    marks += [(name, 50.0, 0.0, 0.0, 0.5) for name in names for _ in range(false)]
    columns = ["seriesuid", "coordX", "coordY", "coordZ", "probability"]
    pd.DataFrame(marks, columns=columns).to_csv(folder / "candidates.csv", index=False)
    return folder


def row_of(table, figure):
    return table.set_index("figure").loc[figure]


def test_difference_of_each_figure_is_first_less_second(tmp_path):
    first = write_result(tmp_path / "a", [0.8, 0.6, 0.7, 0.9])
    second = write_result(tmp_path / "b", [0.7, 0.5, 0.6, 0.8], [0.9, None, 0.9, 0.9], false=2)
    table = compare_results([first, second])
    assert row_of(table, "Dice per scan")["first"] == pytest.approx(0.75)
    assert row_of(table, "Dice per scan")["difference"] == pytest.approx(0.1)
    assert row_of(table, "sensitivity of the masks")["second"] == pytest.approx(0.75)
    assert row_of(table, validate.FALSE_NODULES)["difference"] == pytest.approx(-2)
    assert row_of(table, "CPM")["first"] == 1


def test_nodules_on_excluded_findings_count_neither_way(tmp_path):
    first, second = (write_result(tmp_path / name, [0.8, 0.6], false=1) for name in "ab")
    table = pd.read_csv(first / "validation_results.csv")
    table = table.assign(on_excluded_findings=1, dice_without_excluded=[0.9, 0.8])
    table.to_csv(first / "validation_results.csv", index=False)
    compared = compare_results([first, second])
    assert row_of(compared, validate.FALSE_NODULES)["difference"] == -1
    second_table = table.assign(false_positive_nodules=2, on_excluded_findings=2)  # as many others as in the first
    second_table.to_csv(second / "validation_results.csv", index=False)
    assert row_of(compare_results([first, second]), validate.FALSE_NODULES)["scans_that_differ"] == 0
    assert row_of(compared, "Dice per scan")["difference"] == 0
    assert row_of(compared, "Dice without excluded findings")["difference"] == pytest.approx(0.15)


def test_result_on_the_scans_that_chose_the_network_is_told(tmp_path, caplog):
    first, second = (write_result(tmp_path / name, [0.8, 0.6]) for name in "ab")
    table = pd.read_csv(first / "validation_results.csv").assign(part="validation")
    table.to_csv(first / "validation_results.csv", index=False)
    compare_results([first, second])
    [record] = [record for record in caplog.records if "chosen on these very scans" in record.message]
    assert str(first) in record.message


def test_interval_is_paired(tmp_path):
    rng = np.random.default_rng(0)
    dice = rng.uniform(0.2, 0.9, 40)  # scans differ widely, the two networks by 0.02 in each
    table = compare_results([write_result(tmp_path / "a", dice + 0.02), write_result(tmp_path / "b", dice)])
    row = row_of(table, "Dice per scan")
    assert (row["lower"], row["upper"]) == pytest.approx((0.02, 0.02))


def test_nothing_is_said_of_scans_without_a_nodule(tmp_path):
    for name in ("a", "b"):
        folder = write_result(tmp_path / name, [math.nan, math.nan], false=1)
        table = pd.read_csv(folder / "validation_results.csv").assign(nodules=0, nodules_found=0)
        table.to_csv(folder / "validation_results.csv", index=False)
        pd.read_csv(folder / "nodule_results.csv")[:0].to_csv(folder / "nodule_results.csv", index=False)
    names = [tmp_path / "a", tmp_path / "b"]
    text = format_comparison(compare_results(names), names)
    figures = "Dice per scan, Dice without excluded findings, sensitivity of the masks"
    assert f"Nothing can be said of {figures}: too few scans" in text
    assert "is better" not in text


def test_cpm_of_a_single_scan_with_nodules_shows_nothing(tmp_path):
    for name, score in (("a", 0.9), ("b", None)):
        folder = write_result(tmp_path / name, [0.8] + [math.nan] * 7, [score] + [None] * 7)
        table = pd.read_csv(folder / "validation_results.csv").assign(nodules=[1] + [0] * 7)
        table.to_csv(folder / "validation_results.csv", index=False)
        pd.read_csv(folder / "nodule_results.csv")[:1].to_csv(folder / "nodule_results.csv", index=False)
    names = [tmp_path / "a", tmp_path / "b"]
    table = compare_results(names)
    assert (row_of(table, "CPM")["difference"], row_of(table, "CPM")["scans_that_differ"]) == (1, 1)
    assert "is better" not in format_comparison(table, names)


def test_nodule_beside_the_prepared_grid_has_no_dice_and_is_compared(tmp_path):
    for name in ("a", "b"):
        path = write_result(tmp_path / name, [0.8, 0.6]) / "nodule_results.csv"
        table = pd.read_csv(path)
        table.loc[0, "dice"] = np.nan
        table.to_csv(path, index=False)
    assert row_of(compare_results([tmp_path / "a", tmp_path / "b"]), "Dice per scan")["difference"] == 0


def test_scans_without_a_dice_are_left_out_of_its_mean(tmp_path):
    first, second = write_result(tmp_path / "a", [0.8, 0.0]), write_result(tmp_path / "b", [0.8, 0.0])
    path = first / "validation_results.csv"  # in the second scan nothing was found, and nothing is there
    pd.read_csv(path).replace({"dice": {0.0: np.nan}}).to_csv(path, index=False)
    assert row_of(compare_results([first, second]), "Dice per scan")["difference"] == pytest.approx(0.4)


def test_rows_may_stand_in_any_order(tmp_path):
    first = write_result(tmp_path / "a", [0.8, 0.6, 0.7])
    second = write_result(tmp_path / "b", [0.8, 0.6, 0.7])
    for name in ("validation_results.csv", "nodule_results.csv"):
        table = pd.read_csv(second / name)
        table[::-1].to_csv(second / name, index=False)
    table = compare_results([first, second])
    assert not table[["difference", "lower", "upper"]].to_numpy().any()


def test_folder_whose_name_is_a_pattern_is_that_folder(tmp_path):
    first, second = write_result(tmp_path / "v[1]", [0.8, 0.6]), write_result(tmp_path / "v1", [0.1, 0.1])
    table = compare_results([first, second])
    assert row_of(table, "Dice per scan")["difference"] == pytest.approx(0.6)


def test_folds_are_joined_by_a_pattern(tmp_path):
    for name in ("a", "b"):
        write_result(tmp_path / name / "fold0", [0.8, 0.6], first="s")
        write_result(tmp_path / name / "fold1", [0.4], first="t")
    table = compare_results([tmp_path / "a" / "fold*", tmp_path / "b" / "fold*"])
    assert row_of(table, "Dice per scan")["first"] == pytest.approx(0.6)


def test_what_is_said_names_the_better_one_and_what_is_not_shown(tmp_path):
    first = write_result(tmp_path / "a", [0.8, 0.6, 0.7, 0.9] * 2)
    second = write_result(tmp_path / "b", [0.7, 0.5, 0.6, 0.8] * 2, false=1)
    text = format_comparison(compare_results([first, second]), ["A", "B"])
    better = f"Dice per scan, Dice without excluded findings, {validate.FALSE_NODULES}"
    assert f"The first is better in {better}" in text
    assert "No difference is shown in sensitivity of the masks" in text
    assert "do not hold how much trainings differ" in text
    swapped = format_comparison(compare_results([second, first]), ["B", "A"])
    assert f"The second is better in {better}" in swapped


@pytest.mark.parametrize("different", [5, 6])
def test_few_scans_that_differ_show_nothing(tmp_path, different):
    dice = np.full(12, 0.6)
    better = dice + 0.1 * (np.arange(12) < different)
    names = [write_result(tmp_path / "a", better), write_result(tmp_path / "b", dice)]
    table = compare_results(names)
    row = row_of(table, "Dice per scan")
    assert row["lower"] > 0 and row["scans_that_differ"] == different
    text = format_comparison(table, names)
    assert ("fewer than 6 scans differ" in text) == (different == 5)
    assert ("The first is better in Dice per scan" in text) == (different == 6)


def test_nothing_can_be_said_of_a_single_scan(tmp_path):
    names = [write_result(tmp_path / "a", [0.8]), write_result(tmp_path / "b", [0.7])]
    assert "is better" not in format_comparison(compare_results(names), names)


def test_interval_of_few_scans_is_wider_than_its_draws(tmp_path):
    dice = np.random.default_rng(0).uniform(0.4, 0.6, (2, 8))
    folders = [write_result(tmp_path / name, values) for name, values in zip("ab", dice, strict=True)]
    row = row_of(compare_results(folders), "Dice per scan")
    first, second = (ScoredScans.read(folder).draws()["Dice per scan"][1:] for folder in folders)
    low, high = np.quantile(first - second, [0.025, 0.975])
    assert 1.1 < (row["upper"] - row["lower"]) / (high - low) < 1.5


def test_other_true_masks_are_told(tmp_path, caplog):
    folders = [write_result(tmp_path / name, [0.8, 0.6]) for name in "ab"]
    for folder, diameter in zip(folders, (8.0, 9.4), strict=True):
        path = folder / "nodule_results.csv"
        pd.read_csv(path).assign(grid_diameter_mm=diameter).to_csv(path, index=False)
    compare_results(folders[:1] * 2)
    assert "other true masks" not in caplog.text
    compare_results(folders)
    assert "other true masks" in caplog.text


def test_other_scans_are_refused(tmp_path):
    first, second = write_result(tmp_path / "a", [0.8, 0.6]), write_result(tmp_path / "b", [0.8])
    with pytest.raises(InputError, match=r"1 scans were scored in .*a alone, such as s01"):
        compare_results([first, second])


@pytest.mark.parametrize(("name", "what"), [("nodule_results.csv", "annotated nodules"), (None, "excluded findings")])
def test_other_annotations_are_refused(tmp_path, name, what):
    first, second = write_result(tmp_path / "a", [0.8, 0.6]), write_result(tmp_path / "b", [0.8, 0.6])
    if name:
        table = pd.read_csv(second / name)
        table.loc[0, "coordX"] = 3.0
        table.to_csv(second / name, index=False)
    else:
        pd.read_csv(first / "nodule_results.csv").to_csv(first / "excluded_findings.csv", index=False)
    with pytest.raises(InputError, match=f"differ in their {what}; score both with the same"):
        compare_results([first, second])


def test_scan_with_two_results_is_refused(tmp_path):
    for name in ("fold0", "fold1"):
        write_result(tmp_path / name, [0.8])
    with pytest.raises(InputError, match="two results of the scan s00"):
        ScoredScans.read(tmp_path / "fold*")


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"):
        ScoredScans.read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"validation_results\.csv"):
        ScoredScans.read(tmp_path / "empty")


def test_training_scans_do_not_count(tmp_path):
    folder = write_result(tmp_path / "a", [0.8, 0.6])
    table = pd.read_csv(folder / "validation_results.csv")
    table.loc[0, "part"] = "train"
    table.to_csv(folder / "validation_results.csv", index=False)
    assert ScoredScans.read(folder).table["seriesuid"].tolist() == ["s01"]


def test_excluded_findings_stand_beside_the_results_and_count_neither_way(run_dir, processed_dir, tmp_path, capsys):
    excluded = pd.DataFrame([("none", 1.0, 2.0, 3.0, -1.0)], columns=list(NODULES[:5]))
    excluded.to_csv(tmp_path / "excluded.csv", index=False)
    for name in ("a", "b"):
        checkpoint = run_dir / "checkpoints" / "best_model.pth"
        validator = Validator(processed_dir, checkpoint, tmp_path / name, "cpu", mixed_precision=False)
        validator.run_validation("all", excluded_path=tmp_path / "excluded.csv")
        assert (tmp_path / name / "excluded_findings.csv").is_file()
    assert validate.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "No difference is shown in" in capsys.readouterr().out


def test_further_options_and_a_single_folder_are_refused(tmp_path, caplog):
    assert validate.main(["--compare", "a", "b", "--subset", "all"]) == 1
    assert "leave them out with compare" in caplog.text
    assert validate.main(["--compare", "a"]) == 1
    assert "compare takes two folders" in caplog.text


def test_results_by_other_diameters_are_refused(tmp_path):
    first, second = (write_result(tmp_path / name, [0.8, 0.6]) for name in "ab")
    path = second / "nodule_results.csv"
    pd.read_csv(path).assign(diameter_mm=5.0).to_csv(path, index=False)
    with pytest.raises(InputError, match="differ in their annotated nodules"):
        compare_results([first, second])


def test_marks_are_scored_with_the_excluded_findings_that_stand_beside_them(tmp_path):
    folder = write_result(tmp_path / "a", [0.8, 0.6], false=1)
    nodules = pd.read_csv(folder / "nodule_results.csv").drop(columns="dice")
    nodules.to_csv(tmp_path / "annotations.csv", index=False)
    nodules.assign(coordX=50.0).to_csv(folder / "excluded_findings.csv", index=False)
    options = {"annotations_path": tmp_path / "annotations.csv", "excluded_path": tmp_path / "none.csv"}
    curve = validate.score_predictions(str(folder / "candidates.csv"), output_dir=tmp_path / "out", **options)
    assert curve.fps.max() == 0  # false marks a scan
