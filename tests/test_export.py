"""What is handed on to other programs, read by those programs."""

import builtins
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import run, verify_net_in_out

from data.ensemble import join_checkpoints
from data.export import Exporter, _compare, _example, main
from infer import Predictor
from model import ENSEMBLE, NETWORKS, Checkpoint, InferenceSettings, load_checkpoint, save_checkpoint
from utils import InputError, UserError, read_metadata, read_processed, read_processed_list, write_metadata


@pytest.fixture(scope="module")
def checkpoint_path(run_dir):
    return run_dir / "checkpoints" / "best_model.pth"


RESIDUAL = pytest.param(
    "nnunet_residual",
    marks=pytest.mark.skipif(
        find_spec("dynamic_network_architectures") is None, reason="needs dynamic-network-architectures"
    ),
)


@pytest.fixture(params=["unet", "subpixel", RESIDUAL, ENSEMBLE])
def network_path(request, checkpoint_path, tmp_path):
    """A checkpoint of each kind of network, with random weights and statistics."""
    torch.manual_seed(0)
    known = load_checkpoint(checkpoint_path)
    if request.param == ENSEMBLE:
        members = [random_checkpoint(name, known) for name in ("unet", "subpixel")]
        save_checkpoint(tmp_path / "net.pth", join_checkpoints(members, "ab"))
    else:
        save_checkpoint(tmp_path / "net.pth", random_checkpoint(request.param, known))
    return tmp_path / "net.pth"


def random_checkpoint(name, known):
    """Of a small network with random weights and statistics, for scans as those of a known checkpoint."""
    network = NETWORKS[name](channels=(4, 8, 16), strides=(2, 2), num_res_units=2, dropout=0.1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    weights = network.state_dict()
    return Checkpoint(
        name,
        network.arguments,
        weights,
        known.preprocessing,
        InferenceSettings(window=(32, 32, 32)),
        {},
        1,
        {},
        seen={"a": (None, "train")},
    )


# ------------------------------------------------------------------------------------------------------- nnU-Net's data


def test_raw_data_of_nnunet_is_the_processed_scans_in_hu(processed_dir, tmp_path):
    folder = Exporter("nnunet", processed_dir, output_dir=tmp_path / "Dataset500_Test").export()
    about = json.loads((folder / "dataset.json").read_text())
    uids = read_processed_list(processed_dir)
    assert about["numTraining"] == len(uids)
    assert about["labels"] == {"background": 0, "nodule": 1}
    assert about["channel_names"] == {"0": "CT"}
    assert {path.name for path in (folder / "imagesTr").iterdir()} == {f"{uid}_0000.nii.gz" for uid in uids}
    for uid in uids:
        scan = read_processed(processed_dir, uid)
        image, mask = (nibabel.load(folder / part / f"{uid}{end}.nii.gz") for part, end in PARTS)
        np.testing.assert_array_equal(mask.get_fdata().T, scan.mask)
        assert abs(image.get_fdata().T - (np.asarray(scan.image, np.float32) * 1400 - 1000)).max() <= 0.51
        lps = np.diag([-1, -1, 1, 1]) @ image.affine  # NIfTI's x and y run the other way
        assert lps[:3, 3] == pytest.approx(scan.geometry.origin, abs=1e-3)
        assert np.diag(lps)[:3] == pytest.approx(scan.geometry.spacing, abs=1e-4)
        np.testing.assert_allclose(mask.affine, image.affine)


PARTS = ("imagesTr", "_0000"), ("labelsTr", "")


def test_excluded_findings_get_the_label_that_nnunet_ignores(processed_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    uid = read_processed_list(data)[0]
    metadata = read_metadata(data, uid)
    nodule = metadata.nodules[0]
    findings = (*nodule.center_xyz, nodule.diameter_mm), (*metadata.grid.world((16, 24, 24)), 30.0)
    write_metadata(data, replace(metadata, excluded=findings))
    folder = Exporter("nnunet", data, output_dir=tmp_path / "Dataset500_Test").export()
    assert json.loads((folder / "dataset.json").read_text())["labels"]["ignore"] == 2
    labels = nibabel.load(folder / "labelsTr" / f"{uid}.nii.gz").get_fdata().T
    assert (labels == 2).any()
    np.testing.assert_array_equal(labels == 1, np.asarray(read_processed(data, uid).mask) == 1)  # a nodule stays one


def test_folder_that_is_not_empty_is_refused(processed_dir, checkpoint_path, tmp_path):
    folder = tmp_path / "Dataset500_Mine"
    folder.mkdir()
    (folder / "mine.txt").touch()
    for to in ("nnunet", "bundle"):
        with pytest.raises(FileExistsError, match="is not empty; name another output_dir"):
            Exporter(to, processed_dir, checkpoint_path, folder).export()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_file_that_is_there_is_not_replaced(checkpoint_path, tmp_path):
    for to, end in (("onnx", "onnx"), ("torch", "pt2")):
        (tmp_path / f"best_model.{end}").write_text("mine")
        with pytest.raises(FileExistsError, match="is there already"):
            Exporter(to, checkpoint_path=checkpoint_path, output_dir=tmp_path).export()
        assert (tmp_path / f"best_model.{end}").read_text() == "mine"


def test_folder_that_nnunet_would_not_find_is_refused(processed_dir, tmp_path):
    with pytest.raises(InputError, match=r"such as nnUNet_raw/Dataset500_LUNA16, not .*out"):
        Exporter("nnunet", processed_dir, output_dir=tmp_path / "out").export()


def test_scans_that_were_prepared_differently_are_refused(processed_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    uid = read_processed_list(data)[-1]
    metadata = read_metadata(data, uid)
    write_metadata(data, replace(metadata, preprocessing=metadata.preprocessing | {"hu_max": 300.0}))
    with pytest.raises(InputError, match=r"hu_max: 300\.0 instead of 400\.0"):
        Exporter("nnunet", data, output_dir=tmp_path / "Dataset500_Test").export()


# ------------------------------------------------------------------------------------------------------------- networks


def probability(path, image):
    with torch.inference_mode():
        return torch.sigmoid(load_checkpoint(path).build_network()(image))


@pytest.mark.parametrize("shape", [(32, 32, 48), (40, 64, 24), (64, 32, 32)])
def test_program_of_torch_gives_the_same_at_any_size(network_path, tmp_path, shape):
    path = Exporter("torch", checkpoint_path=network_path, output_dir=tmp_path / "out").export()
    extra = {"about.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    image = torch.rand(1, 1, *shape)
    torch.testing.assert_close(program(image), probability(network_path, image), atol=1e-4, rtol=0)
    about = json.loads(extra["about.json"])
    assert about["preprocessing"] == load_checkpoint(network_path).preprocessing
    assert about["sizes_are_multiples_of"] == load_checkpoint(network_path).build_network().divisor


def test_file_of_onnx_gives_the_same_at_any_size(network_path, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is optional")
    path = Exporter("onnx", checkpoint_path=network_path, output_dir=tmp_path / "out").export()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for shape in ((32, 32, 48), (40, 64, 24), (64, 32, 32)):
        image = torch.rand(1, 1, *shape)
        (found,) = session.run(None, {"image": image.numpy()})
        assert abs(found - probability(network_path, image).numpy()).max() < 1e-4
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["preprocessing"])["hu_min"] == -1000
    assert json.loads(properties["inference"])["threshold"] == 0.5


def test_missing_onnx_names_what_to_install(checkpoint_path, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("onnx"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        Exporter("onnx", checkpoint_path=checkpoint_path, output_dir=tmp_path).export()


def test_what_computes_something_else_is_refused(checkpoint_path):
    network = load_checkpoint(checkpoint_path).build_network()
    _compare(network, lambda image: torch.sigmoid(network(image)))
    with pytest.raises(InputError, match="differ by up to"):
        _compare(network, lambda image: torch.sigmoid(network(image)) + 0.01)


def test_example_has_a_size_that_the_network_takes(network_path):
    network = load_checkpoint(network_path).build_network()
    for blocks in (2, 3):
        network.check_size(_example(network, blocks).shape[2:])


# --------------------------------------------------------------------------------------------------------------- bundle


@pytest.fixture
def bundle(network_path, tmp_path):
    return Exporter("bundle", checkpoint_path=network_path, output_dir=tmp_path / "bundle").export()


def test_bundle_passes_its_own_check(bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file="configs/inference.json")


def test_bundle_writes_the_mask_of_the_network_beside_the_image(bundle, network_path, processed_dir, tmp_path):
    data = Exporter("nnunet", processed_dir, output_dir=tmp_path / "Dataset500_Test").export()
    uid = read_processed_list(processed_dir)[0]
    (bundle / "images").mkdir()
    shutil.copy(data / "imagesTr" / f"{uid}_0000.nii.gz", bundle / "images")
    files = {"meta_file": str(bundle / "configs" / "metadata.json")}
    run("run", "initialize", config_file=str(bundle / "configs" / "inference.json"), bundle_root=str(bundle), **files)
    (path,) = (bundle / "masks").glob("*.nii.gz")
    mask, image = nibabel.load(path), nibabel.load(bundle / "images" / f"{uid}_0000.nii.gz")
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
    array = (torch.from_numpy(image.get_fdata().T.copy()).float() + 1000) / 1400
    network = load_checkpoint(network_path).build_network()
    settings = InferenceSettings(window=(32, 32, 32))
    ours = Predictor(network, settings, "cpu", mixed_precision=False).predict_probability(array.clamp(0, 1).numpy())
    differing = (mask.get_fdata().T > 0) != (ours >= 0.5)
    assert differing.mean() < 1e-3
    torch.set_grad_enabled(True)


def test_metadata_of_the_bundle_says_what_it_takes_and_that_it_is_no_medical_device(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    image = metadata["network_data_format"]["inputs"]["image"]
    assert image["spatial_shape"] == [32, 32, 32]
    assert image["value_range"] == [0, 1]
    assert "Not a medical device" in metadata["intended_use"]
    assert metadata["network"]["preprocessing"]["target_size"] == [32, 48, 48]


# --------------------------------------------------------------------------------------------------------- command line


def test_command_prints_what_it_wrote(checkpoint_path, tmp_path, capsys):
    assert main(["--to", "torch", "--checkpoint_path", str(checkpoint_path), "--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("best_model.pt2")


def test_unknown_target_is_refused(tmp_path):
    with pytest.raises(InputError, match="to must be one of nnunet, onnx, torch, bundle, not 'tensorrt'"):
        Exporter("tensorrt", output_dir=tmp_path)


def test_what_the_lung_mask_hides_of_a_nodule_is_ignored(processed_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(processed_dir, data)
    uid = read_processed_list(data)[0]
    metadata, mask = read_metadata(data, uid), np.asarray(read_processed(data, uid).mask)
    first = replace(metadata.nodules[0], cut_by_lungs=True)
    write_metadata(data, replace(metadata, nodules=(first, *metadata.nodules[1:])))
    path = data / "images" / f"{uid}.npy"
    image, hidden = np.load(path), tuple(np.argwhere(mask)[0])
    image[hidden] = 0
    np.save(path, image)
    folder = Exporter("nnunet", data, output_dir=tmp_path / "Dataset500_Test").export()
    labels = nibabel.load(folder / "labelsTr" / f"{uid}.nii.gz").get_fdata().T
    assert labels[hidden] == 2
    assert (labels == 1).sum() == ((mask == 1) & (image != 0)).sum()
