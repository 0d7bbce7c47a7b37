"""Pages to look at results with: what they hold, read back without a browser."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from conftest import BALL_CENTER, BALL_RADIUS_MM, Bright, Nothing, Page, chest, unpack_voxels, write_chest
from PIL import Image
from test_dicom import save, slice_of

import data.report as report
from data.measures import MeasuredScan, hu_on
from data.report import hu_table, key_picture, pack_voxels, run_lengths, write_index
from infer import delete_results
from utils import Geometry, Nodule, read_metadata, read_processed_list, read_scan, write_metadata

# --------------------------------------------------------------------------------------------------- voxels and labels


def test_values_come_back_to_half_a_step():
    hu = np.random.default_rng(0).uniform(-1100, 990, (5, 7, 9))
    found = unpack_voxels(pack_voxels(hu), hu.shape)
    assert (abs(found - hu)[hu < 220] <= 3.5).all()  # half a step, and half a unit of rounding
    assert (abs(found - hu) <= 11.5).all()


def test_values_beyond_the_table_are_its_ends():
    hu = np.array([[[-3000.0, -1100.0, 990.0, 3000.0]]])
    assert unpack_voxels(pack_voxels(hu), hu.shape).tolist() == [[[-1100, -1100, 990, 990]]]


def test_table_rises_over_what_both_windows_show():
    table = hu_table()
    assert len(table) == 256
    assert (np.diff(table) > 0).all()
    assert table[0] == -1100
    assert table[-1] == 990


def test_packing_is_the_same_each_time():
    hu = np.full((2, 3, 4), -600.0)
    assert pack_voxels(hu) == pack_voxels(hu)
    assert gzip.decompress(base64.b64decode(pack_voxels(hu)))


def test_runs_tell_starts_lengths_and_labels():
    labels = np.array([[[0, 1, 1, 2], [2, 0, 0, 3]]])
    assert run_lengths(labels) == [1, 2, 1, 3, 2, 2, 7, 1, 3]
    assert run_lengths(np.zeros((2, 2, 2), int)) == []


# --------------------------------------------------------------------------------------------------- the page of a scan


def test_page_shows_the_scan_itself_on_an_upright_grid(chest_page):
    scan, _, page = chest_page
    there = hu_on(scan, page.grid)
    assert abs(page.hu - np.clip(there, -1100, 990)).max() <= 11
    assert (abs(page.hu + 350) < 10).mean() > 0.1  # what lies around the lungs is not masked


def test_ball_lies_in_the_page_where_it_is_in_the_patient(chest_page):
    page = chest_page[2]
    z, y, x = np.round(page.grid.index(BALL_CENTER)).astype(int)
    assert page.hu[z, y, x] > 380
    assert page.labels()[z, y, x] == 1
    assert page.scan["nodules"][0]["index"] == pytest.approx([z, y, x], abs=1.5)
    center = page.grid.world(np.argwhere(page.labels() == 1).mean(axis=0))
    assert center == pytest.approx(BALL_CENTER, abs=2)


def test_mask_of_the_page_is_the_mask_that_was_written(chest_page):
    _, folder, page = chest_page
    mask = sitk.ReadImage(str(folder / "predicted_masks" / "chest.nii.gz"))
    volumes = [mask_volume(sitk.GetArrayFromImage(mask), mask.GetSpacing())]
    volumes.append(mask_volume(page.labels(), page.scan["spacing"]))
    assert volumes[1] == pytest.approx(volumes[0], rel=0.1)


def test_mask_of_the_scans_grid_is_read_alike_by_another_library(chest_page):
    _, folder, _ = chest_page
    theirs = nibabel.load(folder / "predicted_masks" / "chest.nii.gz")
    center = np.argwhere(theirs.get_fdata()).mean(axis=0)
    x, y, z = (theirs.affine @ [*center, 1])[:3]
    assert (-x, -y, z) == pytest.approx(BALL_CENTER, abs=2)  # NIfTI's x and y run the other way


def mask_volume(array, spacing):
    return (array > 0).sum() * np.prod(spacing)


def test_page_tells_the_nodule_in_words_and_figures(chest_page):
    _, folder, page = chest_page
    (row,) = json.loads((folder / "chest_measures.json").read_text())
    assert row["side"] == "right"
    assert row["density"] == "solid"
    assert row["lung_third"] == "middle"
    assert row["equivalent_diameter_mm"] == pytest.approx(2 * BALL_RADIUS_MM, abs=2)
    for text in ("right", "solid", f"{row['volume_mm3']:.0f}", f"{row['mean_hu']:.0f}", f"{row['score']:.2f}"):
        assert text in page.text
    assert "Not a medical device" in page.text


def test_measures_are_the_same_as_a_table(chest_page):
    folder = chest_page[1]
    table = pd.read_csv(folder / "chest_measures.csv")
    assert table.to_dict("records") == json.loads((folder / "chest_measures.json").read_text())
    units = [name for name in table.columns if re.search(r"_(mm|mm3|hu)$|hu$", name)]
    assert {"longest_axial_mm", "volume_mm3", "mean_hu", "center_x_mm"} <= set(units)


def test_page_needs_no_network_and_allows_its_own_script_alone(chest_page):
    page = chest_page[2]
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline'; style" not in policy.split("style-src")[0]
    assert not page.all("link")
    assert not [script for script in page.all("script") if "src" in script]
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not re.search(r"https?://", page.source.replace("http-equiv", ""))


def test_policy_is_that_of_the_very_script(chest_page):
    page = chest_page[2]
    digest = base64.b64encode(hashlib.sha256(page.scripts["code"].encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}';" in policy


def test_key_picture_stands_in_the_page_without_scripts(chest_page):
    page = chest_page[2]
    (image,) = page.all("img")
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))
    assert picture.size == (int(image["width"]), int(image["height"]))
    assert "axial, coronal and sagittal" in image["alt"]
    assert np.asarray(picture.convert("L"))[120, 120] > 200  # the ball is in the middle


def test_links_of_the_table_lead_to_pictures_that_are_there(chest_page):
    page = chest_page[2]
    ids = {values["id"] for _, values in page.elements if "id" in values}
    targets = {link["href"][1:] for link in page.all("a") if link["href"].startswith("#")}
    assert targets == {"nodule-1"}
    assert targets <= ids


def test_every_control_has_a_name(chest_page):
    page = chest_page[2]
    for canvas in page.all("canvas"):
        assert canvas["aria-label"]
        assert canvas["tabindex"] == "0"
    assert page.source.count("<label") >= len(page.all("input"))


def test_scan_without_a_nodule_has_a_page_that_says_so(trained, tmp_path):
    trained(Nothing()).infer_scan(write_chest(tmp_path / "chest.mhd"))
    page = Page(tmp_path / "out" / "reports" / "chest.html")
    assert "No nodule found" in page.text
    assert page.scan["runs"] == []
    assert (tmp_path / "out" / "chest_measures.csv").read_text().startswith("seriesuid,nodule,center_x_mm")
    assert json.loads((tmp_path / "out" / "chest_measures.json").read_text()) == []


def test_doubts_of_the_reader_stand_on_top_without_a_patients_name(trained, tmp_path):
    array = sitk.GetArrayFromImage(chest((40, 56, 60)))
    for number, plane in enumerate(array):
        place = [-150.0, -140.0, 6.0 * number]
        changes = {
            "ImagePositionPatient": place,
            "PixelSpacing": [5, 5],
            "RescaleSlope": None,
            "RescaleIntercept": None,
        }
        save(slice_of(number, "1.2.3", pixels=plane, **changes), tmp_path / "ward" / "Mueller_Hans" / f"{number}.dcm")
    trained(Nothing()).infer_scans([tmp_path / "ward"])
    page = Page(tmp_path / "out" / "reports" / "1.2.3.html")
    assert "states no RescaleIntercept: its stored values are taken for HU" in page.text
    assert "Mueller" not in page.source


def test_path_of_a_scan_is_not_shown(trained, tmp_path):
    (tmp_path / "Mueller_Hans").mkdir()
    trained(Nothing()).infer_scan(write_chest(tmp_path / "Mueller_Hans" / "ct.mhd"))
    assert "Mueller" not in (tmp_path / "out" / "reports" / "ct.html").read_text()
    assert "Mueller" not in (tmp_path / "out" / "report.html").read_text()


def test_scan_without_lungs_says_so_on_top_and_is_shown_whole(trained, tmp_path):
    array = np.full((40, 56, 60), -1000, np.int16)
    array[5:35, 10:46, 10:50] = 40
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((5, 5, 6))
    sitk.WriteImage(image, str(tmp_path / "head.mhd"))
    trained(Nothing()).infer_scan(tmp_path / "head.mhd")
    page = Page(tmp_path / "out" / "reports" / "head.html")
    assert "Lungs: not found." in page.text
    assert np.prod(page.grid.shape_zyx) * page.grid.voxel_volume_mm3 == pytest.approx(300 * 280 * 240, rel=0.05)


def nothing_in(ct, grid):
    """A scan in which nothing was found."""
    return MeasuredScan(ct, grid, hu_on(ct, grid), np.zeros(grid.shape_zyx, np.uint16), [], [], [], None, None)


HOSTILE = "</script><script>alert(1)</script>&<!--"


def test_texts_are_escaped(chest_page, tmp_path):
    scan, _, _ = chest_page
    grid = Geometry.from_image(chest((20, 28, 30)))
    report.write_scan(tmp_path, "a", nothing_in(scan, grid), [HOSTILE], {HOSTILE: HOSTILE})
    page = Page(tmp_path / "reports" / "a.html")
    assert HOSTILE not in page.source
    assert page.text.count(HOSTILE) == 3
    assert set(page.scripts) == {"scan", "voxels", "code"}


def test_json_in_a_page_ends_no_script():
    assert "<" not in report._script_json({"a": HOSTILE})
    assert json.loads(report._script_json({"a": HOSTILE})) == {"a": HOSTILE}


def test_page_of_a_noisy_scan_is_no_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGE_BYTES", 400_000)
    monkeypatch.setattr(report, "MOST_VOXELS", 600_000)
    noise = np.random.default_rng(0).normal(0, 400, (100, 100, 100)).astype(np.int16)
    ct = sitk.GetImageFromArray(noise)
    grid = Geometry.from_image(ct)
    report.write_scan(tmp_path, "a", nothing_in(ct, grid), [], {})
    page = Page(tmp_path / "reports" / "a.html")
    assert len(page.scripts["voxels"]) <= 400_000
    assert (page.grid.shape_zyx * np.array(page.grid.spacing_zyx)).min() >= 100  # coarser, not less of it


def test_page_with_many_pictures_and_a_map_of_noise_is_no_larger_than_it_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGE_BYTES", 1_500_000)
    rng = np.random.default_rng(0)
    ct = sitk.GetImageFromArray(rng.normal(-500, 400, (80, 80, 80)).astype(np.int16))
    grid = Geometry.from_image(ct)
    ranks = (rng.random(grid.shape_zyx) > 0.5).astype(np.uint16)
    report.write_scan(tmp_path, "a", replace(nothing_in(ct, grid), ranks=ranks), [], {})
    assert (tmp_path / "reports" / "a.html").stat().st_size < 1_500_000 + 60_000


def test_limits_of_pages_are_those_that_are_promised():
    assert report.PAGE_BYTES + 500_000 <= 15_000_000
    assert report.INDEX_BYTES < 5_000_000


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("flipped", [False, True])
def test_key_picture_is_seen_as_radiologists_see_it(flipped):
    ct = chest((80, 112, 120), flipped)
    beside = tuple(np.add(BALL_CENTER, (12, 8, 10)))  # the ball lies to the right, front and feet of this point
    nodule = Nodule(beside, (0.0, 0.0, 0.0), 4.0)
    grid = Geometry.covering(*Geometry.from_image(ct).bounds(), spacing=(2.0, 2.0, 2.0))
    mask = np.zeros(grid.shape_zyx, bool)
    mask[0, 0, 0] = True
    grey = np.asarray(key_picture(ct, nodule, grid, mask).convert("L")).astype(float)
    size, step = report.KEY_PIXELS, report.KEY_PIXELS + report.KEY_GAP
    axial, coronal, sagittal = (grey[:, n * step : n * step + size] for n in range(3))
    for plane in (axial, coronal, sagittal):
        _, columns = np.nonzero(plane > 220)
        assert columns.mean() < size / 2  # to the right of the patient, to the front
    assert np.nonzero(axial > 220)[0].mean() < size / 2  # front is up
    assert np.nonzero(coronal > 220)[0].mean() > size / 2  # feet are down
    assert np.nonzero(sagittal > 220)[0].mean() > size / 2


def test_outlines_have_the_colours_of_what_was_found_and_annotated():
    ct = chest((40, 56, 60))
    grid = Geometry.covering(*Geometry.from_image(ct).bounds(), spacing=(2.0, 2.0, 2.0))
    center = np.round(grid.index(BALL_CENTER)).astype(int)
    mask, truth = np.zeros(grid.shape_zyx, bool), np.zeros(grid.shape_zyx, bool)
    z, y, x = center
    mask[z - 3 : z + 4, y - 3 : y + 4, x - 3 : x + 4] = True
    truth[z - 6 : z + 7, y - 6 : y + 7, x - 6 : x + 7] = True
    pixels = np.asarray(key_picture(ct, Nodule(BALL_CENTER, (0, 0, 0), 32.0), grid, mask, truth)).astype(int)
    for color in (report.FOUND, report.ANNOTATED):
        assert (abs(pixels - color).sum(axis=-1) == 0).sum() > 100


# ---------------------------------------------------------------------------------------------------- data sets, index


@pytest.fixture
def own_data(processed_dir, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(processed_dir, folder)
    return folder


def test_data_set_gets_no_pages_unless_they_are_asked_for(trained, processed_dir, tmp_path):
    trained().infer_dataset(processed_dir, "all")
    assert not (tmp_path / "out" / "reports").exists()
    assert not (tmp_path / "out" / "report.html").exists()


def test_page_of_before_goes_where_none_is_wanted(trained, own_data, tmp_path):
    trained(Nothing(), report=True).infer_dataset(own_data, "all")
    assert list((tmp_path / "out" / "reports").glob("*.html"))
    trained(Nothing()).infer_dataset(own_data, "all")
    assert not list((tmp_path / "out" / "reports").glob("*"))
    assert not list((tmp_path / "out").glob("*_measures.*"))
    assert not (tmp_path / "out" / "report.html").exists()


def test_page_of_a_raw_scan_of_before_goes_where_none_is_wanted(trained, tmp_path):
    path = write_chest(tmp_path / "chest.mhd")
    trained(Nothing()).infer_scan(path)
    trained(Nothing(), report=False).infer_scan(path)
    assert not list((tmp_path / "out" / "reports").glob("*"))


def test_raw_scan_of_other_content_is_not_shown(trained, own_data, tmp_path):
    uid = read_processed_list(own_data)[0]
    metadata = read_metadata(own_data, uid)
    image = read_scan(metadata.scan_path)
    sitk.WriteImage(image - 40, str(tmp_path / "darker.mha"))
    write_metadata(own_data, replace(metadata, scan_path=str(tmp_path / "darker.mha")))
    trained(Nothing(), report=True).infer_dataset(own_data, "all")
    assert "it has changed since it was prepared" in Page(tmp_path / "out" / "reports" / f"{uid}.html").text


def test_raw_scan_gets_no_page_where_none_is_wanted(trained, tmp_path):
    trained(Nothing(), report=False).infer_scan(write_chest(tmp_path / "chest.mhd"))
    assert not (tmp_path / "out" / "reports").exists()


def test_page_of_a_data_set_shows_the_raw_scan_and_the_annotation(trained, own_data, tmp_path):
    trained(Bright(), report=True).infer_dataset(own_data, "all")
    for uid in read_processed_list(own_data):
        page = Page(tmp_path / "out" / "reports" / f"{uid}.html")
        metadata = read_metadata(own_data, uid)
        assert "prepared array" not in page.text
        assert page.hu.max() > 300  # bones are not masked
        assert len(np.unique(page.labels("truth"))) - 1 == bool(metadata.nodules)
        for nodule in metadata.nodules:
            z, y, x = np.round(page.grid.index(nodule.center_xyz)).astype(int)
            near = tuple(slice(max(i - 1, 0), i + 2) for i in (z, y, x))  # the page's voxels are other ones
            assert page.labels("truth")[near].any()


def test_page_without_the_raw_scan_says_that_it_shows_the_prepared_array(trained, own_data, tmp_path):
    uids = read_processed_list(own_data)
    metadata = read_metadata(own_data, uids[0])
    write_metadata(own_data, replace(metadata, scan_path=str(tmp_path / "gone.mhd")))
    write_metadata(own_data, replace(read_metadata(own_data, uids[1]), scan_path=""))
    other = write_chest(tmp_path / "other.mhd")
    write_metadata(own_data, replace(read_metadata(own_data, uids[2]), scan_path=str(other)))
    trained(Nothing(), report=True).infer_dataset(own_data, "all")
    reasons = ("it cannot be read where it was", "did not note where it lies", "it has changed since")
    for uid, reason in zip(uids, reasons, strict=False):
        page = Page(tmp_path / "out" / "reports" / f"{uid}.html")
        assert (
            "The page shows the prepared array, from -1000 to 400 HU and without what lies around the lungs"
            in page.text
        )
        assert reason in page.text
        assert str(tmp_path) not in page.source
        assert page.hu.max() <= 420


def test_page_of_a_training_scan_says_so_on_top(trained, own_data, run_dir, tmp_path):
    trained(Nothing(), report=True).infer_dataset(own_data, "train")
    pages = list((tmp_path / "out" / "reports").glob("*.html"))
    assert pages
    assert all("Seen in training (train)" in Page(path).text for path in pages)
    assert "Seen in training" in Page(tmp_path / "out" / "report.html").text


def test_index_leads_to_the_page_of_each_scan(chest_page):
    _, folder, _ = chest_page
    index = Page(folder / "report.html")
    links = [link["href"] for link in index.all("a")]
    assert links == ["reports/chest.html"]
    assert all((folder / link).is_file() for link in links)
    assert "1 nodule in 1 of 1 scans" in index.text
    assert index.all("img")[0]["src"].startswith("data:image/jpeg")


def test_index_lists_what_could_not_be_read(trained, tmp_path):
    (tmp_path / "raw").mkdir()
    write_chest(tmp_path / "raw" / "chest.mhd")
    (tmp_path / "raw" / "bad.nii.gz").write_bytes(b"no scan")
    trained(Nothing()).infer_scans([tmp_path / "raw"], names=True)
    index = Page(tmp_path / "out" / "report.html")
    assert "1 scan could not be read." in index.text
    assert "bad" in index.text
    assert str(tmp_path) not in index.source


def test_index_is_written_where_no_scan_could_be_read(trained, tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("NA", "null"):
        (tmp_path / "raw" / f"{name}.nii.gz").write_bytes(b"no scan")
    trained(Nothing()).infer_scans([tmp_path / "raw"], names=True)
    index = Page(tmp_path / "out" / "report.html")
    assert "2 scans could not be read." in index.text
    names = re.findall(r'<th scope="row">(\w+)</th>', index.source)
    assert {"NA", "null"} <= set(names)


def test_scan_that_failed_later_says_that_its_results_are_of_before(trained, tmp_path):
    path = write_chest(tmp_path / "a.mhd")
    write_chest(tmp_path / "b.mhd")
    trained(Nothing()).infer_scans([path, tmp_path / "b.mhd"])
    path.with_suffix(".raw").unlink()
    trained(Nothing()).infer_scans([path, tmp_path / "b.mhd"])
    assert "these are results of before" in Page(tmp_path / "out" / "report.html").text


def test_name_that_is_no_utf8_stops_nothing(trained, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    write_chest(tmp_path / "raw" / "a.mhd")
    Path(os.fsdecode(bytes(tmp_path / "raw") + b"/\xff.mha")).write_bytes(b"")
    trained(Nothing()).infer_scans([tmp_path / "raw"], names=True)
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(pd.read_csv(tmp_path / "out" / "failed_scans.csv")) == 1
    capsys.readouterr()


def test_index_is_up_to_date_when_all_scans_are_done(trained, tmp_path):
    inferencer = trained(Nothing())
    for name in "abc":
        write_chest(tmp_path / f"{name}.mhd")
    inferencer.infer_scans([tmp_path / f"{name}.mhd" for name in "abc"])
    assert [link["href"] for link in Page(tmp_path / "out" / "report.html").all("a")] == [
        f"reports/{name}.html" for name in "abc"
    ]


def scan_row(**values):
    row = {"part": "new", "nodules": [], "largest_diameter_mm": None, "highest_score": None}
    return row | {"lungs": "", "unlike_training": "no"} | values


FACTS = {"checkpoint": "a.pth", "checkpoint_sha256": "0" * 64, "threshold": 0.5, "min_score": 0.5, "mirrors": 0}
FACTS |= {"computed_in": "float32"}


def test_index_of_many_scans_is_no_larger_than_it_may_be(tmp_path):
    (tmp_path / "reports").mkdir()
    scans = {f"scan {number}": scan_row() for number in range(3000)}
    for name in scans:
        (tmp_path / "reports" / f"{name}.jpg").write_bytes(bytes(3000))
    write_index(tmp_path, FACTS, scans)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 5_000_000
    assert page.count("<tr>") > 3000
    assert 100 < page.count("<img") < 3000


def test_index_of_many_failures_is_no_larger_than_it_may_be(tmp_path):
    rows = [(f"scan {number}", "is damaged; copy it again " * 30) for number in range(9000)]
    pd.DataFrame(rows, columns=["seriesuid", "reason"]).to_csv(tmp_path / "failed_scans.csv", index=False)
    write_index(tmp_path, FACTS, {"a": scan_row()})
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert (
        "9000 scans could not be read; failed_scans.csv lists all, this page 500."
        in Page(tmp_path / "report.html").text
    )


def test_names_in_the_index_are_escaped_as_text_and_as_addresses(tmp_path):
    (tmp_path / "reports").mkdir()
    name = 'a "b" #1 <i>%41 größe'
    (tmp_path / "reports" / f"{name}.html").touch()
    write_index(tmp_path, FACTS, {name: scan_row(unlike_training=HOSTILE)})
    index = Page(tmp_path / "report.html")
    assert [link["href"] for link in index.all("a")] == [
        "reports/a%20%22b%22%20%231%20%3Ci%3E%2541%20gr%C3%B6%C3%9Fe.html"
    ]
    assert name in index.text
    assert HOSTILE in index.text
    assert not index.all("i")


def test_weights_that_say_what_they_are_say_it_on_the_pages(tmp_path):
    write_index(tmp_path, FACTS | {"about": "learnt from phantoms"}, {"a": scan_row()})
    assert "learnt from phantoms" in Page(tmp_path / "report.html").text


def test_pages_of_other_results_are_deleted_with_them(chest_page, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(chest_page[1], folder)
    (folder / "reports" / "mine.txt").touch()
    delete_results(folder)
    left = {path.name for path in folder.rglob("*") if path.is_file()}
    assert left == {"chest.mhd", "chest.raw", "mine.txt"}


def test_templates_are_parts_of_the_project():
    names = {path.name for path in report.FOLDER.iterdir()}
    assert {"scan.html", "index.html", "style.css", "viewer.js"} <= names
