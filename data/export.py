"""Hands data and networks on: to nnU-Net, ONNX Runtime, torch.export and MONAI.

python data/export.py --to nnunet --data_dir data/LUNA16/processed --output_dir nnUNet_raw/Dataset500_LUNA16
python data/export.py --to onnx --checkpoint_path experiments/luna16_unet/checkpoints/best_model.pth
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from data.command_line import parse_command_line, run_main
from dataset import training_mask
from model import Checkpoint, SegmentationNetwork, checkpoint_file, load_checkpoint
from preprocess import Preprocessing
from utils import (
    IGNORED,
    Folders,
    Progress,
    UserError,
    atomic_path,
    check,
    describe_difference,
    read_processed,
    read_processed_list,
    tell,
    write_image,
    write_json,
    write_text,
)

Target = Literal["nnunet", "onnx", "torch", "bundle"]
MOST_APART = 1e-3  # of probabilities, between a network and what was made of it
EXAMPLE_VOXELS = 32  # smallest edge of the image that a network is traced with; others may be fed
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Exporter:
    """Writes what other programs take.

    Args:
        to: 'nnunet' makes raw data of nnU-Net v2 out of processed scans; 'onnx' and 'torch' (torch.export) make a file
            of a network, which takes images (1, 1, Z, Y, X) and gives probabilities; 'bundle' makes a bundle of MONAI.
        data_dir: Folder or folders that preprocess.py wrote, for nnU-Net.
        checkpoint_path: Checkpoint of train.py, for the others.
        output_dir: Folder of nnU-Net's data set (its name is Dataset500_Name or the like), of the file, or of the
            bundle.

    Raises:
        InputError: There is no such target.
    """

    def __init__(
        self,
        to: Target,
        data_dir: Folders = "data/LUNA16/processed",
        checkpoint_path: str | Path = "experiments/luna16_unet/checkpoints/best_model.pth",
        output_dir: str | Path = "results/export",
    ) -> None:
        check(to in get_args(Target), f"to must be one of {', '.join(get_args(Target))}, not {to!r}")
        self.to, self.data_dir = to, data_dir
        self.checkpoint_path, self.output_dir = checkpoint_file(checkpoint_path), Path(output_dir)

    def export(self) -> Path:
        """Writes it; returns the file or folder.

        Raises:
            FileNotFoundError: There is no data, or no checkpoint.
            FileExistsError: The folder of a data set or a bundle holds something.
            InputError: Scans were prepared differently, or what was made does not compute what the network does.
            UserError: A package is missing.
        """
        if self.to == "nnunet":
            return write_nnunet(self.data_dir, self.output_dir)
        checkpoint = load_checkpoint(self.checkpoint_path)
        check(
            not any("scale" in member for member in checkpoint.arguments.get("members", ())),
            f"{self.checkpoint_path} joins networks of several voxel sizes, which is not exported; export its members",
        )
        if self.to == "bundle":
            return write_bundle(checkpoint, self.output_dir)
        path = self.output_dir / f"{self.checkpoint_path.stem}.{'onnx' if self.to == 'onnx' else 'pt2'}"
        if path.exists():
            raise FileExistsError(f"{path} is there already; name another output_dir")
        return write_onnx(checkpoint, path) if self.to == "onnx" else write_torch(checkpoint, path)


# ------------------------------------------------------------------------------------------------------------ data sets


def write_nnunet(data_dir: Folders, folder: Path) -> Path:
    """Images in HU, masks, and dataset.json, as nnU-Net v2 reads them; excluded findings get its ignore label.

    Raises:
        FileExistsError: The folder is not empty.
        InputError: Scans were prepared differently.
    """
    uids = read_processed_list(data_dir)
    check(
        re.fullmatch(r"Dataset\d{3}_\w+", folder.name) is not None,
        f"output_dir must end in a name as nnU-Net looks for it, such as nnUNet_raw/Dataset500_LUNA16, not {folder}",
    )
    _check_empty(folder)
    has_ignored, settings = False, read_processed(data_dir, uids[0]).metadata.preprocessing
    with Progress(len(uids), "writing", "scan") as progress:
        for uid in uids:
            scan = read_processed(data_dir, uid)
            own = scan.metadata.preprocessing
            check(own == settings, f"{uid} was prepared otherwise than {uids[0]}: {describe_difference(own, settings)}")
            hu = np.rint(Preprocessing.from_dict(own).to_hu(scan.image)).astype(np.int16)
            image, mask = (torch.from_numpy(np.array(array)) for array in (scan.image, scan.mask))
            labels = training_mask(image, mask, scan.metadata).numpy()
            has_ignored |= bool((labels == IGNORED).any())
            for part, name, array in (("imagesTr", f"{uid}_0000", hu), ("labelsTr", uid, labels)):
                write_image(folder / part / f"{name}.nii.gz", scan.geometry.image(array))
            progress.advance()
    names = {"background": 0, "nodule": 1} | ({"ignore": IGNORED} if has_ignored else {})
    about = {"channel_names": {"0": "CT"}, "labels": names, "numTraining": len(uids), "file_ending": ".nii.gz"}
    write_json(folder / "dataset.json", about | {"preprocessing": settings})
    tell(f"{len(uids)} scans" + (", what training ignores is under the label to be ignored" if has_ignored else ""))
    return folder


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name another output_dir")


# ------------------------------------------------------------------------------------------------------------- networks


class Probability(torch.nn.Module):
    """A network that gives probabilities.

    Args:
        network: Gives logits.
    """

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities (B, 1, Z, Y, X) of images (B, 1, Z, Y, X)."""
        return torch.sigmoid(self.network(image))


def about_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What must be known to use a network, as built-in types."""
    return {
        "input": "float32 (1, 1, Z, Y, X) in [0, 1]: hu_min to hu_max of the preprocessing; 0 outside the lungs, where "
        "mask_lungs is true",
        "output": "float32 (1, 1, Z, Y, X): probability of a nodule",
        "sizes_are_multiples_of": (divisor := checkpoint.build_network().divisor),
        "smallest_edge": 2 * divisor,
        "preprocessing": checkpoint.preprocessing,
        "inference": checkpoint.inference.to_dict(),
        "sha256_of_checkpoint": checkpoint.sha256,
        "trained_and_measured_on": checkpoint.about or "not stated",
        "intended_use": "research; not a medical device",
    }


def write_torch(checkpoint: Checkpoint, path: Path) -> Path:
    """A program of torch.export, with ``about.json`` in it, held against the network.

    Raises:
        InputError: It does not compute what the network does.
    """
    network = checkpoint.build_network()
    program = torch.export.export(Probability(network), (_example(network),), dynamic_shapes=(_sizes(network),))
    with atomic_path(path) as temporary:
        # As an open file, for a temporary name has another suffix than torch wants.
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files={"about.json": json.dumps(about_of(checkpoint))})
        with open(temporary, "rb") as file:
            _compare(network, torch.export.load(file).module())
    return path


def write_onnx(checkpoint: Checkpoint, path: Path) -> Path:
    """A file of ONNX, with what must be known as its properties, held against the network by ONNX Runtime.

    Raises:
        InputError: It does not compute what the network does.
        UserError: A package is missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch uses it
    except ImportError as error:
        raise UserError(f"ONNX needs three packages: pip install {' '.join(ONNX_PACKAGES)}") from error
    for name in (*ONNX_PACKAGES, "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell each step
    network = checkpoint.build_network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            Probability(network),
            (_example(network),),
            input_names=["image"],
            output_names=["probability"],
            dynamic_shapes=(_sizes(network),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about_of(checkpoint).items()})
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        _compare(network, lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]))
    return path


def _sizes(network: SegmentationNetwork) -> dict[int, Any]:
    """{axis of an image: sizes along it that the network takes}."""
    return {axis: network.divisor * torch.export.Dim(f"blocks_{axis}", min=2, max=1024) for axis in (2, 3, 4)}


def _example(network: SegmentationNetwork, blocks: int = 2) -> Tensor:
    """A random image of a size that the network takes, longest along x."""
    unit = network.divisor * max(1, EXAMPLE_VOXELS // network.divisor)
    noise = torch.Generator().manual_seed(blocks)
    return torch.rand((1, 1, blocks * unit, blocks * unit, (blocks + 1) * unit), generator=noise)


@torch.inference_mode()
def _compare(network: SegmentationNetwork, made: Callable[[Tensor], Tensor]) -> None:
    """Raises InputError where what was made of a network gives others than its probabilities, at two sizes."""
    for blocks in (2, 3):
        image = _example(network, blocks)
        apart = float((torch.sigmoid(network(image)) - made(image)).abs().max())
        check(
            apart <= MOST_APART,
            f"what was made of the network gives probabilities that differ by up to {apart:.3g} from its own; use "
            "another version of torch, and report it",
        )


# --------------------------------------------------------------------------------------------------------------- bundle

# Reads images (x, y, z) in HU that ``--to nnunet`` wrote, and writes their masks.
BUNDLE_INFERENCE: dict[str, Any] = {
    "imports": ["$import glob", "$import torch"],
    "bundle_root": ".",
    "dataset_dir": "$@bundle_root + '/images'",
    "output_dir": "$@bundle_root + '/masks'",
    "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
    "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location='cpu')",
    "network": "$@network_def.to(@device).eval()",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {
                "_target_": "ScaleIntensityRanged",
                "keys": "image",
                "a_min": "@hu_min",
                "a_max": "@hu_max",
                "b_min": 0.0,
                "b_max": 1.0,
                "clip": True,
            },
            {"_target_": "Transposed", "keys": "image", "indices": [0, 3, 2, 1]},
        ],
    },
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": "@window",
        "overlap": 0.25,
        "mode": "gaussian",
        "sw_device": "@device",
    },
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "AsDiscreted", "keys": "pred", "threshold": "@threshold"},
            {"_target_": "Transposed", "keys": "pred", "indices": [0, 3, 2, 1]},
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_postfix": "nodules",
                "output_dtype": "$torch.uint8",
                "separate_folder": False,
                "resample": False,
            },
        ],
    },
    "initialize": ["$torch.set_grad_enabled(False)"],
    "run": [
        "$[@postprocessing({'pred': @inferer(@preprocessing({'image': path})['image'][None].to(@device), @network)[0]})"
        " for path in sorted(glob.glob(@dataset_dir + '/*.nii.gz'))]"
    ],
}


BUNDLE_README = """# Lung nodule segmentation in chest CT

Research only; not a medical device. `configs/metadata.json` says what the network was trained on and what it takes.

Put prepared images into `images/`: those that `python data/export.py --to nnunet` writes into `imagesTr/`. Then, in
this folder (`pip install fire nibabel`):

    python -m monai.bundle run --meta_file configs/metadata.json --config_file configs/inference.json

The masks come to lie in `masks/`.
"""


def write_bundle(checkpoint: Checkpoint, folder: Path) -> Path:
    """A bundle of MONAI: metadata, the network as TorchScript, and an inference of images in HU that were prepared.

    Raises:
        FileExistsError: The folder is not empty.
        InputError: The TorchScript does not compute what the network does.
    """
    _check_empty(folder)
    network = checkpoint.build_network()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # TorchScript is called old; MONAI's bundles are made of it
        traced = torch.jit.trace(Probability(network), _example(network), check_trace=False)
    path = folder / "models" / "model.ts"
    with atomic_path(path) as temporary:
        torch.jit.save(traced, str(temporary))
        _compare(network, torch.jit.load(str(temporary)))
    settings, inference = Preprocessing.from_dict(checkpoint.preprocessing), checkpoint.inference
    window = list(inference.window or settings.target_size or _example(network).shape[2:])
    if inference.first_window is not None:
        window = np.maximum(window, np.asarray(inference.first_window) // network.divisor * network.divisor).tolist()
    values = {"hu_min": settings.hu_min, "hu_max": settings.hu_max, "window": window, "threshold": inference.threshold}
    write_json(folder / "configs" / "inference.json", values | BUNDLE_INFERENCE)
    write_json(folder / "configs" / "metadata.json", _bundle_metadata(checkpoint, window))
    write_text(folder / "docs" / "README.md", BUNDLE_README)
    return folder


def _bundle_metadata(checkpoint: Checkpoint, window: list[int]) -> dict[str, Any]:
    import monai

    about = about_of(checkpoint)
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": "CT",
        "num_channels": 1,
        "spatial_shape": window,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": checkpoint.inference.window is not None,
        "channel_def": {"0": "image"},
    }
    pred = image | {"format": "segmentation", "channel_def": {"0": "probability of a nodule"}}
    return {
        "version": "1.0.0",
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.3.0"},
        "task": "Lung nodule segmentation in chest CT",
        "description": "Masks of lung nodules, of images that were prepared: resampled, cropped and masked as "
        "preprocess.py does it, in HU, which the first transforms map to [0, 1]. Nodules below the score of the "
        "checkpoint stay in, nothing is cleaned, and there is one look.",
        "intended_use": "Research. Not a medical device.",
        "network": about,
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def _command(argv: list[str] | None) -> int:
    (options, _), _ = parse_command_line(Exporter, "export", argv=argv)
    print(Exporter(**options).export())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; the options are Exporter's arguments. Returns the exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
