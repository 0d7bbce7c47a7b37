"""What is said of wrong data, and that nothing is said of right data: a table of inputs made of one phantom.

python tests/bench/wrong_data.py
python tests/bench/wrong_data.py --right FOLDER_OF_SCANS

Each input goes through ``preprocess.py`` as a data set of one scan.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jsonargparse import auto_cli

from data.phantom import make_phantom
from preprocess import LUNA16Preprocessor
from utils import ANNOTATION_COLUMNS, Geometry, list_scans, read_scan, scan_name

UID = "1.2.3"


@dataclass(frozen=True)
class Data:
    """A data set of one scan.

    Args:
        scan: CT.
        mask: LUNA16's lung mask, labels 3, 4 and 5; None: there is none.
        nodules: World position (x, y, z) and diameter in mm of each (n, 4).
    """

    scan: sitk.Image
    mask: sitk.Image | None
    nodules: np.ndarray

    def with_hu(self, change: Callable[[np.ndarray], np.ndarray]) -> Data:
        """The same with other values of the scan, float32."""
        hu = sitk.GetArrayFromImage(self.scan).astype(np.float32)
        return replace(self, scan=Geometry.from_image(self.scan).image(change(hu).astype(np.float32)))

    def with_mask(self, change: Callable[[np.ndarray], np.ndarray]) -> Data:
        """The same with other labels of the mask, uint8."""
        labels = change(sitk.GetArrayFromImage(self.mask)).astype(np.uint8)
        return replace(self, mask=Geometry.from_image(self.mask).image(np.ascontiguousarray(labels)))

    def with_nodules(self, change: Callable[[np.ndarray], np.ndarray]) -> Data:
        """The same with the nodules at other positions (n, 3)."""
        return replace(self, nodules=np.hstack([change(self.nodules[:, :3]), self.nodules[:, 3:]]))

    def mask_at(self, **changes: tuple[float, ...]) -> Data:
        """The same with a mask whose header is wrong."""
        geometry = replace(Geometry.from_image(self.mask), **changes)
        return replace(self, mask=geometry.image(sitk.GetArrayFromImage(self.mask)))


def phantom_data(index: int = 9, size_xyz: tuple[int, int, int] = (96, 96, 48)) -> Data:
    """A phantom with its mask and its nodules, none of which is smaller than a voxel."""
    phantom = make_phantom(index, seed=17, size_xyz=size_xyz, nodule_free=0, min_diameter_mm=10)
    nodules = [[*nodule.center_xyz, nodule.diameter_mm] for nodule in phantom.nodules]
    return Data(phantom.image, phantom.lungs, np.reshape(nodules, (-1, 4)))


def to_voxels(data: Data) -> Data:
    """Annotations as voxels (x, y, z)."""
    return data.with_nodules(lambda xyz: Geometry.from_image(data.scan).index(xyz)[:, ::-1])


def from_corner(data: Data) -> Data:
    """Annotations in mm from the scan's first voxel."""
    return data.with_nodules(lambda xyz: xyz - data.scan.GetOrigin())


def half_of(labels: np.ndarray, is_left: bool) -> np.ndarray:
    """Labels on one side of the array alone."""
    middle = labels.shape[2] // 2
    return np.where((np.arange(labels.shape[2]) >= middle) == is_left, labels, 0)


VALUES: dict[str, Callable[[Data], Data]] = {
    "HU + 1024": lambda d: d.with_hu(lambda hu: hu + 1024),
    "HU + 1000": lambda d: d.with_hu(lambda hu: hu + 1000),
    "HU - 1024": lambda d: d.with_hu(lambda hu: hu - 1024),
    "scaled to [0, 1]": lambda d: d.with_hu(lambda hu: np.clip((hu + 1000) / 1400, 0, 1)),
    "scaled to [-1, 1]": lambda d: d.with_hu(lambda hu: np.clip((hu + 1000) / 700 - 1, -1, 1)),
    "mean 0, deviation 1": lambda d: d.with_hu(lambda hu: (hu - hu.mean()) / hu.std()),
    "8 bits, lung window": lambda d: d.with_hu(lambda hu: np.clip((hu + 1350) / 1500 * 255, 0, 255).round()),
    "8 bits, soft tissue": lambda d: d.with_hu(lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255).round()),
    "signed 8 bits": lambda d: d.with_hu(lambda hu: np.clip((hu + 1350) / 1500 * 255 - 128, -128, 127).round()),
    "16 bits, stretched": lambda d: d.with_hu(lambda hu: np.clip((hu + 1000) / 1400 * 65535, 0, 65535).round()),
    "per cent": lambda d: d.with_hu(lambda hu: np.clip((hu + 1000) / 14, 0, 100)),
    "HU / 2": lambda d: d.with_hu(lambda hu: hu / 2),
    "HU x 2": lambda d: d.with_hu(lambda hu: hu * 2),
    "HU x 10": lambda d: d.with_hu(lambda hu: hu * 10),
    "inverted": lambda d: d.with_hu(lambda hu: -hu),
    "inverted and shifted": lambda d: d.with_hu(lambda hu: 1024 - hu),
    "attenuation a millimetre": lambda d: d.with_hu(lambda hu: 0.02 * (1 + hu / 1000)),
    "soft-tissue window": lambda d: d.with_hu(lambda hu: np.clip(hu, -160, 240)),
    "a mask instead of a scan": lambda d: d.with_hu(lambda hu: hu < -400),
    "labels instead of a scan": lambda d: d.with_hu(lambda hu: np.digitize(hu, [-900, -400, 0, 200])),
    "noise instead of a scan": lambda d: d.with_hu(lambda hu: np.random.default_rng(0).normal(500, 200, hu.shape)),
    "a chest without lungs": lambda d: replace(d, mask=None).with_hu(lambda hu: np.where(hu < -300, 40, hu)),
}
MASKS: dict[str, Callable[[Data], Data]] = {
    "mask upside down": lambda d: d.with_mask(lambda labels: labels[::-1]),
    "mask front to back": lambda d: d.with_mask(lambda labels: labels[:, ::-1]),
    "mask 30 mm too high": lambda d: d.mask_at(origin=tuple(np.add(d.mask.GetOrigin(), (0, 0, 30)))),
    "mask 120 mm too high": lambda d: d.mask_at(origin=tuple(np.add(d.mask.GetOrigin(), (0, 0, 120)))),
    "mask 40 mm to the left": lambda d: d.mask_at(origin=tuple(np.add(d.mask.GetOrigin(), (40, 0, 0)))),
    "mask without geometry": lambda d: d.mask_at(origin=(0.0, 0.0, 0.0), spacing=(1.0, 1.0, 1.0)),
    "mask with the spacing of another": lambda d: d.mask_at(spacing=tuple(np.multiply(d.mask.GetSpacing(), 0.7))),
    "mask in RAS": lambda d: d.mask_at(origin=tuple(np.multiply(d.mask.GetOrigin(), (-1, -1, 1)))),
    "mask of the whole body": lambda d: d.with_mask(
        lambda labels: np.where(sitk.GetArrayFromImage(d.scan) > -300, 3, labels)
    ),
    "mask of everything": lambda d: d.with_mask(lambda labels: np.full_like(labels, 3)),
    "mask of one lung": lambda d: d.with_mask(lambda labels: half_of(labels, is_left=True)),
    "mask of labels 1 and 2": lambda d: d.with_mask(lambda labels: np.where(labels >= 3, labels - 2, 0)),
    "mask of 0 and 255": lambda d: d.with_mask(lambda labels: np.where(labels >= 3, 255, 0)),
    "empty mask": lambda d: d.with_mask(lambda labels: labels * 0),
}
ANNOTATIONS: dict[str, Callable[[Data], Data]] = {
    "annotations in RAS": lambda d: d.with_nodules(lambda xyz: xyz * [-1, -1, 1]),
    "annotations as z, y, x": lambda d: d.with_nodules(lambda xyz: xyz[:, ::-1]),
    "annotations in voxels": to_voxels,
    "annotations from the scan's corner": from_corner,
    "annotations in centimetres": lambda d: d.with_nodules(lambda xyz: xyz / 10),
}
WRONG = {**VALUES, **MASKS, **ANNOTATIONS}
RIGHT: dict[str, Callable[[Data], Data]] = {
    "as it is": lambda d: d,
    "HU clipped to [-1000, 400]": lambda d: d.with_hu(lambda hu: np.clip(hu, -1000, 400)),
    "HU from -1024 on": lambda d: d.with_hu(lambda hu: np.maximum(hu, -1024)),
    "-3024 outside of the field of view": lambda d: d.with_hu(
        lambda hu: np.where(np.hypot(*np.mgrid[-1 : 1 : hu.shape[1] * 1j, -1 : 1 : hu.shape[2] * 1j]) > 1, -3024, hu)
    ),
    "very dark lungs": lambda d: d.with_hu(lambda hu: hu - 90.0 * (hu < -500)),
    "bright lungs, as after breathing out": lambda d: d.with_hu(lambda hu: hu + 150.0 * ((hu < -500) & (hu > -950))),
    "-2000 outside, and lossy": lambda d: d.with_hu(
        lambda hu: np.where(
            np.hypot(*np.mgrid[-1 : 1 : hu.shape[1] * 1j, -1 : 1 : hu.shape[2] * 1j]) > 1,
            -2000 + np.random.default_rng(0).normal(0, 5, hu.shape).round(),
            hu,
        )
    ),
    "noise of 150 HU": lambda d: d.with_hu(
        lambda hu: hu + (hu > -1100) * np.random.default_rng(0).normal(0, 150, hu.shape)
    ),
    "no nodules": lambda d: replace(d, nodules=d.nodules[:0]),
}


def said_of(data: Data) -> str:
    """What preprocess.py says of a data set: its warnings, errors and failures; '' where it says nothing."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for kind in ("raw", "lungs"):
                (folder / kind).mkdir()
            sitk.WriteImage(data.scan, str(folder / "raw" / f"{UID}.mha"))
            if data.mask is not None:
                sitk.WriteImage(data.mask, str(folder / "lungs" / f"{UID}.mha"))
            table = pd.DataFrame(data.nodules, columns=list(ANNOTATION_COLUMNS[1:]))
            table.insert(0, "seriesuid", UID)
            table.to_csv(folder / "annotations.csv", index=False)
            options = {"target_size": (32, 64, 64), "num_processes": 1}
            preprocessor = LUNA16Preprocessor(
                folder / "raw", folder / "annotations.csv", folder / "lungs", folder / "out", **options
            )
            preprocessor.process_all()
            return " / ".join(dict.fromkeys(record.replace(str(folder), "") for record in records))
    finally:
        logger.removeHandler(handler)


def main(right: Path | None = None) -> None:
    """Prints what is said of each wrong input, and of each right one.

    Args:
        right: Folder of real scans, of which nothing should be said that is not so; null takes none.
    """
    data = phantom_data()
    print("| wrong input | what is said |\n| --- | --- |")
    for name, change in WRONG.items():
        print(f"| {name} | {said_of(change(data)) or 'NOTHING'} |")
    print("\n| right input | what is said |\n| --- | --- |")
    for name, change in RIGHT.items():
        print(f"| {name} | {said_of(change(data)) or 'nothing'} |")
    for path in [] if right is None else list_scans(right):
        said = said_of(Data(read_scan(path), None, np.empty((0, 4))))
        print(f"| {scan_name(path)[-20:]} | {said or 'nothing'} |")


if __name__ == "__main__":
    auto_cli(main)
