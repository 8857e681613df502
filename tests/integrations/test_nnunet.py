"""The trainers in nnU-Net itself: tiny datasets planned, trained on by its commands, and predicted."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nnunetv2")

import SimpleITK as sitk
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from contrastseg_fast import reference
from contrastseg_fast.attach import remove_uafs
from contrastseg_fast.integrations.nnunet import trainer_folder, trainers

# What a user writes; nnU-Net itself sets the numbers of epochs and iterations in __init__.
QUICK_TRAINERS = """
from contrastseg_fast.integrations.nnunet.trainers import *

class Quick:
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1

class QuickPDCR(Quick, nnUNetTrainerPDCR):
    pdcr_weight = 0.1
    pdcr_warmup_epochs = 1

class QuickPDCRUAFS(Quick, nnUNetTrainerPDCRUAFS):
    pdcr_num_samples = 64
"""


def blobs(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A label map: a ball of label 1 with a core of label 2, somewhere."""
    centre = [rng.uniform(0.3, 0.7) * extent for extent in shape]
    away = np.meshgrid(
        *(np.arange(extent) - c for extent, c in zip(shape, centre, strict=True)), indexing="ij"
    )
    scaled = sum((a / (0.3 * extent)) ** 2 for a, extent in zip(away, shape, strict=True))
    return (scaled < 1).astype(np.uint8) + (scaled < 0.3)


def write_dataset(
    root: Path, name: str, shape: tuple[int, ...], spacing: tuple[float, ...], info: dict[str, Any]
) -> None:
    """Five cases in nnU-Net's raw format; where there is an ignore label (3) one corner has it."""
    folder = root / "raw" / name
    rng = np.random.default_rng(0)
    for case in range(5):
        labels = blobs(shape, rng)
        image = labels + rng.normal(0, 0.3, shape)
        if "ignore" in info["labels"]:
            labels[..., : shape[-1] // 4, : shape[-1] // 4] = 3
        for subfolder, suffix, array in (
            ("imagesTr", "_0000", image.astype(np.float32)),
            ("labelsTr", "", labels),
        ):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
            file = folder / subfolder / f"case_{case}{suffix}{info['file_ending']}"
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing(spacing[::-1])
            sitk.WriteImage(picture, str(file))
    description = {"channel_names": {"0": "noise"}, "numTraining": 5, **info}
    (folder / "dataset.json").write_text(json.dumps(description))


DATASETS = {
    "Dataset001_Flat": {
        "configuration": "2d",
        "shape": (40, 36),
        "spacing": (1.0, 1.0),
        "info": {"file_ending": ".nii.gz", "labels": {"background": 0, "ball": 1, "core": 2}},
    },
    "Dataset002_Regions": {
        "configuration": "3d_fullres",
        "shape": (10, 36, 32),
        "spacing": (4.0, 1.0, 1.0),
        "info": {
            "file_ending": ".nii.gz",
            "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
            "regions_class_order": [1, 2],
        },
    },
}


def command(name: str, *arguments: str) -> str:
    """What one of nnU-Net's commands prints, run as users run it."""
    run = subprocess.run(
        [str(Path(sys.executable).parent / name), *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def call(patch: pytest.MonkeyPatch, entry_point: Callable[[], None], *arguments: str) -> None:
    """The same in this process, without starting Python anew."""
    patch.setattr(sys, "argv", ["nnU-Net", *arguments])
    entry_point()


@pytest.fixture(autouse=True)
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's helpers start in no time, forked from one thread where it would spawn them."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: fork)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's folders, both datasets planned and preprocessed, and the environment set for them."""
    root = tmp_path_factory.mktemp("nnunet")
    (root / "my_trainers").mkdir()
    (root / "my_trainers" / "quick.py").write_text(QUICK_TRAINERS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_extTrainer", os.pathsep.join([trainer_folder(), str(root / "my_trainers")]))
        patch.setenv("nnUNet_n_proc_DA", "1")
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        fork = multiprocessing.get_context("fork")
        patch.setattr(multiprocessing, "get_context", lambda method=None: fork)
        for number, (name, dataset) in enumerate(DATASETS.items(), 1):
            write_dataset(root, name, dataset["shape"], dataset["spacing"], dataset["info"])
            processes = ("-np", "1", "-npfp", "1", "-c", dataset["configuration"])
            call(patch, plan_and_preprocess_entry, "-d", str(number), *processes)
        patch.setenv("nnUNet_n_proc_DA", "0")
        yield root
    torch.set_num_threads(threads)


def make_trainer(dataset: int, name: str) -> nnUNetTrainer:
    """A trainer as the command makes it, before it is initialised."""
    configuration = list(DATASETS.values())[dataset - 1]["configuration"]
    return get_trainer_from_args(str(dataset), configuration, 0, name, device=torch.device("cpu"))


def checkpoint(root: Path, dataset: int, trainer: str) -> Path:
    """The folder of fold 0."""
    name, about = list(DATASETS.items())[dataset - 1]
    folder = f"{trainer}__nnUNetPlans__{about['configuration']}"
    return root / "results" / name / folder / "fold_0" / "checkpoint_final.pth"


def logged(file: Path) -> str:
    (log,) = file.parent.glob("training_log_*.txt")
    return log.read_text()


def check_predictions(root: Path, dataset: int, folder: Path) -> None:
    """Each of the five images has a label map of its size, whose labels are the dataset's."""
    images = root / "raw" / list(DATASETS)[dataset - 1] / "imagesTr"
    for case in range(5):
        prediction = sitk.ReadImage(str(folder / f"case_{case}.nii.gz"))
        image = sitk.ReadImage(str(images / f"case_{case}_0000.nii.gz"))
        assert prediction.GetSize() == image.GetSize()
        assert prediction.GetSpacing() == image.GetSpacing()
        assert set(np.unique(sitk.GetArrayFromImage(prediction))) <= {0, 1, 2}


def test_found_by_their_names(root: Path) -> None:
    for name in ("nnUNetTrainerPDCR", "nnUNetTrainerUAFS", "nnUNetTrainerPDCRUAFS"):
        assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)
    assert recursive_find_trainer_class_by_name("QuickPDCR").pdcr_weight == 0.1
    module = [sys.executable, "-m", "contrastseg_fast.integrations.nnunet"]
    folder = subprocess.run(module, capture_output=True, text=True, check=True)
    assert folder.stdout.strip() == trainer_folder()


def test_the_commands_train_and_predict_with_pdcr(root: Path, tmp_path: Path) -> None:
    """Flat images with plain labels, in processes of their own."""
    command("nnUNetv2_train", "1", "2d", "0", "-tr", "QuickPDCR", "-device", "cpu")
    file = checkpoint(root, 1, "QuickPDCR")
    log = logged(file)
    assert "PDCR of 3 classes on patches of (40, 40) pixels: weight 0.1 after 1 epochs" in log
    values = re.findall(r"PDCR weight (\S+), mean (\S+)", log)
    assert [float(weight) for weight, _ in values] == [0, 0.1]  # warming up over one epoch
    assert all(math.isfinite(float(mean)) and float(mean) != 0 for _, mean in values)

    images = root / "raw" / "Dataset001_Flat" / "imagesTr"
    options = (
        "-d",
        "1",
        "-c",
        "2d",
        "-f",
        "0",
        "-tr",
        "QuickPDCR",
        "-device",
        "cpu",
        "-npp",
        "1",
        "-nps",
        "1",
    )
    command("nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path), *options)
    check_predictions(root, 1, tmp_path)

    plain = make_trainer(1, "nnUNetTrainer")
    plain.initialize()
    assert list(torch.load(file, weights_only=False)["network_weights"]) == list(plain.network.state_dict())
    plain.load_checkpoint(str(file))
    assert plain.current_epoch == 2


def test_regions_with_gates_in_anisotropic_volumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both at once; prediction finds the gates in the checkpoint and the trainer by its name."""
    options = ("-tr", "QuickPDCRUAFS", "-device", "cpu")
    call(monkeypatch, run_training_entry, "2", "3d_fullres", "0", *options)
    file = checkpoint(root, 2, "QuickPDCRUAFS")
    log = logged(file)
    assert "PDCR of 2 regions" in log
    assert "UAFS encoder.stages.3: spatial_dims=3, in_channels=" in log
    weights = torch.load(file, weights_only=False)["network_weights"]
    plain = make_trainer(2, "nnUNetTrainer")
    plain.initialize()
    own = {key for key in weights if ".uafs." in key}
    assert set(weights) - own == set(plain.network.state_dict())
    assert {key.split(".uafs.")[0] for key in own} == {
        *(f"encoder.stages.{stage}" for stage in range(4)),
        *(f"decoder.encoder.stages.{stage}" for stage in range(4)),  # nnU-Net's decoder holds the encoder
        *(f"decoder.stages.{stage}" for stage in range(3)),
    }

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(file.parent.parent), (0,))
    loaded = predictor.network.state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    images = root / "raw" / "Dataset002_Regions" / "imagesTr"
    predictor.predict_from_files(
        str(images), str(tmp_path), num_processes_preprocessing=1, num_processes_segmentation_export=1
    )
    check_predictions(root, 2, tmp_path)

    # A gate whose classifier is 0 is sure of nothing and passes its input on.
    x = torch.randn(1, 1, 10, 40, 32)
    plain.network.load_state_dict({key: value for key, value in weights.items() if key not in own})
    plain.network.decoder.deep_supervision = False
    with torch.inference_mode():
        expected = plain.network.eval()(x)
        assert not torch.allclose(predictor.network.eval()(x), expected, atol=1e-3)
        for gate in predictor.network.uafs.values():
            gate.head[-1].weight.zero_()
            gate.head[-1].bias.zero_()
        torch.testing.assert_close(predictor.network(x), expected)


def started(dataset: int, trainer: nnUNetTrainer) -> tuple[nnUNetTrainer, dict[str, Any]]:
    """A trainer in its first epoch, and a batch; with an ignore label, one that has some of it."""
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    trainer.on_train_epoch_start()
    batch = next(loader)
    while dataset == 2 and not batch["target"][0][:, 2].any():  # crops are drawn at random
        batch = next(loader)
    return trainer, batch


@pytest.mark.parametrize(("dataset", "name"), [(1, "nnUNetTrainerPDCR"), (2, "nnUNetTrainerPDCRUAFS")])
def test_a_training_step_adds_the_reference_s_pdcr(root: Path, dataset: int, name: str) -> None:
    trainer, batch = started(dataset, make_trainer(dataset, name))
    assert trainer.loss.weight == 0.01
    maps: dict[str, Tensor] = {}
    fields = trainer.pdcr.loss.receptive_fields
    for layer in fields:
        module = trainer.network.get_submodule(layer)
        module.register_forward_hook(lambda _, inputs, output, layer=layer: maps.update({layer: output}))
    output = trainer.network(batch["data"])
    target = batch["target"]
    labels, classes, mask, distance = target[0], 3, None, "tv"
    if dataset == 2:
        assert target[0].shape[1] == 3
        assert 0 < target[0][:, 2].sum() < target[0][:, 2].numel()
        labels, classes, mask, distance = target[0][:, :2].float(), 2, ~target[0][:, 2:], "mean"
    oracle = reference.PDCRLoss(
        fields,
        classes,
        class_distance=distance,
        patch_size=trainer.pdcr.loss.patch_size,
        skip_homogeneous=True,
    )
    expected = oracle({layer: x.double() for layer, x in maps.items()}, labels, mask)
    segmentation = trainer.loss.segmentation(output, target)
    trainer.loss.weight = 0.5
    loss = trainer.loss(output, target)
    torch.testing.assert_close(loss, segmentation + 0.5 * expected.float())
    assert trainer.loss.pop_mean() == pytest.approx(expected.item(), rel=1e-4)
    assert math.isnan(trainer.loss.pop_mean())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainer.network.encoder.parameters() if p.grad is not None)

    if dataset == 2:  # what the ignored pixels are said to be makes no difference
        target[0][:, :2] ^= target[0][:, 2:]
        trainer.network(batch["data"])
        value = trainer.pdcr(*trainer.loss._labels_and_mask(target[0]))
        torch.testing.assert_close(value, expected.float())


@pytest.mark.parametrize(("dataset", "name"), [(1, "nnUNetTrainerPDCR"), (2, "nnUNetTrainerPDCRUAFS")])
def test_validation_is_without_pdcr_and_leaves_nothing(root: Path, dataset: int, name: str) -> None:
    trainer, batch = started(dataset, make_trainer(dataset, name))
    _, loader = trainer.get_dataloaders()
    trainer.network(batch["data"])  # a pass whose loss is never taken
    trainer.on_validation_epoch_start()
    held_out = next(loader)
    with torch.no_grad():
        expected = trainer.loss.segmentation(trainer.network(held_out["data"]), held_out["target"])
        assert trainer.validation_step(held_out)["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert math.isnan(trainer.loss.pop_mean())
    trainer.on_train_epoch_start()
    trainer.train_step(batch)
    assert math.isfinite(trainer.loss.pop_mean())


def test_compiled_and_distributed_networks_train_alike(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, batch = started(1, make_trainer(1, "nnUNetTrainerPDCRUAFS"))
    weights = copy.deepcopy(eager.network.state_dict())
    expected = gradients(eager, batch)

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        compiled, _ = started(1, make_trainer(1, "nnUNetTrainerPDCRUAFS"))
        assert isinstance(compiled.network, torch._dynamo.OptimizedModule)
        compiled.network._orig_mod.load_state_dict(weights)
        torch.testing.assert_close(gradients(compiled, batch), expected, rtol=1e-3, atol=1e-5)
        compiled.on_validation_epoch_start()
        with torch.no_grad():
            assert math.isfinite(compiled.validation_step(batch)["loss"])

    eager.network.load_state_dict(weights)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        eager.network = torch.nn.parallel.DistributedDataParallel(eager.network)
        torch.testing.assert_close(gradients(eager, batch), expected)
    finally:
        torch.distributed.destroy_process_group()


def gradients(trainer: nnUNetTrainer, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Those of the encoder, unclipped, and the regularization."""
    trainer.loss.weight = 1.0
    trainer.optimizer.zero_grad()
    trainer.network.train()
    trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
    mean = torch.tensor(trainer.loss.pop_mean())
    assert mean.isfinite()
    network = getattr(trainer.network, "module", getattr(trainer.network, "_orig_mod", trainer.network))
    named = network.encoder.named_parameters()
    return {"pdcr": mean} | {key: p.grad.clone() for key, p in named if p.grad is not None}


def derived(root: Path, base: type, labels: dict[str, Any] | None = None, **attributes: Any) -> nnUNetTrainer:
    """A trainer of the flat dataset, or of one with other labels, whose class sets attributes as users do."""
    folder = root / "preprocessed" / "Dataset001_Flat"
    plans, dataset = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset")
    )
    plans["continue_training"] = False
    if labels is not None:
        dataset |= {"labels": labels, "regions_class_order": [1]}
    return type("Derived", (base,), attributes)(plans, "2d", 0, dataset, torch.device("cpu"))


def test_boxes_shrink_where_fields_exceed_half_of_the_patch(root: Path) -> None:
    flat = make_trainer(1, "nnUNetTrainerPDCR")
    flat.initialize()  # a patch of 40 x 40, receptive fields of 11, 23 and 47 pixels
    assert flat.pdcr.loss.patch_size == {
        "encoder.stages.1": (11, 11),
        "encoder.stages.2": (9, 9),
        "encoder.stages.3": (17, 17),
    }
    volume = make_trainer(2, "nnUNetTrainerPDCR")
    volume.initialize()  # a patch of 10 x 40 x 32; strides across the slices 1, 1, 2
    assert {name: field.size for name, field in volume.pdcr.loss.receptive_fields.items()} == {
        "encoder.stages.1": (1, 11, 11),
        "encoder.stages.2": (5, 23, 23),
        "encoder.stages.3": (11, 47, 47),
    }
    assert volume.pdcr.loss.patch_size == {
        "encoder.stages.1": (1, 11, 11),
        "encoder.stages.2": (3, 9, 9),
        "encoder.stages.3": (5, 17, 16),
    }


def test_settings_are_class_attributes(root: Path) -> None:
    options = {"patch_sizes": (3, 5), "border": "clip", "skip_homogeneous": False}
    trainer = derived(
        root,
        trainers.nnUNetTrainerPDCR,
        pdcr_weight=0.3,
        pdcr_warmup_epochs=4,
        pdcr_layers=["encoder.stages.[01]", "decoder.stages.2"],
        pdcr_num_samples=10,
        pdcr_temperature=0.2,
        pdcr_class_distance="sum",
        pdcr_variant="released",
        pdcr_options=options,
    )
    trainer, batch = started(1, trainer)
    loss = trainer.pdcr.loss
    assert list(loss.receptive_fields) == ["encoder.stages.0", "encoder.stages.1", "decoder.stages.2"]
    assert (loss.num_samples, loss.temperature, loss.class_distance, loss.variant) == (
        10,
        0.2,
        "sum",
        "released",
    )
    assert (loss.patch_sizes, loss.border, loss.skip_homogeneous) == ((3, 5), "clip", False)
    weights = []
    for trainer.current_epoch in range(6):
        trainer.on_train_epoch_start()
        weights.append(trainer.loss.weight)
    assert weights == pytest.approx([0, 0.075, 0.15, 0.225, 0.3, 0.3])
    assert math.isfinite(trainer.train_step(batch)["loss"])

    small = derived(root, trainers.nnUNetTrainerPDCR, pdcr_options={"patch_size": 5})
    small.initialize()
    assert small.pdcr.loss.patch_size == 5
    projected = derived(root, trainers.nnUNetTrainerPDCR, pdcr_options={"projection": "linear"})
    with pytest.raises(ValueError, match="pdcr_options: expected no projection"):
        projected.initialize()

    gated = derived(
        root,
        trainers.nnUNetTrainerPDCRUAFS,
        pdcr_patch_size=None,
        uafs_layers="encoder.stages.1",
        uafs_options={"hidden_channels": 4, "norm": "instance"},
    )
    gated.initialize()
    assert gated.pdcr.loss.patch_size is None
    (gate,) = gated.network.uafs.values()
    assert gate.head[0].out_channels == 4
    assert isinstance(gate.head[1], nn.InstanceNorm2d)


@pytest.mark.parametrize(
    ("base", "setting", "message"),
    [
        ("PDCR", {"pdcr_wieght": 1}, "pdcr_wieght: expected a setting of Derived.*near: .'pdcr_weight'"),
        ("PDCRUAFS", {"UAFS_layers": "auto"}, "UAFS_layers: expected a setting.*near: .'uafs_layers'"),
        ("PDCR", {"uafs_layers": "auto"}, "uafs_layers: expected a setting of Derived"),
        ("UAFS", {"pdcr_weight": 1}, "pdcr_weight: expected a setting of Derived"),
        ("PDCR", {"pdcr_weight": -1}, "pdcr_weight: expected a finite number of at least 0, got -1"),
        ("PDCR", {"pdcr_warmup_epochs": -5}, "pdcr_warmup_epochs: expected an integer of at least 0"),
        ("PDCR", {"pdcr_options": {"smapler": "grid"}}, "pdcr_options: .*PDCRLoss, got 'smapler'.*'sampler'"),
        ("UAFS", {"uafs_options": {"nrom": "batch"}}, "uafs_options: .*UAFS, got 'nrom'.*'norm'"),
        ("UAFS", {"uafs_options": {"num_classes": 2}}, "uafs_options: .*UAFS, got 'num_classes'"),
        ("PDCR", {"pdcr_layers": 2}, "layers: expected names of layers, got int"),
        ("PDCR", {"pdcr_w": 1}, r"one of \['pdcr_class_distance', 'pdcr_layers'"),
    ],
)
def test_settings_that_are_none_are_named(root: Path, base: str, setting: dict, message: str) -> None:
    trainer = derived(root, getattr(trainers, f"nnUNetTrainer{base}"), **setting)
    with pytest.raises((AttributeError, TypeError, ValueError), match=message):
        trainer.initialize()


def test_settings_of_an_object(root: Path) -> None:
    trainer = derived(root, trainers.nnUNetTrainerPDCRUAFS)
    trainer.pdcr_num_samples = 5
    trainer.initialize()
    assert trainer.pdcr.loss.num_samples == 5
    for name, message in (
        ("pdcr_wieght", "near: .'pdcr_weight'"),
        ("uafs_layers", "an attribute of the class"),
    ):
        trainer = derived(root, trainers.nnUNetTrainerPDCRUAFS)
        setattr(trainer, name, "auto")
        with pytest.raises(AttributeError, match=f"{name}: expected .*{message}"):
            trainer.initialize()


def test_a_base_that_builds_a_network_without_gates_is_named(root: Path) -> None:
    other = recursive_find_trainer_class_by_name("nnUNetTrainerBN")
    trainer = derived(root, type("Mixed", (other, trainers.nnUNetTrainerUAFS), {}))
    with pytest.raises(TypeError, match="Derived: expected this package's trainer first among the bases"):
        trainer.initialize()


def test_patterns_take_stages(root: Path) -> None:
    trainer = derived(
        root, trainers.nnUNetTrainerPDCRUAFS, pdcr_layers="decoder.stages.*", uafs_layers="encoder.*"
    )
    trainer.initialize()
    assert list(trainer.pdcr.loss.receptive_fields) == [f"decoder.stages.{k}" for k in range(3)]
    assert list(trainer.network.uafs) == [f"encoder.stages.{k}" for k in range(4)]


def test_compiled_after_the_network_without_gates(root: Path) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 1, 40, 40)
    plain, gated = make_trainer(1, "nnUNetTrainer"), derived(root, trainers.nnUNetTrainerPDCRUAFS)
    for trainer in (plain, gated):
        trainer.initialize()
    torch.compile(plain.network, backend="aot_eager")(x)
    compiled = torch.compile(gated.network, backend="aot_eager")
    labels = torch.randint(3, (2, 1, 40, 40))
    values = []
    for run in (compiled, gated.network):
        torch.testing.assert_close(run(x), gated.network(x), rtol=1e-3, atol=1e-4)
        run(x)
        values.append(gated.pdcr(labels))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        gated.network.eval()
        expected = gated.network(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
        remove_uafs(gated.network)
        assert not torch.allclose(gated.network(x)[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_single_region_is_foreground_against_the_rest(root: Path, ignore: bool) -> None:
    labels = {"background": 0, "whole": [1, 2]} | ({"ignore": 3} if ignore else {})
    trainer = derived(root, trainers.nnUNetTrainerPDCRUAFS, labels, pdcr_class_distance="sum")
    trainer.initialize()
    (gate, *_) = trainer.network.uafs.values()
    assert gate.num_classes == 2
    region = torch.zeros(2, 1 + ignore, 40, 40, dtype=torch.bool)
    region[:, 0, 10:25, 8:30] = True
    if ignore:
        region[:, 1, :, 20:] = True
    maps: dict[str, Tensor] = {}
    fields = trainer.pdcr.loss.receptive_fields
    for layer in fields:
        module = trainer.network.get_submodule(layer)
        module.register_forward_hook(lambda _, inputs, output, layer=layer: maps.update({layer: output}))
    trainer.network(torch.randn(2, 1, 40, 40))
    value = trainer.pdcr(*trainer.loss._labels_and_mask(region))
    # One class of two: half the distance of both classes is that of the foreground.
    boxes = trainer.pdcr.loss.patch_size
    two_classes = reference.PDCRLoss(
        fields, 2, class_distance="tv", patch_size=boxes, skip_homogeneous=True, border="background"
    )
    mask = ~region[:, 1:] if ignore else None
    expected = two_classes({layer: x.double() for layer, x in maps.items()}, region[:, 0].long(), mask)
    torch.testing.assert_close(value, expected.float())


def test_half_precision_as_on_a_gpu(root: Path) -> None:
    trainer, batch = started(1, make_trainer(1, "nnUNetTrainerPDCRUAFS"))
    expected = gradients(trainer, batch)["pdcr"]
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(trainer, batch)
    torch.testing.assert_close(actual["pdcr"], expected, rtol=0.02, atol=0.02)
    assert all(value.isfinite().all() for value in actual.values())


def test_mixes_with_trainers_of_nnunet_and_of_the_examples(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs")
    mixed = type("Mixed", (trainers.nnUNetTrainerPDCRUAFS, short), {})
    trainer = derived(root, mixed)
    assert trainer.num_epochs == 5
    trainer.initialize()
    assert len(trainer.network.uafs) == 7
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parents[2] / "examples" / "nnunet"))
    for name in ("nnUNetTrainerPDCRStrong", "nnUNetTrainerPDCRUAFSEncoder", "nnUNetTrainerPDCRTrial"):
        make_trainer(1, name).initialize()


def test_networks_of_unknown_make_need_names(root: Path) -> None:
    def build(*arguments: Any, **options: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1))

    trainer = derived(root, trainers.nnUNetTrainerPDCR, build_network_architecture=staticmethod(build))
    with pytest.raises(ValueError, match=r"pdcr_layers: expected layers of Sequential, which has no encoder"):
        trainer.initialize()
    named = derived(
        root, trainers.nnUNetTrainerPDCR, build_network_architecture=staticmethod(build), pdcr_layers="0"
    )
    named.initialize()
    assert named.pdcr.loss.receptive_fields["0"].size == (3, 3)
