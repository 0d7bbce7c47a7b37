"""Small phantom data sets that the tests share, made once a session, a chest, and a scan format from outside."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

if os.environ.get("TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same path on every machine

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

import preprocess
from data.phantom import write_phantoms
from data.report import hu_table
from infer import NoduleInferencer
from preprocess import Case, LUNA16Preprocessor
from train import Trainer, ValidationSettings
from utils import SCAN_READERS, AnnotatedNodule, Geometry, ScanHeader, ScanMetadata, ScanReader, read_processed_list

torch.set_num_threads(1)  # two busy threads on a shared core are slower than one

TINY = {"channels": (4, 8), "strides": (2,), "num_res_units": 0, "dropout": 0.0}  # a network for one second


def nodule_at(*index_zyx, diameter_mm=5.0, voxels=5):
    """An annotated nodule on a grid of 1 mm from the origin."""
    return AnnotatedNodule(index_zyx[::-1], index_zyx, diameter_mm, voxels)


def metadata_of(*nodules, seriesuid="a", shape_zyx=(40, 40, 40), fold=None, patient=None):
    """Metadata of a scan on a grid of 1 mm from the origin."""
    grid = Geometry(shape_zyx, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return ScanMetadata(seriesuid, grid, nodules, fold, patient, "none", "", grid, {}, "")


def image_of(array: np.ndarray, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None) -> sitk.Image:
    """An image of an array (z, y, x); the other arguments are ITK's."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction or np.eye(3).ravel().tolist())
    return image


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escapes what was logged or printed of names that are no UTF-8, which pytest-xdist cannot carry."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Lets Ctrl-C interrupt, which a shell turns off for what it starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four anisotropic scans in LUNA16's format; the third is flipped, the second has no nodule."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantoms(folder, num_scans=4, size_xyz=(64, 64, 32), min_diameter_mm=12, num_processes=2)
    return folder


@pytest.fixture(scope="session")
def processed_dir(phantom_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms, prepared at 32 x 48 x 48."""
    folder = tmp_path_factory.mktemp("processed")
    LUNA16Preprocessor(
        phantom_dir / "raw",
        phantom_dir / "annotations.csv",
        phantom_dir / "seg-lungs-LUNA16",
        folder,
        target_size=(32, 48, 48),
        num_processes=2,
    ).process_all()
    return folder


@pytest.fixture(scope="session")
def run_dir(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two epochs with a tiny network; its checkpoints are read by several tests."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(processed_dir, folder, num_epochs=2, device="cpu", mixed_precision=False, **TINY).train()
    return folder


@pytest.fixture(scope="session")
def fold_run(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of one epoch with fold 2 held out: the third scan, whose arrays were not there to be trained on."""
    folder = tmp_path_factory.mktemp("fold")
    data = folder / "data"
    shutil.copytree(processed_dir, data)
    for kind in ("images", "masks"):
        (data / kind / f"{read_processed_list(data)[2]}.npy").unlink()
    Trainer(
        data, folder, num_epochs=1, validation=ValidationSettings(fold=2), device="cpu", mixed_precision=False, **TINY
    ).train()
    return folder


class StackReader(ScanReader):
    """A format that the project has never heard of: a folder with stack.json, and the voxels in voxels.npy."""

    def accepts(self, path: Path) -> bool:
        return path.name.endswith("-stack")

    def name(self, path: Path) -> str:
        return path.name.removesuffix("-stack")

    def files(self, path: Path) -> tuple[Path, ...]:
        if not path.is_dir():
            raise FileNotFoundError(f"scan {path} does not exist")
        return path / "stack.json", path / "voxels.npy"

    def read_header(self, path: Path) -> ScanHeader:
        values = json.loads((path / "stack.json").read_text())
        return ScanHeader(Geometry.from_dict(values["geometry"]), values["voxel_bytes"])

    def read_image(self, path: Path) -> sitk.Image:
        return self.read_header(path).geometry.image(np.load(path / "voxels.npy"))


def write_stack(folder: Path, image: sitk.Image, **changes: list[float]) -> Path:
    """The folder that StackReader reads; changes are of the geometry in its header."""
    array = sitk.GetArrayFromImage(image)
    folder.mkdir(parents=True)
    header = {"geometry": Geometry.from_image(image).to_dict() | changes, "voxel_bytes": array.itemsize}
    (folder / "stack.json").write_text(json.dumps(header))
    np.save(folder / "voxels.npy", array)
    return folder


@pytest.fixture
def stack_reader() -> Iterator[None]:
    """Registers that format from outside, for one test."""
    SCAN_READERS.append(StackReader())
    yield
    SCAN_READERS.pop()


def toy_cases(raw_data_dir: Path, annotations_path: Path, lung_masks_dir: Path) -> list[Case]:
    """Two patients' scans in folders of a format and a layout of their own; of one the lungs are known."""
    room = raw_data_dir / "ward"
    return [
        Case("toy-a", room / "a-stack", room / "a-lungs-stack", (9,), ((20.0, 20.0, 20.0, 6.0),), "P1", 1),
        Case("toy-b", room / "b-stack", patient="P2", fold=0),
    ]


@pytest.fixture
def toy_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack_reader: None) -> Path:
    """Registers a data set and its format from outside; returns the folder that the scans lie in."""
    monkeypatch.setitem(preprocess.DATA_SETS, "toy", toy_cases)
    lungs = np.full((40, 40, 40), 8, np.uint8)
    lungs[4:36, 4:36, 4:36] = 9
    rng = np.random.default_rng(0)
    scans = {name: rng.normal(-400, 200, lungs.shape).astype(np.int16) for name in "ab"}
    for name, array in (scans | {"a-lungs": lungs}).items():
        write_stack(tmp_path / "toy" / "ward" / f"{name}-stack", sitk.GetImageFromArray(array))
    return tmp_path / "toy"


@pytest.fixture(scope="session")
def two_folders(processed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The prepared phantoms, the first two in one folder and the others in another."""
    uids, folders = read_processed_list(processed_dir), []
    for own in (uids[:2], uids[2:]):
        folder = tmp_path_factory.mktemp("part")
        shutil.copytree(processed_dir, folder, dirs_exist_ok=True)
        for uid in set(uids) - set(own):
            (folder / f"{uid}_metadata.json").unlink()
        (folder / "processed_files.txt").write_text("".join(f"{uid}\n" for uid in own))
        folders.append(folder)
    return folders


class Bright(nn.Module):
    """Takes what is brighter than a level for nodule."""

    def __init__(self, level=0.75):
        super().__init__()
        self.level = level

    def forward(self, image):
        return 40 * (image - self.level)


class Nothing(nn.Module):
    """Finds no nodule."""

    def forward(self, image):
        return torch.full_like(image, -10)


BALL_CENTER, BALL_RADIUS_MM = (-60.0, 12.0, -20.0), 16.0
HALF = 0.55  # brightness halfway between lung and ball


def chest(shape_zyx, flipped=False):
    """A chest of boxes in LPS mm: air, body (-350 HU), two lungs (-850 HU), and a ball of 400 HU in one of them."""
    size = np.array([300.0, 280.0, 240.0])  # x, y, z, around the origin
    spacing = size / shape_zyx[::-1]
    first = -size / 2 + spacing / 2
    x, y, z = (first[i] + spacing[i] * np.arange(shape_zyx[2 - i]) for i in range(3))
    x, y, z = x[None, None, :], y[None, :, None], z[:, None, None]
    array = np.full(shape_zyx, -1000, np.int16)
    array[(abs(x) < 130) & (abs(y) < 110) & (abs(z) < 500)] = -350
    array[(abs(x) > 20) & (abs(x) < 105) & (abs(y) < 80) & (abs(z) < 90)] = -850
    cx, cy, cz = BALL_CENTER
    array[(x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 <= BALL_RADIUS_MM**2] = 400
    origin, direction = first.copy(), np.eye(3)
    if flipped:  # as about 14 scans of LUNA16: the same patient, x and y stored from the other end
        array = np.ascontiguousarray(array[:, ::-1, ::-1])
        origin[:2] = -first[:2]
        direction[:2] *= -1
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(origin.tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    return image


def write_chest(path, shape_zyx=(40, 56, 60), flipped=False):
    sitk.WriteImage(chest(shape_zyx, flipped), str(path))
    return path


@pytest.fixture
def trained(run_dir, tmp_path):
    """An inferencer of the checkpoint, whose network may be replaced by one that finds something sensible."""

    def make(model=None, output_dir=tmp_path / "out", **arguments):
        path = run_dir / "checkpoints" / "best_model.pth"
        arguments = {"min_score": 0.0} | arguments
        inferencer = NoduleInferencer(path, output_dir, "cpu", mixed_precision=False, **arguments)
        inferencer.predictor.model = model or inferencer.predictor.model
        return inferencer

    return make


def unpack_voxels(text: str, shape_zyx: Sequence[int]) -> np.ndarray:
    """CT values (z, y, x) that ``pack_voxels`` packed, as the page's script unpacks them."""
    residuals = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape_zyx)
    voxels = np.zeros(shape_zyx, np.uint8)
    for y, x in itertools.product(range(shape_zyx[1]), range(shape_zyx[2])):
        left = voxels[:, y, x - 1].astype(np.uint16) if x else 0
        above = voxels[:, y - 1, x].astype(np.uint16) if y else 0
        voxels[:, y, x] = (residuals[:, y, x] + ((left + above) >> 1)) & 255
    return hu_table()[voxels]


class Page(HTMLParser):
    """The parts of a page: its elements, the text of each script by id, and all text that is shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.elements.append((tag, values))
        self._inside = values.get("id", "code") if tag == "script" else tag if tag == "style" else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside and self._inside != "style":
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        elif not self._inside:
            self.text += data

    def all(self, tag):
        return [values for name, values in self.elements if name == tag]

    @property
    def scan(self):
        return json.loads(self.scripts["scan"])

    @property
    def grid(self):
        return Geometry(tuple(self.scan["shape"]), tuple(self.scan["origin"]), tuple(self.scan["spacing"][::-1]))

    @property
    def hu(self):
        return unpack_voxels(self.scripts["voxels"].strip(), self.scan["shape"])

    def labels(self, name="runs"):
        flat = np.zeros(np.prod(self.scan["shape"]), int)
        for start, length, label in np.reshape(self.scan[name], (-1, 3)):
            flat[start : start + length] = label
        return flat.reshape(self.scan["shape"])


@pytest.fixture(scope="session")
def chest_page(run_dir, tmp_path_factory):
    """(scan, folder of results, page) of the chest with a ball in the right lung, stored from the other end."""
    folder = tmp_path_factory.mktemp("report")
    path = write_chest(folder / "chest.mhd", shape_zyx=(80, 112, 120), flipped=True)
    inferencer = NoduleInferencer(run_dir / "checkpoints" / "best_model.pth", folder, "cpu", mixed_precision=False)
    inferencer.predictor.model = Bright(HALF)
    inferencer.infer_scan(path)
    return sitk.ReadImage(str(path)), folder, Page(folder / "reports" / "chest.html")
