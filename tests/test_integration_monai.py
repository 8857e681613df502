"""MONAI's networks with PDCR and UAFS, and the loss and the block by MONAI's conventions."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import blob_labels, normwise_error
from torch import Tensor, nn

pytest.importorskip("monai", reason="needs the extra monai")
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.networks import nets
from monai.utils import LossReduction

import contrastseg_fast
from contrastseg_fast import ReceptiveField, reference
from contrastseg_fast.functional import pdcr_loss
from contrastseg_fast.integrations.monai import (
    UAFS,
    PDCRLoss,
    RegularizedLoss,
    attach_pdcr,
    insert_uafs,
    remove_uafs,
)

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "UNet": lambda dims: nets.UNet(dims, 1, 3, (4, 6, 8), (2, 2), num_res_units=1),
    "BasicUNet": lambda dims: nets.BasicUNet(dims, 1, 3, features=(4, 4, 6, 6, 8, 4)),
    "SegResNet": lambda dims: nets.SegResNet(dims, 8, 1, 3, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    "DynUNet": lambda dims: nets.DynUNet(
        dims, 1, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 6, 8], norm_name="instance"
    ),
}
BY_NAME = {
    "UNet": ["model.0", "model.1.submodule.0"],
    "BasicUNet": ["down_[12]", "upcat_2"],
    "SegResNet": ["down_layers.1", "up_layers.*.0"],
    "DynUNet": ["downsamples.*", "upsamples.0.conv_block"],
}


def batch(dims: int, side: int = 64) -> tuple[Tensor, Tensor]:
    """Images and labels `(2, 1, *spatial)`, as MONAI's loaders give them."""
    shape = (side,) * dims
    return torch.randn(2, 1, *shape), blob_labels(2, shape, 3)[:, None].float()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("network", ["UNet", "DynUNet"])  # compiling takes long
def test_compiled_after_the_network_without_gates(network: str) -> None:
    """The baseline first and the gated network second, in one process, as one compares them."""
    torch.compiler.reset()
    x, y = batch(2, 64)
    baseline, model = NETWORKS[network](2), NETWORKS[network](2)
    torch.compile(baseline, backend="aot_eager")(x)
    insert_uafs(model, BY_NAME[network], 3, example_input=x, norm="instance")
    pdcr = attach_pdcr(model, BY_NAME[network], 3, example_input=x, num_samples=100, patch_size=7)
    eager, eager_pdcr = copy.deepcopy((model, pdcr))
    compiled = torch.compile(model, backend="aot_eager")
    losses = []
    for run, regularizer in ((compiled, pdcr), (eager, eager_pdcr)):
        output = run(x)
        finest = output if isinstance(output, Tensor) else output[0]
        losses.append(finest.square().mean() + regularizer(y))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in model.uafs.parameters())
    with torch.no_grad():
        outputs = [run.eval()(x) for run in (compiled, eager)]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
        remove_uafs(eager)
        assert normwise_error(outputs[0], eager(x)) > 1e-3


def test_sliding_windows_take_gates_and_collect_nothing() -> None:
    model = NETWORKS["BasicUNet"](2)
    x, y = batch(2, 64)
    insert_uafs(model, "auto", 3, example_input=x)
    pdcr = attach_pdcr(model, "down_1", 3, example_input=x, patch_size=7)
    model(x)
    expected = pdcr(y)
    model(x)  # validation between a forward pass and its loss
    model.eval()
    with torch.no_grad():
        whole = model(x)
        windows = sliding_window_inference(x, (64, 64), 1, model)
        torch.testing.assert_close(windows, whole)
        parts = sliding_window_inference(torch.cat([x, x], 2), (64, 64), 2, model, overlap=0.0)
        torch.testing.assert_close(parts, torch.cat([whole, whole], 2))
    model.train()
    with pytest.raises(RuntimeError, match="pdcr: expected a forward pass"):
        pdcr(y)
    model(x)
    torch.testing.assert_close(pdcr(y), expected)


@pytest.mark.parametrize("layers", ["auto", "by name"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_train_as_with_the_reference(network: str, dims: int, layers: str) -> None:
    model = NETWORKS[network](dims)
    x, y = batch(dims, 64 if dims == 2 else 32 if network == "BasicUNet" else 16)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = "auto" if layers == "auto" else BY_NAME[network]
    insert_uafs(model, chosen, 3, example_input=x)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert all(".uafs." in key for key in set(after) - set(state))
    assert len(after) > len(state)
    slow = copy.deepcopy(model)
    for gate in slow.uafs.values():
        gate.backend = "reference"
    results = []
    for net, backend in ((model, "auto"), (slow, "reference")):
        # Gates widen the fields, to more than half of such small images: boxes of 7 pixels instead.
        options = {"num_samples": 100, "patch_size": 7, "backend": backend}
        tapped = "auto" if layers == "auto" and dims == 2 else BY_NAME[network]
        pdcr = attach_pdcr(net, tapped, 3, example_input=x, **options)
        criterion = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr, weight=0.1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = []
        for step in range(2):
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            losses.append(loss.detach())
            if step == 0:
                first = gradients(net)
            optimizer.step()
        assert criterion.last_pdcr is not None
        results.append((torch.stack(losses), first))
    assert len(set(results[0][0].tolist())) == 2
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert normwise_error(results[0][1], results[1][1]) < 1e-4
    remove_uafs(model)
    model.load_state_dict(state)


def test_training_lowers_the_loss() -> None:
    model = NETWORKS["BasicUNet"](2)
    x, y = batch(2)
    x = x + 3 * y
    insert_uafs(model, "auto", 3, example_input=x)
    pdcr = attach_pdcr(model, ["down_1", "down_2"], 3, example_input=x, class_distance="tv")
    criterion = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_meta_tensors_give_what_tensors_give() -> None:
    model = insert_uafs(NETWORKS["BasicUNet"](2), "down_1", 3, example_input=batch(2)[0])
    x, y = batch(2)
    pdcr = attach_pdcr(model, ["down_1", "upcat_2"], 3, example_input=MetaTensor(x), num_samples=64)
    criterion = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr)
    values = []
    for kind in (torch.as_tensor, MetaTensor):
        model.zero_grad()
        loss = criterion(model(kind(x)), kind(y))
        loss.backward()
        values.append((torch.as_tensor(loss.detach()), gradients(model)))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0, check_device=False)
    assert type(loss) is Tensor


def features_and_fields() -> tuple[list[Tensor], list[ReceptiveField]]:
    fields = [
        ReceptiveField((7, 7), (2, 2), (-3, -3)),
        ReceptiveField((11, 11), (4, 4), (-5, -5)),
    ]
    return [torch.randn(2, 5, 16, 16), torch.randn(2, 8, 8, 8)], fields


@pytest.mark.parametrize("reduction", [*LossReduction, "mean", "sum", "none"])
def test_the_loss_by_monais_conventions(reduction: LossReduction | str) -> None:
    maps, fields = features_and_fields()
    labels = blob_labels(2, (32, 32), 3)
    one_hot = nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    for include_background in (True, False):
        options = {"include_background": include_background, "num_samples": 49}
        plain = contrastseg_fast.PDCRLoss(fields, 3, reduction=str(reduction), **options)
        expected = plain(maps, labels)
        by_label = PDCRLoss(fields, 3, to_onehot_y=True, reduction=reduction, **options)
        by_channel = PDCRLoss(fields, 3, reduction=reduction, **options)
        assert by_label.reduction == str(reduction)
        for target in (labels[:, None], labels[:, None].float(), MetaTensor(labels[:, None])):
            torch.testing.assert_close(by_label(maps, target), expected, rtol=0, atol=0)
        meta = [MetaTensor(x) for x in maps]
        value = by_channel(meta, MetaTensor(one_hot))
        assert type(value) is Tensor
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_metatensors_in_the_plain_loss(backend: str) -> None:
    """Maps, labels and mask as MONAI's loaders give them; their methods are stricter than a tensor's."""
    maps, fields = features_and_fields()
    maps = [x.requires_grad_() for x in maps]
    labels, mask = blob_labels(2, (32, 32), 3), torch.ones(2, 1, 32, 32)
    loss = contrastseg_fast.PDCRLoss(fields, 3, num_samples=49, backend=backend)
    expected = [loss(maps, labels), *torch.autograd.grad(loss(maps, labels), maps)]
    meta = [MetaTensor(x.detach()).requires_grad_() for x in maps]
    value = loss(meta, MetaTensor(labels), MetaTensor(mask))
    for ours, plain in zip([value, *torch.autograd.grad(value, meta)], expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), plain, rtol=0, atol=0)
    vectors, phi = torch.randn(2, 9, 4), torch.rand(2, 9, 3).softmax(-1)
    ours = pdcr_loss(MetaTensor(vectors), MetaTensor(phi), backend=backend)
    torch.testing.assert_close(
        torch.as_tensor(ours), pdcr_loss(vectors, phi, backend=backend), rtol=0, atol=0
    )


def test_masks_mappings_and_single_channels() -> None:
    maps, fields = features_and_fields()
    named = dict(zip("ab", fields, strict=True))
    labels = blob_labels(2, (32, 32), 2)[:, None]
    mask = torch.ones(2, 1, 32, 32)
    mask[..., :20] = 0
    expected = contrastseg_fast.PDCRLoss(named, 2)(maps, labels, mask)
    loss = PDCRLoss(named, 2, to_onehot_y=True)
    value = loss({"b": maps[1], "a": maps[0]}, labels, MetaTensor(mask))
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    single = contrastseg_fast.PDCRLoss(fields, 1)(maps, labels)
    for to_onehot_y in (True, False):
        torch.testing.assert_close(PDCRLoss(fields, 1, to_onehot_y=to_onehot_y)(maps, labels), single)


def test_targets_that_do_not_fit() -> None:
    maps, fields = features_and_fields()
    labels = blob_labels(2, (32, 32), 3)
    with pytest.raises(ValueError, match=r"target: expected \(B, 3, \*spatial\).* to_onehot_y=False"):
        PDCRLoss(fields, 3)(maps, labels[:, None])
    with pytest.raises(ValueError, match=r"target: expected .*\(B, 1, \*spatial\)"):
        PDCRLoss(fields, 3, to_onehot_y=True)(maps, labels)
    with pytest.raises(ValueError, match="'product' is not a valid LossReduction"):
        PDCRLoss(fields, 3, reduction="product")
    with pytest.raises(ValueError, match="temperature"):
        PDCRLoss(fields, 3, temperature=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("norm", "act", "kinds"),
    [
        ("BATCH", "RELU", ("BatchNorm", "ReLU")),
        (("batch", {"momentum": 0.3}), ("LEAKYRELU", {"negative_slope": 0.3}), ("BatchNorm", "LeakyReLU")),
        (("GROUP", {"num_groups": 4}), "PRELU", ("GroupNorm", "PReLU")),
        (None, None, ()),
    ],
)
def test_the_block_takes_monais_layers(
    dims: int, norm: str | tuple | None, act: str | tuple | None, kinds: tuple[str, ...]
) -> None:
    gate = UAFS(spatial_dims=dims, in_channels=6, num_classes=3, hidden_channels=8, norm=norm, act=act)
    names = [type(module).__name__ for module in gate.head.modules()]
    assert [name for name in names if name.removesuffix(f"{dims}d") in kinds] == [
        kind + f"{dims}d" * (kind == "BatchNorm") for kind in kinds
    ]
    x = MetaTensor(torch.randn(2, 6, *(5,) * dims, requires_grad=True))
    expected = reference.entropy_gate(x.as_tensor(), gate.head(x.as_tensor()))
    torch.testing.assert_close(torch.as_tensor(gate(x)), expected, check_device=False)
    gate(x).sum().backward()
    assert all(parameter.grad is not None for parameter in gate.parameters())


def test_regularized_losses() -> None:
    model = nets.DynUNet(
        2, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4, 6, 8, 8], deep_supervision=True, deep_supr_num=2
    )
    x, y = batch(2)
    pdcr = attach_pdcr(model, "downsamples.0", 3, example_input=x)
    dice = DiceCELoss(to_onehot_y=True, softmax=True)
    deep = DeepSupervisionLoss(dice)
    criterion = RegularizedLoss(deep, pdcr, weight=0.5)
    outputs = list(torch.unbind(model(x), 1))
    value = criterion(outputs, y)
    torch.testing.assert_close(value, deep(outputs, y) + 0.5 * criterion.last_pdcr)
    assert criterion.last_pdcr is not None
    assert not criterion.last_pdcr.requires_grad
    model.eval()
    torch.testing.assert_close(RegularizedLoss(dice, pdcr)(model(x), y), dice(model(x), y))
    for arguments, message in (
        ((dice, 3), "pdcr: expected what attach_pdcr returns"),
        ((3, pdcr), "loss: expected a loss"),
    ):
        with pytest.raises(TypeError, match=message):
            RegularizedLoss(*arguments)
    with pytest.raises(ValueError, match="weight"):
        RegularizedLoss(dice, pdcr, weight=-1)


def test_the_network_holds_the_heads_and_the_loss_holds_no_parameters() -> None:
    model, (x, y) = NETWORKS["BasicUNet"](2), batch(2)
    pdcr = attach_pdcr(model, ["down_1", "upcat_2"], 3, example_input=x, projection="linear")
    criterion = RegularizedLoss(DiceCELoss(to_onehot_y=True, softmax=True), pdcr)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    criterion(model(x), y).backward()
    assert all(head.grad.abs().max() > 0 for head in model.pdcr.parameters())


def test_without_monai_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['monai'] = None; import contrastseg_fast.integrations.monai"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: contrastseg_fast.integrations.monai needs MONAI: pip install" in result.stderr
