"""Speed of each step beside the plain way to write it with MONAI and SimpleITK; every ratio is measured in one run.

python tests/bench/benchmark.py
python tests/bench/benchmark.py --rows '[extraction,froc]' --repeats 5
python tests/bench/benchmark.py --device cuda
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from jsonargparse import auto_cli
from monai import transforms
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from scipy.ndimage import distance_transform_edt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data import dicom
from data.phantom import make_phantom
from dataset import Augmentation, LUNA16Dataset, ScanSampler, augment_batch, make_loader
from infer import WINDOW_OVERLAP, NoduleInferencer, Predictor, extract_nodules
from model import (
    BOUNDARY_REACH,
    LOSSES,
    NETWORKS,
    InferenceSettings,
    LungNodule3DUNet,
    boundary_distance,
    deeply_supervised,
    to_device,
)
from preprocess import LUNA16Preprocessor, find_scans
from train import WARM_UP, Trainer, ValidationSettings
from utils import (
    ANNOTATION_COLUMNS,
    CANDIDATE_COLUMNS,
    LARGE_PAGES,
    PATIENT,
    WAITING,
    Geometry,
    autocast_dtype,
    read_processed_list,
    read_scan,
    select_device,
)
from validate import froc

SHAPE = (64, 256, 256)
UNITS: dict[str, Any] = {"num_res_units": 2, "dropout": 0.1}
SMALL_NETWORK = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2)} | UNITS  # for a CPU
NETWORK = {"channels": (32, 64, 128, 256, 512), "strides": (2, 2, 2, 2)} | UNITS  # train.py's default, for a GPU
STEPS = 100 * 356  # of train.py's default training on LUNA16
WINDOW = (96, 96, 96)
BATCH_SIZE = 2
WORKERS = 4  # train.py's default
PASTES = Augmentation().paste_per_scan // 2  # into a scan, in the mean of a training


class Bench:
    """Data and settings that the rows share.

    Args:
        folder: Scratch folder.
        device: Where networks run.
        repeats: Pairs of measurements a row; the median ratio is reported.
    """

    def __init__(self, folder: Path, device: torch.device, repeats: int) -> None:
        self.folder, self.device, self.repeats = folder, device, repeats
        self.network = NETWORK if device.type == "cuda" else SMALL_NETWORK
        self.step: tuple[float, float, float] | None = None  # FLOP, bytes and seconds of a training step, if measured
        self.half = autocast_dtype(device, mixed_precision=True)  # what the networks here compute in
        self._prepared: LUNA16Preprocessor | None = None

    @property
    def preprocessor(self) -> LUNA16Preprocessor:
        """Preprocessor of two scans of 512 x 512 x 300, written on first use."""
        if self._prepared is None:
            raw, lungs = self.folder / "raw", self.folder / "lungs"
            raw.mkdir()
            lungs.mkdir()
            rows = []
            for index in (0, 2):
                phantom = make_phantom(index, size_xyz=(256, 256, 120), min_diameter_mm=6)
                for image, path in ((phantom.image, raw), (phantom.lungs, lungs)):
                    large = enlarge(image, (512, 512, 300), linear=path == raw)
                    sitk.WriteImage(large, str(path / f"{phantom.seriesuid}.mhd"), useCompression=path == lungs)
                rows += [(phantom.seriesuid, *nodule.center_xyz, nodule.diameter_mm) for nodule in phantom.nodules]
            pd.DataFrame(rows, columns=ANNOTATION_COLUMNS).to_csv(self.folder / "annotations.csv", index=False)
            self._prepared = LUNA16Preprocessor(
                raw, self.folder / "annotations.csv", lungs, self.folder / "processed", target_size=SHAPE
            )
            self._prepared.process_all()
        return self._prepared

    @property
    def processed(self) -> Path:
        """The two scans, prepared."""
        return self.preprocessor.output_dir

    @property
    def plain_precisions(self) -> dict[str, torch.dtype | None]:
        """What the plain networks compute in: half precision on a GPU; on a CPU float32, as is usual, and then half."""
        full = {} if self.device.type == "cuda" else {"plain in float32": None}
        return full | ({f"plain in {str(self.half)[6:]}": self.half} if self.half else {})

    @property
    def plain_workers(self) -> list[int]:
        """Processes that load data for the plain training: as many as here, and one a core."""
        return [WORKERS, os.cpu_count() or 1] if self.device.type == "cuda" else [0]

    def autocast(self, dtype: torch.dtype | None) -> torch.autocast:
        """Of the plain networks."""
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def compare(self, ours: Callable[[], Any], plain: Callable[[], Any]) -> tuple[float, float, float]:
        """Median seconds of either, and the median ratio plain / ours, of pairs run in turn after a warm-up."""
        pairs = []
        for _ in range(self.repeats + 1):
            seconds = []
            for work in (ours, plain):
                wait_for(self.device)
                start = time.perf_counter()
                work()
                wait_for(self.device)
                seconds.append(time.perf_counter() - start)
            pairs.append(seconds)
        first, second = zip(*pairs[1:], strict=True)
        ratios = [b / a for a, b in pairs[1:]]
        return statistics.median(first), statistics.median(second), statistics.median(ratios)


def enlarge(image: sitk.Image, size_xyz: tuple[int, int, int], linear: bool) -> sitk.Image:
    """The same volume with more voxels."""
    spacing = [s * n / m for s, n, m in zip(image.GetSpacing(), image.GetSize(), size_xyz, strict=True)]
    kind = sitk.sitkLinear if linear else sitk.sitkNearestNeighbor
    return sitk.Resample(
        image, size_xyz, sitk.Transform(), kind, image.GetOrigin(), spacing, image.GetDirection(), -1000
    )


@contextmanager
def one_itk_thread() -> Iterator[None]:
    """As in a worker process of preprocess.py."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


# ------------------------------------------------------------------------------------------------------------- rows


def write_series(folder: Path, image: sitk.Image) -> None:
    """A DICOM series of CT slices as ITK writes it."""
    folder.mkdir()
    for number in range(image.GetSize()[2]):
        plane = image[:, :, number]
        position = image.TransformIndexToPhysicalPoint((0, 0, number))
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|0013": str(number + 1), "0028|1052": "-1024"}
        tags |= {"0020|0032": "\\".join(map(str, position)), "0020|0037": r"1\0\0\0\1\0", "0028|1053": "1"}
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(plane)


def reading(bench: Bench) -> Iterator[tuple]:
    """Seconds of a DICOM series of 512 x 512 x 300 with all checks, beside ITK's reader, which has none."""
    folder, scans = bench.folder / "series", find_scans(bench.preprocessor.raw_data_dir)
    write_series(folder, sitk.Cast(sitk.ReadImage(str(next(iter(scans.values())))), sitk.sitkInt16))

    def ours() -> sitk.Image:
        for cached in (dicom._meta, dicom._read):
            cached.cache_clear()
        return read_scan(folder)

    def plain() -> sitk.Image:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        return reader.Execute()

    assert sitk.GetArrayFromImage(ours()).tobytes() == sitk.GetArrayFromImage(plain()).tobytes()
    yield "reading a DICOM series of 512 x 512 x 300", "s/scan", 1, *bench.compare(ours, plain)


def preprocessing(bench: Bench) -> Iterator[tuple]:
    """Seconds a scan of 512 x 512 x 300 to 64 x 256 x 256, on one thread: read, resample, lungs, mask, write."""
    maker = bench.preprocessor
    uid, path = next(iter(maker.scans.items()))
    rows = maker.annotations[maker.annotations["seriesuid"] == uid][list(ANNOTATION_COLUMNS[1:])].to_numpy()

    def plain() -> None:
        scan, labels = sitk.ReadImage(str(path)), sitk.ReadImage(str(maker.lung_masks_dir / f"{uid}.mhd"))
        lungs = sitk.BinaryThreshold(labels, 3, 4)
        size = [round(n * s) for n, s in zip(scan.GetSize(), scan.GetSpacing(), strict=True)]
        onto = (size, sitk.Transform()), (scan.GetOrigin(), (1.0, 1.0, 1.0), scan.GetDirection())
        scan = sitk.Resample(scan, *onto[0], sitk.sitkLinear, *onto[1], -1000)
        lungs = sitk.BinaryDilate(sitk.Resample(lungs, *onto[0], sitk.sitkNearestNeighbor, *onto[1]), [8] * 3)
        image = np.clip((sitk.GetArrayFromImage(scan).astype(np.float32) + 1000) / 1400, 0, 1)
        image[sitk.GetArrayFromImage(lungs) == 0] = 0
        mask = np.zeros(image.shape, np.float32)
        z, y, x = np.ogrid[tuple(slice(n) for n in image.shape)]
        for *center, diameter in rows:
            i, j, k = scan.TransformPhysicalPointToContinuousIndex(center)
            mask[(x - i) ** 2 + (y - j) ** 2 + (z - k) ** 2 <= (diameter / 2) ** 2] = 1
        for name, array, mode in (("image", image, "trilinear"), ("mask", mask, "nearest")):
            np.save(bench.folder / f"{name}.npy", transforms.Resize(SHAPE, mode=mode)(array[None]).numpy())

    with one_itk_thread():
        yield "preprocessing", "s/scan", 1, *bench.compare(lambda: maker.process_single_scan(uid), plain)


def plain_loader(data_dir: Path, seriesuids: Sequence[str], workers: int, seed: int = 0) -> DataLoader:
    """The same augmentation by MONAI's dictionary transforms; without workers, in the process that asks for a batch."""
    both = ["image", "mask"]
    steps = [
        transforms.LoadImaged(both, reader="NumpyReader"),
        transforms.EnsureChannelFirstd(both, channel_dim="no_channel"),
        transforms.EnsureTyped(both, dtype=torch.float32, track_meta=False),
        transforms.RandRotate90d(both, prob=0.5, spatial_axes=(1, 2)),
        *(transforms.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
        transforms.RandAffined(
            both, prob=0.3, rotate_range=[0.26] * 3, scale_range=[0.1] * 3, mode=("bilinear", "nearest")
        ),
        transforms.RandGaussianNoised("image", prob=0.3, std=0.05),
        transforms.RandScaleIntensityd("image", prob=0.3, factors=0.1),
        transforms.RandShiftIntensityd("image", prob=0.3, offsets=0.1),
    ]
    files = [
        {"image": data_dir / "images" / f"{uid}.npy", "mask": data_dir / "masks" / f"{uid}.npy"} for uid in seriesuids
    ]
    return DataLoader(
        Dataset(files, transforms.Compose(steps).set_random_state(seed)),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        pin_memory=workers > 0,
        persistent_workers=workers > 0,
    )


def loading(bench: Bench) -> Iterator[tuple]:
    """Seconds a sample of 64 x 256 x 256, read and augmented."""
    repeats = 64 if bench.device.type == "cuda" else 8
    uids = read_processed_list(bench.processed) * repeats
    sampler = ScanSampler(len(uids), 0, PASTES, sys.maxsize)
    loader = make_loader(
        LUNA16Dataset(bench.processed, uids, Augmentation()), sampler, BATCH_SIZE, WORKERS, bench.device
    )
    theirs = plain_loader(bench.processed, uids, bench.plain_workers[-1])

    def ours() -> None:
        sampler.epoch += 1
        for batch in loader:
            image, mask = (batch[name].to(bench.device) for name in ("image", "mask"))
            augment_batch(image.float(), mask, batch["augmentation"])

    def plain() -> None:
        for batch in theirs:
            batch["image"].to(bench.device), batch["mask"].to(bench.device)

    yield "loading and augmentation", "s/sample", len(uids), *bench.compare(ours, plain)


def training(bench: Bench) -> Iterator[tuple]:
    """Seconds a step of two samples, data included, and the share of it that waits for data."""
    trainer = Trainer(
        bench.processed,
        bench.folder / "run",
        device=str(bench.device),
        validation=ValidationSettings(fraction=0.5),
        overwrite=True,
        **bench.network,
    )
    repeats = 64 if bench.device.type == "cuda" else 4  # so many that starting an epoch does not count for much
    uids = read_processed_list(bench.processed) * repeats
    dataset = LUNA16Dataset(bench.processed, uids, Augmentation(), cache=None, device=bench.device)
    trainer._set_global_states()
    trainer.sampler = ScanSampler(len(uids), 0, PASTES, sys.maxsize)
    trainer.loader = make_loader(dataset, trainer.sampler, BATCH_SIZE, WORKERS, bench.device)
    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=1, norm="BATCH", **bench.network).to(bench.device)
    loss, optimizer = DiceCELoss(sigmoid=True), torch.optim.AdamW(network.parameters(), 1e-4)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.half == torch.float16)
    waited = []

    def ours() -> None:
        trainer.epoch += 1
        trainer.sampler.epoch = trainer.epoch
        times = [now(bench.device)]
        for batch in trainer.loader:
            times.append(now(bench.device))
            figures = trainer._step(batch)
            times.append(now(bench.device))
        figures.cpu()
        waiting = sum(seconds_between(*pair) for pair in zip(times[::2], times[1::2], strict=False))
        waited.append(waiting / seconds_between(times[0], times[-1]))

    def plain(dtype: torch.dtype | None, loader: DataLoader) -> None:
        for batch in loader:
            image, mask = batch["image"].to(bench.device), batch["mask"].to(bench.device)
            optimizer.zero_grad()
            with bench.autocast(dtype):
                value = loss(network(image), mask)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            value.item()

    with FlopCounterMode(display=False) as counter, ByteCounter() as moved, peak_memory(bench.device) as peak:
        trainer._step(next(iter(trainer.loader)))
    for batch in itertools.islice(trainer.loader, WARM_UP):  # the last of them is recorded
        trainer._step(batch)
    steps = len(uids) // BATCH_SIZE
    for (name, dtype), workers in itertools.product(bench.plain_precisions.items(), bench.plain_workers):
        measured = bench.compare(ours, partial(plain, dtype, plain_loader(bench.processed, uids, workers)))
        loaded = f", {workers} workers" if workers else ""
        yield f"training step with data, {name}{loaded}", "s/step", steps, *measured
    bench.step = counter.get_total_flops(), moved.total, measured[0] / steps
    yield "  share of it that waits for data", "", 1, statistics.median(waited[1:]), math.nan, math.nan
    yield from peak


def inference(bench: Bench) -> Iterator[tuple]:
    """Seconds for a scan of 280 x 288 x 352 voxels in windows of 96, the overlap the same."""
    torch.manual_seed(0)
    network = to_device(LungNodule3DUNet(**bench.network), bench.device).eval()
    inferencer = NoduleInferencer(device=str(bench.device), model=network, settings=InferenceSettings(window=WINDOW))
    theirs = UNet(spatial_dims=3, in_channels=1, out_channels=1, norm="BATCH", **bench.network).to(bench.device).eval()
    image = np.random.default_rng(0).random((280, 288, 352), np.float32).astype(np.float16)

    def plain(dtype: torch.dtype | None) -> np.ndarray:
        with torch.no_grad(), bench.autocast(dtype):
            tensor = torch.from_numpy(image.astype(np.float32))[None, None].to(bench.device)
            logits = sliding_window_inference(tensor, WINDOW, 4, theirs, WINDOW_OVERLAP, "gaussian")
            return torch.sigmoid(logits)[0, 0].float().cpu().numpy()

    for name, dtype in bench.plain_precisions.items():
        measured = bench.compare(lambda: inferencer.predict_probability(image), partial(plain, dtype))
        yield f"inference, {name}", "s/scan", 1, *measured
    with peak_memory(bench.device) as peak:
        inferencer.predict_probability(image)
    yield from peak


def looks(bench: Bench) -> Iterator[tuple]:
    """Seconds for a window of 48 x 48 x 48 and three mirror images of it; plain, one after the other."""
    torch.manual_seed(0)
    network = to_device(LungNodule3DUNet(**bench.network), bench.device).eval()
    settings = InferenceSettings(window=(48, 48, 48), mirrors=3, everywhere=True)
    predictor = Predictor(network, settings, str(bench.device))
    image = torch.rand(1, 1, *settings.window).to(bench.device)

    def plain() -> torch.Tensor:
        with torch.inference_mode(), bench.autocast(bench.half):
            mirrored = ([], [2], [3], [4])
            views = [network(image.flip(axes)).float().sigmoid().flip(axes) for axes in mirrored]
            return sum(views) / 4

    yield "window and three mirror images", "s", 1, *bench.compare(lambda: predictor.logits(image), plain)


def distances(bench: Bench) -> Iterator[tuple]:
    """Seconds a step for the distance maps of the boundary loss, of eight patches of 32 x 32 x 32; plain, by SciPy."""
    masks = torch.zeros(8, 1, 32, 32, 32, dtype=torch.bool, device=bench.device)
    for number, mask in enumerate(masks[:5, 0], start=2):  # three patches without a nodule
        mask[10 : 10 + number, 20 - number : 20, 8 : 8 + 2 * number] = True

    def plain() -> torch.Tensor:
        maps = np.ones(masks.shape, np.float32)
        for number, mask in enumerate(masks.cpu().numpy()):
            if mask.any():
                signed = np.where(mask, 0.5 - distance_transform_edt(mask), distance_transform_edt(~mask) - 0.5)
                maps[number] = np.clip(signed / BOUNDARY_REACH, -1, 1)
        return torch.from_numpy(maps).to(bench.device)

    torch.testing.assert_close(boundary_distance(masks), plain())
    yield "distance maps of eight patches", "s/step", 1, *bench.compare(lambda: boundary_distance(masks), plain)


def choices(bench: Bench) -> Iterator[tuple]:
    """Seconds of other networks and losses; plain, of the defaults."""
    patches, window = torch.rand(8, 1, 32, 32, 32), torch.rand(1, 1, *WINDOW)
    truth = torch.zeros_like(patches)
    truth[:3, :, 12:20, 12:20, 12:20] = 1
    patches, truth, window = (array.to(bench.device) for array in (patches, truth, window))

    def stepper(network_name: str, loss_name: str) -> Callable[[], None]:
        """Takes one training step."""
        network = to_device(NETWORKS[network_name](**bench.network), bench.device)
        loss = LOSSES[loss_name](per_sample=True).to(bench.device)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)

        def step() -> None:
            with bench.autocast(bench.half):
                logits = network(patches)
            deeply_supervised(loss, logits, truth).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def looker(name: str) -> Callable[[], torch.Tensor]:
        """Looks at one window."""
        network = to_device(NETWORKS[name](**bench.network), bench.device).eval()

        def look() -> torch.Tensor:
            with torch.inference_mode(), bench.autocast(bench.half):
                return network(window)

        return look

    default_step, default_look = stepper("unet", "dice_bce"), looker("unet")
    for name in NETWORKS:
        if name != "unet":
            yield f"step, {name} for unet", "s/step", 1, *bench.compare(stepper(name, "dice_bce"), default_step)
            yield f"window, {name} for unet", "s", 1, *bench.compare(looker(name), default_look)
    for name in LOSSES:
        if name != "dice_bce":
            yield f"step, {name} for dice_bce", "s/step", 1, *bench.compare(stepper("unet", name), default_step)


def extraction(bench: Bench) -> Iterator[tuple]:
    """Seconds for the nodules of a mask of 256 x 256 x 256 with 50 balls, scored."""
    rng = np.random.default_rng(0)
    mask = np.zeros((256, 256, 256), np.uint8)
    ball = np.linalg.norm(np.mgrid[-6:7, -6:7, -6:7], axis=0)
    for z, y, x in rng.permutation(np.stack(np.meshgrid(*[np.arange(12, 240, 30)] * 3), -1).reshape(-1, 3))[:50]:
        mask[z : z + 13, y : y + 13, x : x + 13] = ball <= rng.uniform(2, 6)
    probability = np.where(mask > 0, 0.9, 0.0).astype(np.float32)
    geometry = Geometry(mask.shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def plain() -> list[dict[str, Any]]:
        labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(mask)))
        found = []
        for label in range(1, labels.max() + 1):
            part = labels == label
            z, y, x = np.nonzero(part)
            found.append(
                {
                    "center": (x.mean(), y.mean(), z.mean()),
                    "volume": int(part.sum()),
                    "probability": float(probability[part].mean()),
                    "bbox": (z.min(), z.max() + 1, y.min(), y.max() + 1, x.min(), x.max() + 1),
                }
            )
        return found

    ours = extract_nodules(mask, geometry, probability)
    assert len(ours) == len(plain()) == 50
    yield (
        "extraction of 50 nodules",
        "s/scan",
        1,
        *bench.compare(lambda: extract_nodules(mask, geometry, probability), plain),
    )


def make_marks(count: int) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Marks, nodules and names of ``count`` scans, as many a scan as in LUNA16 with 50 000 marks; most are found."""
    rng = np.random.default_rng(0)
    scans = [f"1.2.{index}" for index in range(count)]

    def points(number: int, columns: tuple[str, ...]) -> pd.DataFrame:
        places = {column: rng.uniform(0, 300, number) for column in columns[1:]}
        return pd.DataFrame({columns[0]: rng.choice(scans, number), **places})

    nodules = points(1186 * count // 888, ANNOTATION_COLUMNS)
    nodules["diameter_mm"] = rng.uniform(4, 30, len(nodules))
    marks = points(50_000 * count // 888, CANDIDATE_COLUMNS)
    marks["probability"] = rng.random(len(marks))
    hits = nodules.sample(frac=0.85, random_state=0)
    marks.loc[: len(hits) - 1, list(CANDIDATE_COLUMNS[:4])] = hits[list(CANDIDATE_COLUMNS[:4])].to_numpy()
    return marks, nodules, scans


def froc_of_888(bench: Bench) -> Iterator[tuple]:
    """Seconds for the FROC of 888 scans and 50 000 marks with 1000 bootstraps."""
    marks, nodules, scans = make_marks(888)
    rng = np.random.default_rng(0)

    def plain() -> list[np.ndarray]:
        events: dict[str, list[tuple[float, bool]]] = {uid: [] for uid in scans}
        counts = dict.fromkeys(scans, 0)
        for uid in scans:
            near, found = nodules[nodules["seriesuid"] == uid], marks[marks["seriesuid"] == uid]
            counts[uid] = len(near)
            taken = set()
            for _, nodule in near.iterrows():
                best = None
                for row, mark in found.iterrows():
                    gap = sum((nodule[c] - mark[c]) ** 2 for c in ANNOTATION_COLUMNS[1:4]) ** 0.5
                    if gap < nodule["diameter_mm"] / 2:
                        taken.add(row)
                        best = max(mark["probability"], best or 0.0)
                if best is not None:
                    events[uid].append((best, True))
            events[uid] += [(p, False) for row, p in found["probability"].items() if row not in taken]
        curves = []
        for _ in range(1000):
            drawn = rng.choice(scans, len(scans))
            values = np.array([event for uid in drawn for event in events[uid]])
            order = np.argsort(-values[:, 0])
            true = values[order, 1]
            curves.append(np.interp(2.0 ** np.arange(-3, 4), np.cumsum(1 - true) / len(scans), np.cumsum(true)))
        return curves

    yield "FROC of 888 scans", "s", 1, *bench.compare(lambda: froc(marks, nodules, None, scans), plain)


def seconds_a_step(steps: int = 8) -> float:
    """Seconds a training step of the small network on two fixed patches of 64 x 128 x 128, in the median."""
    torch.manual_seed(0)
    network = to_device(LungNodule3DUNet(**SMALL_NETWORK), torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    image, times = torch.rand(BATCH_SIZE, 1, 64, 128, 128), []
    half = autocast_dtype(torch.device("cpu"), mixed_precision=True)
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            logits = network(image)
        logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def seconds_a_window(network: str, windows: int = 8) -> float:
    """Seconds that a network takes for a window of 96 x 96 x 96 in float32, in the median."""
    torch.manual_seed(0)
    model = to_device(NETWORKS[network](**SMALL_NETWORK), torch.device("cpu")).eval()
    image, times = torch.rand(1, 1, *WINDOW), []
    with torch.inference_mode():
        for _ in range(windows + 1):
            start = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure_alone(call: str, environment: dict[str, str]) -> float:
    """What a function of this file returns in a process of its own."""
    code = f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}; import benchmark; print(benchmark.{call})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE)
    return float(done.stdout)


def pages(bench: Bench) -> Iterator[tuple]:
    """Seconds of a CPU with arrays in large pages of memory, as the scripts set it; plain, as Linux gives them."""
    calls = {"training step": "seconds_a_step()"}
    calls |= {f"window of 96, {name}": f"seconds_a_window({name!r})" for name in ("unet", "nnunet")}
    for label, call in calls.items():
        pairs = [[measure_alone(call, os.environ | {LARGE_PAGES: way}) for way in "10"] for _ in range(bench.repeats)]
        ours, plain = zip(*pairs, strict=True)
        ratio = statistics.median(b / a for a, b in pairs)
        yield f"large pages, {label}", "s", 1, statistics.median(ours), statistics.median(plain), ratio


def sharing(bench: Bench) -> Iterator[tuple]:
    """Seconds a training step alone and beside one busy process, in processes of their own.

    Here OpenMP's threads sleep while they wait for each other, as the scripts set it; plain, they spin.
    """
    free = {name: value for name, value in os.environ.items() if name not in WAITING}
    measure = partial(measure_alone, "seconds_a_step()")
    for label, others in (("alone", 0), ("beside one busy process", 1)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
        try:
            pairs = [(measure(free | PATIENT), measure(free)) for _ in range(bench.repeats)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        ours, plain = zip(*pairs, strict=True)
        ratio = statistics.median(b / a for a, b in pairs)
        yield f"training step, {label}", "s/step", 1, statistics.median(ours), statistics.median(plain), ratio


ROWS = {
    "reading": reading,
    "preprocessing": preprocessing,
    "loading": loading,
    "training": training,
    "inference": inference,
    "looks": looks,
    "distances": distances,
    "extraction": extraction,
    "froc": froc_of_888,
    "sharing": sharing,
    "pages": pages,
    "choices": choices,  # the last one: it ends where dynamic-network-architectures is missing
}


# ------------------------------------------------------------------------------------------------- the whole table


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What the machine can do at best: matrix products (FLOP/s), and copies in memory (bytes/s)."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    block, copy = torch.ones(2, 2**28, dtype=torch.uint8, device=device)
    rates = []
    for work, amount in ((lambda: a @ a, 2 * size**3), (lambda: copy.copy_(block), 2 * block.nbytes)):
        work()
        wait_for(device)
        start = time.perf_counter()
        for _ in range(10):
            work()
        wait_for(device)
        rates.append(10 * amount / (time.perf_counter() - start))
    return rates[0], rates[1]


class ByteCounter(TorchDispatchMode):
    """Roughly the bytes that operations read and write: all their arguments and results; views move nothing."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts its arrays."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__ and "unsafe_view" not in func.__name__:
            arrays = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.total += sum(array.nbytes for array in arrays)
        return result


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[tuple]]:
    """Yields a list that then holds a row, the most memory that arrays took meanwhile; it stays empty on a CPU."""
    found: list[tuple] = []
    if device.type != "cuda":
        yield found
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    gibibytes = torch.cuda.max_memory_allocated(device) / 2**30
    found.append(("  peak memory of the GPU", "GiB", 1, gibibytes, math.nan, math.nan))


def now(device: torch.device) -> Any:
    """A point in the time of the device, for ``seconds_between``."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Seconds between two points that the device has passed."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def wait_for(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(rows: list[str] = list(ROWS), device: str = "cpu", repeats: int = 3) -> None:  # noqa: B006 - never changed
    """Measures and prints the table.

    Args:
        rows: Which rows, e.g. '[extraction,froc]'.
        device: 'cpu' or 'cuda'.
        repeats: Pairs of measurements a row.
    """
    chosen = select_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':<58}{'here':>10}{'plain':>10}{'':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), chosen, repeats)
        for row in rows:
            for label, unit, count, ours, plain, ratio in ROWS[row](bench):
                other = f"{plain / count:>10.4f} {unit:<9}{ratio:>8.2f}" if math.isfinite(plain) else f"{'':>10} {unit}"
                print(f"{label:<58}{ours / count:>10.4f}{other}".rstrip(), flush=True)
        dtype = bench.half or torch.float32
        flops, copied = ceilings(chosen, dtype)
        products = f"{flops / 1e12:.2f} TFLOP/s of {str(dtype)[6:]} matrix products"
        print(f"ceilings: {products}, {copied / 1e9:.1f} GB/s of copies")
        if bench.step is not None:
            done, moved, seconds = bench.step
            print(f"training step: {done / 1e12:.2f} TFLOP, {done / seconds / flops:.0%} of that ceiling")
            print(f"  {moved / 1e9:.1f} GB read and written, {moved / seconds / copied:.0%} of that ceiling")
            print(f"  {STEPS} steps: {STEPS * seconds / 3600:.2f} h")


if __name__ == "__main__":
    auto_cli(main)
