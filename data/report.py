"""Pages to look at results with: one for each scan, and an index. They open from disk and need no network.

The templates, the style and the script of the viewer lie in data/report/.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from data.measures import MeasuredScan, Measures, hu_on
from model import EXTRAS
from preprocess import Preprocessing
from utils import (
    LEARNT_FROM,
    SEEN,
    Box,
    Geometry,
    InputError,
    Nodule,
    ProcessedScan,
    atomic_path,
    now,
    read_scan,
    resample,
    write_text,
)

if TYPE_CHECKING:
    from infer import FoundNodule, ScanResult

FOLDER = Path(__file__).with_name("report")
LUNG_WINDOW = (-600.0, 1500.0)  # level and width in HU
LOWEST_HU, FINE_STEP, FINE_STEPS, COARSE_STEP = -1100, 6, 220, 22  # 256 steps up to 990 HU
SAME = 0.01  # of the HU window, by which a scan may differ from what was prepared from it
AROUND_MM = 20.0  # that a page shows around the lungs
VIEW_MM = 1.0  # voxels of a page are no finer
MOST_VOXELS = 19_000_000
PAGE_BYTES, INDEX_BYTES = 14_500_000, 4_800_000
COARSER = 1.15  # factor by which voxels grow where a page would be larger
KEY_PIXELS, KEY_GAP = 240, 6  # of each plane of a key picture
KEY_SIZE = (3 * KEY_PIXELS + 2 * KEY_GAP, KEY_PIXELS)
MOST_FAILURES = 500  # listed in the index
ROW_BYTES = 600  # of the markup of a row of a table
MOST_KEYS = 60  # nodules with a picture
MOST_MARKS = 30  # fainter ones in the table
ABOUT = "About these weights"
PARTS = {"new": "new: not used in training", "unknown": "unknown: the checkpoint does not say what it learnt from"}
THUMB_PIXELS = 96
MAP_STEP_MM = 2.0
# What is said of lungs where there is nothing to be warned of.
PLAIN_LUNGS = re.compile(r"(by seg-lungs|by threshold|not looked for|[\d.]+ litres on the right, [\d.]+ on the left)?")
LETTERS = {"axial": "RLAP", "coronal": "RLHF", "sagittal": "APHF"}  # left, right, top and bottom of a plane
FOUND, ANNOTATED = (255, 159, 28), (53, 208, 255)
EXPLANATION = (
    "The equivalent diameter is that of the ball of the same volume; the longest diameter is that of any axial "
    "slice, across is at right angles to it there. Mean HU and density are of the voxels more than 1 mm inside, "
    "since the rim mixes with air. Density: below a fifth of them above -450 HU is ground glass, below a half "
    "part-solid; nodules below 5 mm, or two slices of the scan, are too small to tell. Of 101 nodules of LIDC-IDRI "
    "88 are called what a radiologist's rating says; the limits were chosen on these. Small solid nodules in thick "
    "slices look less dense than they are. The distance is from the nodule's surface to the nearest edge of the "
    "lungs: chest wall, mediastinum or diaphragm. Third of height: of the lungs, no lobe."
)


def report_scan(
    output_dir: Path,
    provenance: Mapping[str, Any],
    result: ScanResult,
    scan: MeasuredScan,
    warnings: Sequence[str] = (),
) -> None:
    """Writes the page of a scan beside the other files of its results, as ``write_scan`` does.

    Args:
        output_dir: Their folder.
        provenance: Whose results these are.
        result: What was found in the scan.
        scan: The scan and its measured nodules.
        warnings: What else stands on top of the page.
    """
    found = result.found
    facts = {  # not the source, whose path may hold a patient's name
        "Set": PARTS.get(result.part, result.part),
        "Lungs": result.lungs,
        "Grid of the network": " x ".join(map(str, scan.grid.shape_zyx)) + " voxels (z, y, x)",
        "Highest probability of a voxel": f"{result.highest_probability:.3f}",
        "Fainter marks, in candidates.csv": str(len(found.faint)),
    } | facts_of(provenance)
    notes = [*warnings, *result.warnings, *notes_of(result.part, result.lungs, result.unlike_training)]
    if found.is_noise:
        notes.append("The network's map is mostly noise: it has not learnt yet, or does not suit this scan.")
    write_scan(output_dir, result.seriesuid, scan, notes, facts)


def facts_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Whose results these are, for the foot of a page."""
    facts = {
        "Checkpoint": f"{Path(provenance['checkpoint']).name} (sha256 {provenance['checkpoint_sha256'][:16]}...)",
        "Threshold, lowest score, mirrors": f"{provenance['threshold']:g}, {provenance['min_score']:.3f}, "
        f"{provenance['mirrors']}",
        "Computed in": provenance["computed_in"],
        "Date": now(),
    }
    titles = {"about": ABOUT} | {name: text.capitalize() for name, text in EXTRAS.items()}
    return facts | {title: provenance[name] for name, title in titles.items() if name in provenance}


def notes_of(part: str, lungs: str, unlike_training: str) -> list[str]:
    """What is to be known of a scan before its nodules are."""
    notes = []
    if part in LEARNT_FROM:
        told = "" if part == SEEN else f" ({part})"
        notes.append(f"Seen in training{told}: what is found here says nothing of new scans.")
    if not PLAIN_LUNGS.fullmatch(lungs):
        notes.append(f"Lungs: {lungs}.")
    if unlike_training not in ("", "no"):
        notes.append(f"Unlike the training scans: {unlike_training}.")
    return notes


def write_scan(
    output_dir: Path, name: str, scan: MeasuredScan, warnings: Sequence[str], facts: Mapping[str, str]
) -> None:
    """Writes ``reports/<name>.html`` and its thumbnail.

    Args:
        output_dir: The folder of an inference.
        name: What the scan is called; no patient's name unless that was asked for.
        scan: The scan and its measured nodules.
        warnings: What stands on top of the page.
        facts: {what: text} of how it was found.
    """
    keys = [key_picture(scan.ct, nodule, scan.grid, scan.ranks > 0, scan.truth) for nodule in scan.nodules[:MOST_KEYS]]
    folder = output_dir / "reports"
    thumbnail = keys[0].crop((0, 0, KEY_PIXELS, KEY_PIXELS)) if keys else _middle_slice(scan.ct)
    with atomic_path(folder / f"{name}.jpg") as temporary:
        temporary.write_bytes(jpeg(thumbnail.resize((THUMB_PIXELS, THUMB_PIXELS), Image.Resampling.LANCZOS)))
    measures = scan.measures
    rows = [_nodule_row(measure, keys) for measure in measures]
    grid, voxels, data = _packed_view(scan, PAGE_BYTES - len(json.dumps(rows)) - 2 * ROW_BYTES * len(rows))
    x, y, z = (grid.spacing[axis] * size for axis, size in enumerate(grid.shape_zyx[::-1]))
    step = " x ".join(f"{mm:.2g}" for mm in grid.spacing_zyx)
    page = render(
        "scan.html",
        (FOLDER / "viewer.js").read_text(encoding="utf-8"),
        name=name,
        count=f"{len(measures)} nodule{'s' * (len(measures) != 1)}" if measures else "no nodule found",
        warnings=list(warnings),
        map=_lung_map(scan),
        columns=[{"title": title, "is_number": is_number} for title, is_number, _ in COLUMNS],
        nodules=rows,
        key_size=KEY_SIZE,
        planes=[{"name": name, "letters": letters} for name, letters in LETTERS.items()],
        extent=f"Shown are {z:.0f} x {y:.0f} x {x:.0f} mm in steps of {step} mm (z, y, x).",
        facts=facts,
        has_truth=scan.truth is not None,
        about=facts.get(ABOUT, ""),
        marks=[_mark_row(mark) for mark in scan.marks[:MOST_MARKS]],
        explanation=EXPLANATION,
        voxels=voxels,
        data=data,
    )
    write_text(folder / f"{name}.html", page)


def _number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


# Title, whether it is a number, and text of each column of a page's table.
COLUMNS = (
    ("No.", True, None),
    ("Score", True, lambda m: _number(m.score, 2)),
    ("Equivalent diameter, mm", True, lambda m: _number(m.equivalent_diameter_mm)),
    ("Longest, across, mm", True, lambda m: f"{m.longest_axial_mm:.1f} x {m.across_axial_mm:.1f}"),
    ("Volume, mm³", True, lambda m: _number(m.volume_mm3, 0)),
    ("Mean HU inside", True, lambda m: _number(m.mean_hu, 0)),
    ("Density", False, lambda m: m.density or "too small to tell"),
    ("Side", False, lambda m: m.side),
    ("Third of height", False, lambda m: m.lung_third),
    ("To lung edge, mm", True, lambda m: _number(m.distance_to_lung_edge_mm)),
    ("Centre x, y, z, mm", True, lambda m: f"{m.center_x_mm:.1f}, {m.center_y_mm:.1f}, {m.center_z_mm:.1f}"),
)


def _mark_row(mark: FoundNodule) -> dict[str, str]:
    center = ", ".join(f"{mm:.1f}" for mm in mark.center_xyz)
    return {"score": _number(mark.score, 2), "diameter": _number(mark.diameter_mm), "center": center}


def _nodule_row(measure: Measures, keys: Sequence[Image.Image]) -> dict[str, Any]:
    words = [
        f"Nodule {measure.nodule}: {measure.equivalent_diameter_mm:.1f} mm",
        measure.density,
        measure.side and f"{measure.side} lung",
        measure.lung_third and f"{measure.lung_third} third of its height",
        f"score {measure.score:.2f}",
    ]
    return {
        "number": measure.nodule,
        "cells": [{"text": text(measure), "is_number": is_number} for _, is_number, text in COLUMNS if text],
        "caption": ", ".join(filter(None, words)),
        "picture": data_uri(jpeg(keys[measure.nodule - 1])) if measure.nodule <= len(keys) else "",
    }


# -------------------------------------------------------------------------------------------------- voxels of the page


def ct_of(scan: ProcessedScan) -> tuple[sitk.Image, str]:
    """The CT of a scan of a data set: the raw one where it is found, else the prepared array.

    Returns:
        CT in HU, and what is to be said of it.
    """
    metadata, reason = scan.metadata, "preprocess.py did not note where it lies"
    settings = Preprocessing.from_dict(metadata.preprocessing)
    if metadata.scan_path:
        try:
            ct = read_scan(metadata.scan_path)
            if Geometry.from_image(ct) == metadata.scan_geometry and _is_same(ct, scan, settings):
                return ct, ""
            reason = "it has changed since it was prepared"
        except (InputError, OSError):  # which names it, and so perhaps a patient
            reason = "it cannot be read where it was when it was prepared"
    shown = f"The page shows the prepared array, from {settings.hu_min:g} to {settings.hu_max:g} HU"
    shown += " and without what lies around the lungs" if settings.mask_lungs else ""
    return scan.geometry.image(settings.to_hu(scan.image)), f"{shown}, since the raw scan is not at hand: {reason}."


def _is_same(ct: sitk.Image, scan: ProcessedScan, settings: Preprocessing) -> bool:
    """Whether a CT is what a processed scan was prepared from, by its voxels in the lungs."""
    image = np.asarray(scan.image)
    there = image > 0
    return bool(np.abs(settings.apply_hu_window(ct, scan.geometry)[there] - image[there]).max(initial=0) < SAME)


def _packed_view(scan: MeasuredScan, room: int) -> tuple[Geometry, str, str]:
    """The grid of a page's slices, their voxels, and what the viewer must know beside them, in so many bytes."""
    ct = Geometry.from_image(scan.ct)
    lower, upper = ct.bounds()
    if scan.lungs is not None and (box := Box.around(scan.lungs | (scan.ranks > 0))) is not None:
        low, high = scan.grid.cropped(box).bounds()
        lower, upper = np.maximum(lower, low - AROUND_MM), np.minimum(upper, high + AROUND_MM)
    spacing = np.maximum(ct.spacing_along_axes(), VIEW_MM)
    spacing *= max(1.0, (float(np.prod((upper - lower) / spacing)) / MOST_VOXELS) ** (1 / 3))
    while True:
        grid = Geometry.covering(lower, upper, spacing=tuple(spacing.tolist()))
        text, data = pack_voxels(hu_on(scan.ct, grid)), _script_json(_view_data(scan, grid))
        if len(text) + len(data) <= room:
            return grid, text, data
        spacing *= COARSER


def hu_table() -> np.ndarray:
    """HU of each of the 256 values of a voxel: fine steps below FINE_STEPS, coarse ones above."""
    values = np.arange(256)
    fine = np.minimum(values, FINE_STEPS)
    return LOWEST_HU + FINE_STEP * fine + COARSE_STEP * (values - fine)


def pack_voxels(hu: np.ndarray) -> str:
    """CT values (z, y, x) as one byte each, less the mean of the left and the upper one, packed and as base64."""
    table = hu_table()
    ends = (table[1:] + table[:-1]) / 2
    value_of = np.searchsorted(ends, np.arange(table[0], table[-1] + 1)).astype(np.uint8)
    voxels = np.empty(hu.shape, np.uint8)
    for plane, values in zip(voxels, hu, strict=True):
        plane[:] = value_of[np.rint(np.clip(values, table[0], table[-1])).astype(np.int16) - table[0]]
    neighbours = np.zeros(hu.shape, np.uint16)
    neighbours[:, :, 1:] += voxels[:, :, :-1]
    neighbours[:, 1:, :] += voxels[:, :-1, :]
    residuals = voxels - (neighbours >> 1).astype(np.uint8)
    return base64.b64encode(gzip.compress(residuals.tobytes(), compresslevel=5, mtime=0)).decode()


def _view_data(scan: MeasuredScan, grid: Geometry) -> dict[str, Any]:
    """What the viewer must know beside the voxels."""
    return {
        "shape": list(grid.shape_zyx),
        "spacing": [round(mm, 6) for mm in grid.spacing_zyx],
        "origin": [round(mm, 4) for mm in grid.origin],
        "hu": hu_table().tolist(),
        "runs": _runs_on(grid, scan.grid, scan.ranks),
        "truth": [] if scan.truth is None else _runs_on(grid, scan.grid, scan.truth),
        "nodules": [
            {"number": number, "index": np.round(grid.index(nodule.center_xyz), 2).tolist()}
            for number, nodule in enumerate(scan.nodules, start=1)
        ],
        "marks": [np.round(grid.index(mark.center_xyz), 2).tolist() for mark in scan.marks[:MOST_MARKS]],
    }


def _runs_on(grid: Geometry, own: Geometry, labels: np.ndarray) -> list[int]:
    """Runs of labels (z, y, x), which lie on their own grid, on another one."""
    there = resample(own.image(labels.astype(np.uint16)), grid, linear=False, pixel_type=sitk.sitkUInt16)
    return run_lengths(sitk.GetArrayFromImage(there))


def run_lengths(labels: np.ndarray) -> list[int]:
    """Flat (start, length, label) triples of all runs of an array that are not 0."""
    flat = labels.ravel()
    there = np.flatnonzero(flat)
    if not len(there):
        return []
    values = flat[there].astype(int)
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(there) > 1) | (np.diff(values) != 0)]))
    lengths = np.diff(np.append(starts, len(there)))
    return np.stack([there[starts], lengths, values[starts]], axis=1).ravel().tolist()


# ------------------------------------------------------------------------------------------------------------- pictures


def key_picture(
    ct: sitk.Image, nodule: Nodule, grid: Geometry, mask: np.ndarray, truth: np.ndarray | None = None
) -> Image.Image:
    """Axial, coronal and sagittal slice through the centre of a finding, side by side, in a lung window.

    Args:
        ct: CT in HU, any direction.
        nodule: The finding.
        grid: Where the voxels of the masks lie.
        mask: What was found, bool (z, y, x); it is outlined in orange.
        truth: What was annotated, likewise, in blue.
    """
    reach = reach_mm(nodule)
    step = 2 * reach / KEY_PIXELS
    whole = Image.new("RGB", KEY_SIZE)
    crop = crop_around(grid, nodule, reach)
    outlines = [
        (grid.cropped(crop).image(np.ascontiguousarray(array[crop.slices]).astype(np.float32)), color)
        for array, color in ((truth, ANNOTATED), (mask, FOUND))
        if array is not None and array[crop.slices].any()
    ]
    for number, (name, axis) in enumerate((("axial", 2), ("coronal", 1), ("sagittal", 0))):
        half = np.full(3, reach)
        half[axis] = step / 2
        center = np.asarray(nodule.center_xyz)
        shape = [KEY_PIXELS] * 3
        shape[2 - axis] = 1
        plane = Geometry.covering(center - half, center + half, shape_zyx=(shape[0], shape[1], shape[2]))
        values = _plane_of(ct, plane, axis, -1024.0)
        picture = Image.fromarray(_grey(values)).convert("RGB")
        for image, color in outlines:
            inside = _plane_of(image, plane, axis, 0.0) > 0.5
            _paint(picture, inside & ~ndimage.binary_erosion(inside), color)
        _name_sides(picture, LETTERS[name])
        if not number:
            _draw_scale(picture, step)
        whole.paste(picture, (number * (KEY_PIXELS + KEY_GAP), 0))
    return whole


def reach_mm(nodule: Nodule) -> float:
    """Half the width of the zoomed views of a finding."""
    return max(20.0, 1.2 * nodule.diameter_mm)


def crop_around(grid: Geometry, nodule: Nodule, reach: float) -> Box:
    """Voxels of a grid that lie within so many mm of a finding along its axes, and one more; one at least."""
    center, reach = np.asarray(nodule.center_xyz), reach + max(grid.spacing)
    ends = [np.clip(np.floor(grid.index(center + side * reach)), 0, np.asarray(grid.shape_zyx) - 1) for side in (-1, 1)]
    lower, upper = (np.asarray(end).astype(int) for end in ends)
    return Box.between(lower, upper + 1)


def _plane_of(image: sitk.Image, plane: Geometry, axis: int, fill: float) -> np.ndarray:
    """Values (rows, columns) of an image on a grid of one slice; the head is up where it is seen."""
    values = sitk.GetArrayFromImage(resample(image, plane, fill=fill)).squeeze(2 - axis)
    return values if axis == 2 else values[::-1]


def _grey(hu: np.ndarray) -> np.ndarray:
    """uint8 of CT values in the lung window."""
    level, width = LUNG_WINDOW
    return (np.clip((hu - level) / width + 0.5, 0, 1) * 255).astype(np.uint8)


def _paint(picture: Image.Image, pixels: np.ndarray, color: tuple[int, int, int]) -> None:
    picture.paste(color, mask=Image.fromarray((pixels * 255).astype(np.uint8)))


@cache
def _font() -> Any:
    return ImageFont.load_default(16)


def _name_sides(picture: Image.Image, letters: str) -> None:
    """The patient's sides at the edges of a slice: left, right, top, bottom."""
    middle, end = KEY_PIXELS // 2, KEY_PIXELS - 4
    places = ((4, middle, "lm"), (end, middle, "rm"), (middle, 3, "mt"), (middle, end, "mb"))
    draw = ImageDraw.Draw(picture)
    for letter, (x, y, anchor) in zip(letters, places, strict=True):
        draw.text((x, y), letter, "white", _font(), anchor, stroke_width=1, stroke_fill="black")


def _draw_scale(picture: Image.Image, step_mm: float) -> None:
    """A bar of 10 mm in the lower left corner."""
    draw, y, length = ImageDraw.Draw(picture), KEY_PIXELS - 10, 10 / step_mm
    draw.line((6, y, 10 + length, y), "black", 6)
    draw.line((8, y, 8 + length, y), "white", 2)
    draw.text((8, y - 4), "10 mm", "white", _font(), "lb", stroke_width=1, stroke_fill="black")


def _middle_slice(ct: sitk.Image) -> Image.Image:
    """The middle axial slice of a scan, as a square."""
    lower, upper = Geometry.from_image(ct).bounds()
    middle, half = (lower + upper) / 2, max(upper[:2] - lower[:2]) / 2
    low = (middle[0] - half, middle[1] - half, middle[2] - 0.5)
    high = (middle[0] + half, middle[1] + half, middle[2] + 0.5)
    plane = Geometry.covering(low, high, shape_zyx=(1, KEY_PIXELS, KEY_PIXELS))
    return Image.fromarray(_grey(_plane_of(ct, plane, 2, -1024.0)))


def _lung_map(scan: MeasuredScan) -> dict[str, Any] | None:
    """The scan as seen from the front, as a chest radiograph shows it, with the places of the nodules; in mm."""
    lower, upper = scan.grid.bounds()
    x_mm, _, z_mm = upper - lower
    mean = np.clip(scan.hu, -1000, 600).mean(axis=1)[::-1]
    low, high = np.quantile(mean, [0.02, 0.98])
    picture = Image.fromarray((np.clip((mean - low) / max(high - low, 1), 0, 1) * 255).astype(np.uint8))
    size = max(1, round(x_mm / MAP_STEP_MM)), max(1, round(z_mm / MAP_STEP_MM))
    thirds = []
    if scan.frame and scan.frame.is_whole:
        ends = np.linspace(scan.frame.lower_z_mm, scan.frame.upper_z_mm, 4)
        thirds = [round(float(upper[2] - z), 1) for z in ends]
    spots = [
        {
            "number": measure.nodule,
            "x": round(float(measure.center_x_mm - lower[0]), 1),
            "y": round(float(upper[2] - measure.center_z_mm), 1),
            "radius": round(max(4.0, measure.equivalent_diameter_mm / 2), 1),
        }
        for measure in scan.measures
    ]
    return {
        "width": round(float(x_mm), 1),
        "height": round(float(z_mm), 1),
        "picture": data_uri(jpeg(picture.resize(size, Image.Resampling.LANCZOS))),
        "thirds": thirds,
        "spots": spots,
        "label": f"The lungs from the front with {len(spots)} nodule{'s' * (len(spots) != 1)} marked",
    }


# ---------------------------------------------------------------------------------------------------------------- index


def write_index(output_dir: Path, provenance: Mapping[str, Any], scans: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes ``report.html``: all scans of a folder, those without a page and those that could not be read, too.

    Args:
        output_dir: The folder of an inference.
        provenance: Whose results these are.
        scans: The scans of its summary.
    """
    path = output_dir / "failed_scans.csv"
    failed = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.is_file() else []
    failures = {row["seriesuid"]: hide_folders(row["reason"]) for row in failed}
    rows = [_index_row(output_dir, name, scan, name in failures) for name, scan in scans.items()]
    shown = dict(itertools.islice(failures.items(), MOST_FAILURES))
    room = INDEX_BYTES - len(json.dumps([rows, shown])) - ROW_BYTES * (len(rows) + len(shown))
    for row in rows:
        picture = output_dir / "reports" / f"{row['name']}.jpg"
        uri = data_uri(picture.read_bytes()) if picture.is_file() else ""
        room -= len(uri)
        row["picture"] = uri if room >= 0 else ""
    counts, facts, warnings = [row["nodules"] for row in rows], facts_of(provenance), []
    if failures:
        rest = f"; failed_scans.csv lists all, this page {len(shown)}" if len(shown) < len(failures) else ""
        warnings.append(f"{len(failures)} scan{'s' * (len(failures) != 1)} could not be read{rest}.")
    page = render(
        "index.html",
        "",
        count=f"{sum(counts)} nodule{'s' * (sum(counts) != 1)} in {sum(n > 0 for n in counts)} of {len(rows)} scans",
        warnings=warnings,
        failed=list(shown.items()),
        scans=rows,
        about=facts.get(ABOUT, ""),
        facts=facts,
    )
    write_text(output_dir / "report.html", page)


def _index_row(output_dir: Path, name: str, scan: Mapping[str, Any], has_failed: bool) -> dict[str, Any]:
    """What the index says of a scan of the summary."""
    largest, highest, page = scan["largest_diameter_mm"], scan["highest_score"], f"reports/{name}.html"
    notes = [*scan.get("warnings", ()), *notes_of(scan["part"], scan.get("lungs", ""), scan.get("unlike_training", ""))]
    if has_failed:
        notes.insert(0, "Could not be read when it was last tried; these are results of before.")
    return {
        "name": name,
        "page": _address(page) if (output_dir / page).is_file() else "",
        "nodules": len(scan["nodules"]),
        "largest": "" if largest is None else f"{largest:.1f}",
        "highest": "" if highest is None else f"{highest:.2f}",
        "notes": notes,
    }


def hide_folders(text: str) -> str:
    """A message without the folders of paths, which are often named after patients."""
    return re.sub(r"/(?:[^/\n]+/)+", ".../", text)


def _address(path: str) -> str:
    """A relative address of a file whose name may hold anything."""
    return quote(path)


# ------------------------------------------------------------------------------------------------------------- the page


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True)


def render(template: str, script: str, **values: Any) -> str:
    """A page with the style and a policy that allows this script alone, and no network."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    style = Markup((FOLDER / "style.css").read_text(encoding="utf-8"))
    marked = {name: Markup(values[name]) for name in ("data", "voxels") if name in values}
    return (
        _templates()
        .get_template(template)
        .render(values | marked | {"policy": policy, "style": style, "script": Markup(script)})
    )


def _script_json(values: Any) -> str:
    """JSON that may stand in a page: no text in it ends a script."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, subsampling=0)  # outlines are a pixel wide
    return buffer.getvalue()


def data_uri(picture: bytes, kind: str = "jpeg") -> str:
    """The address of a picture that a page holds itself."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
