"""The page of a scan in a browser. It needs Chromium, Node.js and playwright-core, which .ci/browser installs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NODE_PATH = TESTS.parent / ".ci" / "node" / "node_modules"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = ("1280", "360")


@pytest.fixture(scope="module")
def seen(chest_page):
    """What a person sees on the page of the chest, whose ball is nodule 1."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser or not shutil.which("node"):
        pytest.skip("no Chromium or no Node.js; run .ci/browser")
    environment = os.environ | {"NODE_PATH": os.pathsep.join([str(NODE_PATH), os.environ.get("NODE_PATH", "")])}
    if subprocess.run(["node", "-e", "require('playwright-core')"], env=environment, capture_output=True).returncode:
        pytest.skip("no playwright-core; run .ci/browser")
    page = chest_page[1] / "reports" / "chest.html"
    command = ["node", str(TESTS / "browser.cjs"), str(page), browser]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def axial(look):
    number, _, count = look["slices"][0].split()
    return int(number), int(count)


@pytest.mark.parametrize("width", WIDTHS)
class TestPage:
    def test_nothing_goes_wrong_and_nothing_is_fetched(self, seen, width):
        assert seen[width]["problems"] == []
        assert seen[width]["blocked"]

    def test_it_is_no_wider_than_the_screen(self, seen, width):
        assert seen[width]["start"]["wide"] <= 0

    def test_it_begins_at_the_first_nodule(self, seen, width):
        start = seen[width]["start"]
        assert start["viewer"]
        assert start["status"].endswith("nodule 1")
        assert start["nodule"] > 240
        assert 80 < start["lung"] < 100  # -850 HU in a window from -1350 to 150
        assert start["coloured"] > 50

    def test_wheel_goes_to_the_feet_and_to_the_back(self, seen, width):
        start, wheel, coronal = (seen[width][name] for name in ("start", "wheel", "coronal"))
        assert axial(wheel)[0] == axial(start)[0] + 3  # counted from the head
        numbers = [int(look["slices"][1].split()[0]) for look in (wheel, coronal)]
        assert numbers[1] == numbers[0] + 2

    def test_keys_move_through_the_slices(self, seen, width):
        page = seen[width]
        assert axial(page["ArrowUp"])[0] == axial(page["coronal"])[0] - 1
        assert axial(page["PageDown"])[0] == axial(page["ArrowUp"])[0] + 10
        assert axial(page["Home"])[0] == 1
        assert axial(page["End"])[0] == axial(page["End"])[1]
        assert page["n"]["status"] == page["start"]["status"]

    def test_keys_change_window_contours_and_zoom(self, seen, width):
        page = seen[width]
        assert page["s"]["lung"] == 0  # soft tissue: from -160 HU
        assert page["c"]["coloured"] == 0
        assert page["l"]["lung"] == page["start"]["lung"]
        assert page["+"]["nodule"] == page["c"]["nodule"]

    def test_click_moves_the_other_planes(self, seen, width):
        before, after = seen[width]["+"]["slices"], seen[width]["click"]["slices"]
        assert before[0] == after[0]
        assert before[1] != after[1]
        assert before[2] != after[2]
        assert "nodule" not in seen[width]["click"]["status"]

    def test_drag_in_a_zoomed_plane_does_not_run_away(self, seen, width):
        far, back = seen[width]["drag"]
        assert 0 <= far - back <= 12

    def test_link_of_a_nodule_goes_there(self, seen, width):
        link = seen[width]["link"]
        assert link["status"] == seen[width]["start"]["status"]
        assert link["focus"] == "axial"

    def test_print_shows_pictures_instead_of_the_viewer(self, seen, width):
        assert not seen[width]["print"]["viewer"]
        assert seen[width]["print"]["pictures"] == 1


def test_page_without_scripts_shows_pictures_and_says_why(seen):
    plain = seen["plain"]
    assert plain["picture"]
    assert not plain["viewer"]
    assert "The slices need scripts." in plain["text"]
    assert "solid" in plain["text"]
