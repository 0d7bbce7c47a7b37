"""What is said where an optional package is missing; .ci/run removes them, and these tests are skipped where one is."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import HALF, Bright, chest

from data.export import Exporter
from data.masks import read_mask
from model import NETWORKS
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


def without(package: str):
    """Runs a test only where a package is missing."""
    return pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is installed")


@without("onnx")
def test_onnx(run_dir, tmp_path):
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        Exporter("onnx", checkpoint_path=run_dir / "checkpoints" / "best_model.pth", output_dir=tmp_path).export()


@without("pydicom")
def test_dicom_segmentation(tmp_path):
    path = tmp_path / "seg.dcm"
    path.write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x02\x00UI\x1e\x001.2.840.10008.5.1.4.1.1.66.4\0\0")
    with pytest.raises(UserError, match=r"pip install 'pydicom>="):
        read_mask(path)


@without("highdicom")
def test_dicom_results(trained, tmp_path, caplog):
    image = chest((40, 56, 60))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    pixels = sitk.GetArrayFromImage(image)
    (tmp_path / "ct").mkdir()
    for number, plane in enumerate(pixels):
        piece = sitk.GetImageFromArray(np.ascontiguousarray(plane[None]))
        piece.SetSpacing(image.GetSpacing())
        place = (*image.GetOrigin()[:2], image.GetOrigin()[2] + number * image.GetSpacing()[2])
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.3.4.{number + 1}",
            "0008|0060": "CT",
            "0020|000e": "1.2.3.4",
            "0020|000d": "1.2.3",
            "0020|0032": "\\".join(f"{value:.4f}" for value in place),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(tmp_path / "ct" / f"{number}.dcm"))
        writer.Execute(piece)
    trained(Bright(HALF)).infer_scan(tmp_path / "ct")
    assert "pip install 'highdicom" in caplog.text
    assert list((tmp_path / "out" / "reports").glob("*.html"))
    assert not list((tmp_path / "out").rglob("*.dcm"))


@without("dynamic_network_architectures")
def test_residual_encoder():
    with pytest.raises(UserError, match="pip install --no-deps dynamic-network-architectures"):
        NETWORKS["nnunet_residual"]()


@without("distributed")
def test_scheduler(phantom_dir, tmp_path):
    command = [sys.executable, "preprocess.py", "--scheduler", "tcp://127.0.0.1:1", "--output_dir", str(tmp_path)]
    command += ["--raw_data_dir", str(phantom_dir / "raw"), "--annotations_path", str(phantom_dir / "annotations.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
