"""The page of a validation: what it says, and what it shows first."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Page
from PIL import Image

import data.validation_page as validation_page
from data.report import ANNOTATED, FOUND, KEY_SIZE
from data.validation_page import Finding, picture_findings, reliability, write_page
from infer import find_candidates
from utils import ProcessedScan, read_metadata, read_processed_list, write_csv
from validate import Validator, froc, summarize

UNIT = 6.0  # mm of a nodule of the toy scan


@pytest.fixture(scope="module")
def validated(run_dir, processed_dir, tmp_path_factory):
    """Folder of a validation of the tiny network, whose score lets everything through."""
    folder = tmp_path_factory.mktemp("validation")
    checkpoint = run_dir / "checkpoints" / "best_model.pth"
    Validator(processed_dir, checkpoint, folder, "cpu", min_score=0.0, mixed_precision=False).run_validation("all")
    return folder


def test_page_says_what_the_summary_says(validated):
    page = Page(validated / "report.html")
    summary = json.loads((validated / "validation_summary.json").read_text())
    assert f"Nodules found: {summary['nodules_found']} of {summary['nodules']}" in page.text
    if np.isfinite(summary["dice"]["mean"]):
        assert f"Dice per scan {summary['dice']['mean']:.3f}" in page.text
    assert summary["checkpoint_sha256"][:16] in page.text
    assert "the figures flatter the network" in page.text  # min_score was chosen on these scans
    assert "left out" in page.text  # scans of the training


def test_page_needs_no_network_and_no_script(validated):
    page = Page(validated / "report.html")
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert not page.all("script")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img"))
    assert not re.search(r"https?://", page.source)


# --------------------------------------------------------------------------------------- what is seen, what comes first


@pytest.fixture
def scan(processed_dir):
    """A processed scan whose two nodules, as blocks, lie at array[8:12, 10:14, 10:14] and [20:24, 30:34, 30:34]."""
    metadata = read_metadata(processed_dir, read_processed_list(processed_dir)[0])
    grid, mask = metadata.grid, np.zeros(metadata.grid.shape_zyx, np.uint8)
    blocks = (slice(8, 12), slice(10, 14), slice(10, 14)), (slice(20, 24), slice(30, 34), slice(30, 34))
    nodules = []
    for block in blocks:
        mask[block] = 1
        index = tuple(float(part.start + 1.5) for part in block)
        nodules.append(
            replace(metadata.nodules[0], center_xyz=tuple(grid.world(index)), index_zyx=index, diameter_mm=20.0)
        )
    image = np.full(mask.shape, 0.3, np.float16)
    image[mask > 0] = 0.9
    return ProcessedScan("toy", image, mask, replace(metadata, nodules=tuple(nodules)))


def found_in(scan, *blocks, min_score=0.0):
    """What is found where these (block, probability) are."""
    probability = np.zeros(scan.mask.shape, np.float32)
    for block, value in blocks:
        probability[block] = value
    return find_candidates(probability, scan.geometry, 0.5).keep(min_score)


FIRST, SECOND = (slice(8, 12), slice(10, 14), slice(10, 14)), (slice(20, 24), slice(30, 34), slice(30, 34))
ELSEWHERE = (slice(20, 24), slice(10, 14), slice(34, 38))


def test_missed_come_first_then_false_marks_then_what_was_found(scan):
    found = found_in(scan, (FIRST, 0.9), (ELSEWHERE, 0.9))
    findings = picture_findings(scan, found, np.zeros(len(found.scores), bool))
    assert [finding.kind for finding in findings] == ["missed", "false", "found"]
    assert findings[0].caption == "Missed: 20.0 mm"
    assert "annotated: 20.0 mm" in findings[2].caption


def test_missed_nodule_tells_of_a_fainter_mark(scan):
    found = found_in(scan, (FIRST, 0.9), (SECOND, 0.3))
    (missed, _) = picture_findings(scan, found, np.zeros(len(found.scores), bool))
    assert re.fullmatch(r"Missed: 20.0 mm; a fainter mark lies there, score 0\.\d\d", missed.caption)


def test_mark_on_an_excluded_finding_is_no_false_one(scan):
    found = found_in(scan, (ELSEWHERE, 0.9))
    on_excluded = np.ones(len(found.scores), bool)
    assert [finding.kind for finding in picture_findings(scan, found, on_excluded)] == ["missed", "missed", "excluded"]


def test_nodule_below_the_score_is_missed_and_its_mark_no_false_one(scan):
    found = found_in(scan, (FIRST, 0.9), min_score=1.0)
    findings = picture_findings(scan, found, np.zeros(len(found.scores), bool))
    assert [finding.kind for finding in findings] == ["missed", "missed"]
    assert "a fainter mark" in findings[0].caption


def test_picture_shows_found_and_annotated(scan):
    found = found_in(scan, ((slice(8, 12), slice(10, 14), slice(11, 15)), 0.9))
    *_, finding = picture_findings(scan, found, np.zeros(len(found.scores), bool))
    picture = Image.open(io.BytesIO(finding.picture))
    assert picture.size == KEY_SIZE
    pixels = np.asarray(picture).astype(int)
    for color in (FOUND, ANNOTATED):
        assert (abs(pixels - color).sum(axis=-1) < 120).sum() > 50


def test_only_the_first_findings_have_pictures(scan, monkeypatch):
    monkeypatch.setattr(validation_page, "MOST_PICTURES", 1)
    findings = picture_findings(scan, found_in(scan), np.zeros(1, bool))
    assert [bool(finding.picture) for finding in findings] == [True, False]


# ------------------------------------------------------------------------------------------------------ score and scans


def curve_of(*marks: tuple[float, bool]):
    """FROC of marks (score, whether it hits a nodule of its own) in one scan."""
    rows = [("a", 100.0 * n, 0.0, 0.0, score) for n, (score, _) in enumerate(marks)]
    predictions = pd.DataFrame(rows, columns=["seriesuid", "coordX", "coordY", "coordZ", "probability"])
    nodules = [("a", 100.0 * n, 0.0, 0.0, UNIT) for n, (_, hit) in enumerate(marks) if hit]
    annotations = pd.DataFrame(nodules, columns=["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"])
    return froc(predictions, annotations, None, ["a"])


def test_reliability_counts_the_nodules_of_each_tenth():
    rows = reliability(curve_of((0.95, True), (0.92, True), (0.91, False), (0.91, False), (0.35, False), (1.0, True)))
    assert [(row["score"], row["marks"]) for row in rows] == [("0.3 to 0.4", 1), ("0.9 to 1.0", 5)]
    assert rows[0]["share"] == 0
    assert rows[1]["share"] == pytest.approx(0.6)
    assert rows[1]["mean_score"] == pytest.approx((0.95 + 0.92 + 0.91 + 0.91 + 1) / 5)


def table_of(*rows: tuple[str, int, int, int, float]) -> pd.DataFrame:
    """Scored scans: name, annotated, found, false marks, Dice."""
    table = pd.DataFrame(rows, columns=["seriesuid", "nodules", "nodules_found", "false_positive_nodules", "dice"])
    voxels = {f"{kind}_voxels": 1 for kind in ("tp", "fp", "fn")}
    metrics = dict.fromkeys(("sensitivity", "precision", "recall", "dice_without_excluded"), table["dice"])
    return table.assign(part="new", on_excluded_findings=0, **voxels, **metrics)


FACTS = {"checkpoint": "a.pth", "checkpoint_sha256": "0" * 64, "threshold": 0.5, "min_score": 0.5, "mirrors": 0}
FACTS |= {"computed_in": "float32"}


def page_of(folder: Path, table: pd.DataFrame, findings=None, failed=None) -> Page:
    write_page(folder, summarize(table) | FACTS, table, findings or {}, None, {}, failed or {})
    return Page(folder / "report.html")


def test_scans_stand_in_the_order_of_what_went_wrong(tmp_path):
    rows = ("good", 1, 1, 0, 0.9), ("poor", 1, 1, 0, 0.4), ("empty", 0, 0, 0, np.nan)
    rows += ("false", 0, 0, 1, 0.0), ("missed", 1, 0, 0, 0.0), ("both", 2, 1, 3, 0.2)
    page = page_of(tmp_path, table_of(*rows))
    order = re.findall(r'class="scan-name">(\w+)<', page.source)
    assert order == ["both", "missed", "false", "poor", "good", "empty"]
    assert page.source.count("<details open>") == 3
    assert "1 missed, 3 false, Dice 0.200, 2 annotated" in page.text


def test_page_of_many_pictures_is_no_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(validation_page, "PAGE_BYTES", 200_000)
    rows = [(f"scan{number}", 1, 0, 0, 0.0) for number in range(100)]
    findings = {name: [Finding("missed", f"Missed in {name}", bytes(9000))] for name, *_ in rows}
    page = page_of(tmp_path, table_of(*rows), findings)
    assert len(page.source) < 280_000
    assert 10 < len(page.all("img")) < 100
    assert page.text.count("Missed in scan") == 100  # those without a picture are named


def test_scan_with_very_many_marks_names_some(tmp_path):
    findings = {"a": [Finding("false", f"False mark {number}", b"") for number in range(1000)]}
    page = page_of(tmp_path, table_of(("a", 0, 0, 1000, 0.0)), findings)
    assert len(page.source) < 30_000
    assert "and 970 more" in page.text


def test_texts_are_escaped_and_failures_are_told(tmp_path):
    page = page_of(tmp_path, table_of(("<i>a</i>", 1, 1, 0, 0.9)), failed={"<b>": "<u>damaged</u>"})
    assert not {"i", "b", "u"} & {tag for tag, _ in page.elements}
    assert "<u>damaged</u>" in page.text
    assert "1 scan could not be scored." in page.text


def test_page_without_a_nodule_is_made_all_the_same(tmp_path):
    page = page_of(tmp_path, table_of(("a", 0, 0, 0, np.nan)))
    assert "no Dice" in page.text
    assert "nan" not in page.text


def test_page_of_an_earlier_run_goes_with_its_results(run_dir, processed_dir, tmp_path):
    write_csv(tmp_path / "validation_results.csv", pd.DataFrame({"a": [1]}))
    (tmp_path / "report.html").write_text("old")
    checkpoint = run_dir / "checkpoints" / "best_model.pth"
    Validator(processed_dir, checkpoint, tmp_path, "cpu", overwrite=True, mixed_precision=False).run_validation(
        "validation"
    )
    assert (tmp_path / "report.html").read_text() != "old"
