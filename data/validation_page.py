"""The page of a validation: what the scores are and what they hide, and the scans where most went wrong."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from data.report import (
    FOUND,
    KEY_SIZE,
    crop_around,
    data_uri,
    facts_of,
    hide_folders,
    jpeg,
    key_picture,
    reach_mm,
    render,
)
from infer import hits_of
from preprocess import Preprocessing
from utils import Nodule, ProcessedScan, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from infer import Segmentation
    from validate import FROC

MOST_PICTURES = 8  # of a scan
MOST_OTHERS = 30  # findings of a scan that are named without a picture
ROW_BYTES = 800  # of the markup of a scan
PAGE_BYTES = 14_000_000
FEW = 20  # nodules or scans, below which figures say little
FEWEST_IN_BAND = 5  # differences of diameters, of which limits are shown
MOST_OPEN = 3  # scans whose pictures are seen at once
BINS = 10
DICE_KINDS = {  # of the summary, beside the mean of all scans
    "dice_without_excluded": "Dice per scan, predicted nodules on excluded findings ignored",
    "dice_of_scans_with_nodules": "Dice per scan, scans with nodules alone",
    "dice_pooled": "Dice pooled over all voxels of all scans",
}
CHOSEN_HERE = (
    "The training chose its best epoch and min_score on these validation scans, so the figures flatter the network; a "
    "held-out fold (train.py --validation.fold) or new scans (--subset new) give fair ones."
)
METRIC_NAMES = {"dice": "Dice", "precision": "Precision", "sensitivity": "Sensitivity (recall)"}


@dataclass(frozen=True)
class Finding:
    """A nodule of a scan, found or annotated, and its picture.

    Args:
        kind: 'missed', 'false', 'excluded' or 'found'.
        caption: What it is.
        picture: JPEG; b"" of those beyond MOST_PICTURES.
    """

    kind: str
    caption: str
    picture: bytes


def picture_findings(scan: ProcessedScan, found: Segmentation, on_excluded: np.ndarray) -> list[Finding]:
    """What was missed, false marks and what was found, in this order; the first MOST_PICTURES with pictures.

    Args:
        scan: The scan and its annotation.
        found: What stays in the mask, and fainter marks.
        on_excluded: (n + 1,) whether a label's nodule lies on an excluded finding.
    """
    annotated, nodules = scan.metadata.nodules, found.nodules
    numbers = [number for number in found.numbers if number]
    hits = hits_of(nodules, annotated)
    faint = found.faint
    near = hits_of(faint, annotated)
    findings: list[tuple[str, str, Nodule]] = []
    for index, truth in enumerate(annotated):
        if not hits[:, index].any():
            marks = [mark for mark, is_near in zip(faint, near[:, index], strict=True) if is_near]
            more = f"; a fainter mark lies there, score {max(m.score for m in marks):.2f}" if marks else ""
            findings.append(("missed", f"Missed: {truth.diameter_mm:.1f} mm{more}", truth))
    kinds = [
        "found" if hit.any() else "excluded" if on_excluded[number] else "false"
        for hit, number in zip(hits, numbers, strict=True)
    ]
    words = {"false": "False mark", "excluded": "On an excluded finding", "found": "Found"}
    for kind, word in words.items():
        findings += [
            (kind, f"{word}: {nodule.diameter_mm:.1f} mm, score {nodule.score:.2f}{_true_size(row, annotated)}", nodule)
            for nodule, row, its_kind in zip(nodules, hits, kinds, strict=True)
            if its_kind == kind
        ]
    mask = found.labels > 0
    return [
        Finding(kind, caption, _picture(scan, nodule, mask) if number < MOST_PICTURES else b"")
        for number, (kind, caption, nodule) in enumerate(findings)
    ]


def _true_size(hits: np.ndarray, annotated: Sequence[Nodule]) -> str:
    sizes = [f"{truth.diameter_mm:.1f} mm" for truth, is_hit in zip(annotated, hits, strict=True) if is_hit]
    return f"; annotated: {', '.join(sizes)}" if sizes else ""


def _picture(scan: ProcessedScan, nodule: Nodule, mask: np.ndarray) -> bytes:
    """Three slices of the prepared array around a finding."""
    settings = Preprocessing.from_dict(scan.metadata.preprocessing)
    box = crop_around(scan.geometry, nodule, reach_mm(nodule) + 5)
    hu = settings.to_hu(scan.image[box.slices])
    grid = scan.geometry.cropped(box)
    truth = np.asarray(scan.mask)[box.slices] > 0
    return jpeg(key_picture(grid.image(hu), nodule, grid, mask[box.slices], truth))


def reliability(curve: FROC) -> list[dict[str, Any]]:
    """Of the marks of each tenth of the score, which count, the share that is a nodule."""
    scores = curve.thresholds[1:]
    true, false = np.diff(curve.tps), np.diff(curve.fps)
    bins = np.clip((scores * BINS).astype(int), 0, BINS - 1)
    rows = []
    for number in range(BINS):
        chosen = bins == number
        marks = true[chosen] + false[chosen]
        if marks.sum():
            rows.append(
                {
                    "score": f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}",
                    "marks": int(marks.sum()),
                    "mean_score": float(np.average(scores[chosen], weights=marks)),
                    "share": float(true[chosen].sum() / marks.sum()),
                }
            )
    return rows


def draw_reliability(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of nodules among the marks of each score; on the diagonal the score would be a probability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="grey", label="if it were a probability")
    x, y = ([row[name] for row in rows] for name in ("mean_score", "share"))
    sizes = [20 + 60 * row["marks"] / max(r["marks"] for r in rows) for row in rows]
    axes.plot(x, y, color=np.divide(FOUND, 255), label="this network")
    axes.scatter(x, y, s=sizes, color=np.divide(FOUND, 255))
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="score", ylabel="share of the marks that is a nodule")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write_page(
    output_dir: Path,
    summary: Mapping[str, Any],
    table: pd.DataFrame,
    findings: Mapping[str, Sequence[Finding]],
    curve: FROC | None,
    figures: Mapping[str, Figure],
    failed: Mapping[str, str],
) -> None:
    """Writes ``report.html`` of a validation, 15 MB at most.

    Args:
        output_dir: Its folder.
        summary: What ``validation_summary.json`` holds.
        table: Rows of the scored scans, as in ``validation_results.csv``.
        findings: Pictures of each scan.
        curve: The FROC, where some scan has a nodule.
        figures: 'froc' where there is one, and 'distribution'.
        failed: {scan: reason} of those that could not be scored.
    """
    reliable = reliability(curve) if curve else []
    drawn = dict(figures) | ({"reliability": draw_reliability(reliable)} if reliable else {})
    charts = [_chart(name, drawn[name]) for name in CHARTS if name in drawn]
    dice = f"Dice per scan {summary['dice']['mean']:.3f}" if summary["dice"]["scans"] else "no Dice"
    cpm = f", CPM {summary['cpm']['value']:.3f}" if "cpm" in summary else ""
    warnings = []
    if summary.get("chosen_on_these_scans"):
        warnings.append(CHOSEN_HERE)
    if left_out := summary.get("training_scans_left_out"):
        warnings.append(f"{left_out} scans seen in training are left out.")
    if summary.get("excluded") is None:
        warnings.append("No list of excluded findings was given, so marks on such findings count as false.")
    if min(summary["nodules"], summary["scans"]) < FEW:
        warnings.append(
            f"{summary['nodules']} nodules in {summary['scans']} scans say little; intervals are too narrow."
        )
    if failed:
        warnings.append(f"{len(failed)} scan{'s' * (len(failed) != 1)} could not be scored.")
    page = render(
        "validation.html",
        "",
        headline=dice + cpm,
        what=_what(summary),
        warnings=warnings,
        metrics=_metric_rows(table),
        further=_further(summary),
        by_size=summary.get("by_size", []),
        diameters=summary.get("diameters", []),
        fewest_in_band=FEWEST_IN_BAND,
        charts=charts,
        key_size=KEY_SIZE,
        reliability=reliable,
        failed=[(name, hide_folders(reason)) for name, reason in sorted(failed.items())],
        scans=_scan_rows(table, findings),
        facts=facts_of(summary),
    )
    write_text(output_dir / "report.html", page)


def _what(summary: Mapping[str, Any]) -> str:
    """What was scored."""
    folders = summary.get("data_dir")
    names = ", ".join(Path(folder).name for folder in (folders if isinstance(folders, list) else [folders or "-"]))
    fold = "" if summary.get("fold") is None else f", fold {summary['fold']}"
    return (
        f"Scored: {summary['scans']} {summary.get('subset') or ''} scans of {names}{fold}, of which "
        f"{summary['scans'] - summary['scans_without_nodules']} have {summary['nodules']} annotated nodules."
    )


def _metric_rows(table: pd.DataFrame) -> list[tuple[str, ...]]:
    rows = []
    for name, title in METRIC_NAMES.items():
        values = table[name].dropna().astype(float)
        figures = (
            [f"{value:.3f}" for value in (values.mean(), values.median(), values.min())] if len(values) else [""] * 3
        )
        rows.append((title, *figures, f"{len(values)} of {len(table)}"))
    return rows


def _further(summary: Mapping[str, Any]) -> list[str]:
    """What the means hide, in sentences."""
    lines = [
        f"Nodules found: {summary['nodules_found']} of {summary['nodules']}; false-positive nodules: "
        f"{summary['false_positive_nodules']}, of which {summary['on_excluded_findings']} on excluded findings.",
        f"Scans without nodules: {summary['scans_without_nodules']}, of which "
        f"{summary['scans_without_nodules_but_predicted']} with a prediction; each of these counts as a Dice of 0.",
    ]
    lines += [f"{text}: {summary[name]:.3f}." for name, text in DICE_KINDS.items() if np.isfinite(summary[name])]
    if "cpm" in summary:
        lines.append(f"CPM {summary['cpm']['value']:.3f}{interval_text(summary['cpm']['interval'])}.")
    return lines


def interval_text(interval: Sequence[float | None]) -> str:
    """The interval in brackets, where there is one; None stands in JSON for NaN."""
    low, high = np.asarray(interval, float)
    return f" (95 % interval {low:.3f} to {high:.3f})" if np.isfinite([low, high]).all() else ""


CHARTS = {
    "froc": (
        "FROC",
        "Free-response receiver operating characteristic: the share of nodules found, over false positives a scan. The "
        "band is the 95 % interval by bootstrap over scans. CPM, the competition performance metric, is the mean of "
        "the seven points.",
    ),
    "reliability": (
        "Reliability of the score",
        "A larger point stands for more marks. What counts neither way is left out.",
    ),
    "diameters": (
        "Diameters",
        "Each point is a found nodule: its diameter less the annotated one. The line is the mean, and in the band, if "
        "there is one, a further difference lies with 95 % probability. Grey: what the grid makes of the annotated "
        "nodule itself.",
    ),
    "distribution": ("Scans", "Each point is a scan."),
}


def _chart(name: str, figure: Figure) -> dict[str, Any]:
    title, caption = CHARTS[name]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    uri = data_uri(buffer.getvalue(), "png")
    return {
        "name": name,
        "title": title,
        "caption": caption,
        "alt": f"{title}. {caption}",
        "picture": uri,
        "size": (width, height),
    }


def _scan_rows(table: pd.DataFrame, findings: Mapping[str, Sequence[Finding]]) -> list[dict[str, Any]]:
    """The scans, the worst first, with pictures while there is room."""
    missed = table["nodules"] - table["nodules_found"]
    wrong = missed + table["false_positive_nodules"] - table["on_excluded_findings"]
    order = pd.DataFrame({"wrong": -wrong, "missed": -missed, "dice": table["dice"].fillna(1)})
    rows: list[dict[str, Any]] = []
    room = PAGE_BYTES
    for index in order.sort_values(["wrong", "missed", "dice"], kind="stable").index:
        scan = table.loc[index]
        pictures, others = [], []
        for finding in findings.get(scan["seriesuid"], ()):
            uri = data_uri(finding.picture)
            room -= len(uri)
            if finding.picture and room >= 0:
                pictures.append({"kind": finding.kind, "caption": finding.caption, "uri": uri})
            else:
                others.append(finding.caption)
        if len(others) > MOST_OTHERS:
            others[MOST_OTHERS:] = [f"and {len(others) - MOST_OTHERS} more"]
        room -= ROW_BYTES + sum(map(len, others))
        rows.append(
            {
                "name": scan["seriesuid"],
                "facts": _facts(scan, int(missed[index])),
                "pictures": pictures,
                "others": others,
                "is_open": len(rows) < MOST_OPEN and bool(wrong[index]),
            }
        )
    return rows


def _facts(scan: pd.Series, missed: int) -> str:
    dice = "no Dice" if pd.isna(scan["dice"]) else f"Dice {scan['dice']:.3f}"
    false = int(scan["false_positive_nodules"] - scan["on_excluded_findings"])
    parts = [f"{missed} missed" * bool(missed), f"{false} false" * bool(false), dice]
    return ", ".join(filter(None, [*parts, f"{int(scan['nodules'])} annotated"]))
