"""PDCR on the GPU against the float64 reference: sizes, dtypes, forms of the loss, and its guarantees."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import blob_ratios

from contrastseg_fast import functional, problems
from gpu.oracle import (
    FP32_EPS,
    LARGEST_FP32_ERROR,
    any_order,
    assert_as_exact,
    assert_pdcr_as_exact_as_plain,
    image_gradients,
    loss_and_gradient,
    normwise_error,
    random_ratios,
    random_vectors,
    sampled_rows,
)

Fit = Callable[[int, int], int]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS, CHANNELS, CLASSES = (1, 63, 257, 1024, 4096), (1, 3, 16, 100, 256, 728, 2048), (2, 3, 5, 128)
SIZES = sorted(
    {
        *((count, 64, 2) for count in COUNTS),
        *((257, channels, 2) for channels in CHANNELS),
        *((257, 64, classes) for classes in CLASSES),
        *((1024, 728, 5), (4096, 2048, 2), (4096, 256, 3), (1024, 16, 128)),
    }
)
FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"class_distance": "sum"},
    "tv": {"class_distance": "tv"},
    "foreground alone": {"include_background": False},
    "constant": {"affinity": "constant"},
    "diagonal": {"affinity": "diagonal"},
    "bipartite": {"affinity": "bipartite"},
    "released": {"variant": "released"},
    "released sum": {"variant": "released", "class_distance": "sum"},
    "released constant": {"variant": "released", "affinity": "constant"},
    "released diagonal": {"variant": "released", "affinity": "diagonal"},
    "released bipartite": {"variant": "released", "affinity": "bipartite"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "channels", "classes"), SIZES)
def test_every_size(
    device, triton: str, fit: Fit, determinism: str, count: int, channels: int, classes: int, dtype
) -> None:
    count, channels, classes = fit(count, 63), fit(channels, 20), fit(classes, 5)
    vectors = random_vectors(device, 2, count, channels, dtype=dtype)
    ratios = random_ratios(device, 2, count, classes)
    if channels == 1 or count == 1:  # cosines of +-1: the gradient is 0, and its relative error undefined
        loss, gradient = loss_and_gradient(vectors, ratios, triton, image_gradients(vectors))
        with any_order():
            exact, _ = loss_and_gradient(vectors.double(), ratios, "reference", image_gradients(vectors))
        assert normwise_error(loss, exact) <= LARGEST_FP32_ERROR
        along = (gradient.double() * vectors.double()).abs().max().item()
        assert along <= 64 * torch.finfo(dtype).eps
        return
    loss, gradient = assert_pdcr_as_exact_as_plain(vectors, ratios, triton)
    if dtype == torch.float32:
        with any_order():
            exact = loss_and_gradient(vectors.double(), ratios, "reference", image_gradients(vectors))
        assert normwise_error(loss, exact[0]) <= LARGEST_FP32_ERROR
        assert normwise_error(gradient, exact[1]) <= LARGEST_FP32_ERROR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_every_form(device, triton: str, fit: Fit, determinism: str, options: dict[str, Any], dtype) -> None:
    count = fit(257, 63)
    vectors = random_vectors(device, 3, count, 48, dtype=dtype)
    assert_pdcr_as_exact_as_plain(vectors, random_ratios(device, 3, count, 3), triton, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.002, 0.01, 0.07, 1.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"class_distance": "sum"}, {"variant": "released"}], ids=str)
def test_any_temperature(device, triton: str, fit: Fit, options, temperature: float, dtype) -> None:
    count = fit(300, 63)
    vectors = random_vectors(device, 1, count, 40, dtype=dtype)
    ratios = random_ratios(device, 1, count, 2)
    assert_pdcr_as_exact_as_plain(vectors, ratios, triton, temperature=temperature, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("channels", [64, 256, 600])
def test_clustered_vectors(
    device, triton: str, fit: Fit, determinism: str, channels: int, temperature: float, dtype
) -> None:
    """At cosine 0.9999 the gradient is what is left after nearly all of it cancels."""
    count = fit(500, 63)
    vectors = random_vectors(device, 1, 1, channels) + 0.01 * random_vectors(device, 2, count, channels)
    ratios = random_ratios(device, 2, count, 2)
    assert_pdcr_as_exact_as_plain(vectors.to(dtype), ratios, triton, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [63, 1024, 4096])
def test_ratios_of_masks(device, triton: str, fit: Fit, determinism: str, count: int, dtype) -> None:
    """Many equal ratios, whole tiles of them at the larger sizes."""
    count = fit(count, 200)
    ratios = blob_ratios(2, count, 3).to(device)
    assert_pdcr_as_exact_as_plain(random_vectors(device, 2, count, 64, dtype=dtype), ratios, triton)


@pytest.mark.parametrize("kind", ["one phi", "two phis, sorted", "two phis, alternating"])
def test_whole_images_of_equal_ratios(device, triton: str, fit: Fit, determinism: str, kind: str) -> None:
    count = fit(1500, 200)
    ratios = torch.zeros(1, count, 2, device=device)
    second = torch.zeros(count, dtype=torch.bool, device=device)
    if kind == "two phis, sorted":
        second[count // 3 :] = True
    elif kind == "two phis, alternating":
        second[::2] = True
    ratios[:, :, 0], ratios[:, :, 1] = (~second).float(), second.float()
    assert_pdcr_as_exact_as_plain(random_vectors(device, 1, count, 32), ratios, triton)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"variant": "released"}, {"affinity": "bipartite"}], ids=str)
def test_invalid_vectors_are_excluded(
    device, triton: str, fit: Fit, determinism: str, options, dtype
) -> None:
    count = fit(410, 63)
    vectors, ratios = random_vectors(device, 3, count, 20, dtype=dtype), random_ratios(device, 3, count, 2)
    valid = (torch.rand(3, count, generator=torch.Generator().manual_seed(1)) > 0.4).to(device)
    valid[1] = False
    loss, gradient = assert_pdcr_as_exact_as_plain(vectors, ratios, triton, valid=valid, **options)
    assert loss[1] == 0
    assert not gradient[~valid].any()
    assert gradient[0, valid[0]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"variant": "released"}, {"affinity": "constant"}], ids=str)
def test_zero_vectors_get_no_gradient(
    device, triton: str, fit: Fit, determinism: str, options, dtype
) -> None:
    count = fit(257, 63)
    vectors, ratios = random_vectors(device, 2, count, 12, dtype=dtype), random_ratios(device, 2, count, 2)
    vectors[:, ::4] = 0
    vectors[1] = 0
    _, gradient = assert_pdcr_as_exact_as_plain(vectors, ratios, triton, **options)
    assert not gradient[:, ::4].any()
    assert not gradient[1].any()
    assert gradient[0].any()


@pytest.mark.parametrize("channels", [24, 600])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_rows_of_any_length(
    device, triton: str, fit: Fit, determinism: str, channels: int, scale: float
) -> None:
    count = fit(300, 63)
    vectors, ratios = random_vectors(device, 1, count, channels), random_ratios(device, 1, count, 2)
    scales = torch.ones(count, 1, device=device)
    scales[::3] = scale
    grad = image_gradients(vectors)
    loss, gradient = loss_and_gradient(vectors, ratios, triton, grad)
    scaled_loss, scaled_gradient = loss_and_gradient(vectors * scales, ratios, triton, grad)
    torch.testing.assert_close(scaled_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        scaled_gradient.double() * scales.double(), gradient.double(), rtol=1e-3, atol=1e-6
    )


def test_fp16_with_a_loss_scale_of_2_to_the_16(device, triton: str, fit: Fit, determinism: str) -> None:
    count = fit(1024, 63)
    vectors = random_vectors(device, 2, count, 64, dtype=torch.float16)
    grad = torch.full((2,), 2.0**16, device=device)
    assert_pdcr_as_exact_as_plain(vectors, random_ratios(device, 2, count, 2), triton, grad=grad)
    near = random_vectors(device, 1, 1, 64) + 0.01 * random_vectors(device, 2, count, 64)
    ratios = random_ratios(device, 2, count, 2)
    assert_pdcr_as_exact_as_plain(near.half(), ratios, triton, grad=grad, temperature=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [16384, 131072])
@pytest.mark.parametrize("ratios_of", ["random", "mask"])
def test_large(device, triton: str, fit: Fit, determinism: str, count: int, ratios_of: str, dtype) -> None:
    count = fit(count, 500)
    vectors = random_vectors(device, 1, count, 64, dtype=dtype)
    ratios = (
        random_ratios(device, 1, count, 2) if ratios_of == "random" else blob_ratios(1, count, 2).to(device)
    )
    rows = torch.arange(24, device=device) * (count - 1) // 23
    grad = image_gradients(vectors)
    loss, gradient = loss_and_gradient(vectors, ratios, triton, grad)
    with any_order():
        exact = sampled_rows(vectors[0], ratios[0], rows, 0.5, torch.float64)
        plain = sampled_rows(vectors[0], ratios[0], rows, 0.5, torch.float32)
    assert torch.isfinite(gradient).all()
    assert_as_exact("loss", loss[0], plain[0].float(), exact[0], 4 * FP32_EPS)
    scale = grad[0].item()
    assert_as_exact(
        "gradient",
        gradient[0, rows],
        (scale * plain[1]).to(dtype),
        scale * exact[1],
        8 * FP32_EPS,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "classes"), [(64, 2), (128, 2), (256, 5)])
def test_groups_of_equal_ratios(
    device, triton: str, fit: Fit, determinism: str, channels: int, classes: int, dtype, monkeypatch
) -> None:
    """Images of one class alone, of a mask and without equal ratios; some vectors are excluded."""
    count = fit(4096, 200)
    monkeypatch.setattr(problems, "FEWEST_GROUPED", count)
    vectors = random_vectors(device, 3, count, channels, dtype=dtype)
    ratios = blob_ratios(3, count, classes)
    ratios[0] = torch.eye(classes)[0]
    ratios[2] = torch.rand(count, classes).softmax(-1)
    valid = (torch.rand(3, count) > 0.2).to(device)
    loss, gradient = assert_pdcr_as_exact_as_plain(vectors, ratios.to(device), triton, valid=valid)
    assert not gradient[~valid].any()
    if determinism == "deterministic":
        again = loss_and_gradient(vectors, ratios.to(device), triton, image_gradients(vectors), valid=valid)
        assert all(torch.equal(a, b) for a, b in zip((loss, gradient), again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouped", [False, True], ids=["as they are", "grouped"])
@pytest.mark.parametrize(
    ("channels", "classes", "block_j"), [(128, 2, 128), (128, 8, 64), (256, 2, 64), (256, 5, 32)]
)
def test_overlapped_kernels(
    cuda, triton: str, channels: int, classes: int, block_j: int, grouped: bool, dtype, monkeypatch
) -> None:
    """Those of kernels/pdcr/hopper.py, in which a race would show in some of many programs."""
    if torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("for sm_90 alone")
    backward = importlib.import_module("contrastseg_fast.kernels.pdcr.backward")
    from contrastseg_fast.kernels._tuning import Launch, forced

    if backward.overlapped_kernels() is None:
        pytest.skip("this Triton lacks what they need of Gluon")
    launched, run_kernel = set(), backward.run_kernel

    def record(kernel: Any, *arguments: Any) -> None:
        launched.add(kernel.fn.__name__)
        run_kernel(kernel, *arguments)

    monkeypatch.setattr(backward, "run_kernel", record)
    monkeypatch.setattr(problems, "FEWEST_GROUPED", 1 if grouped else 1 << 20)
    for count in (100, 1000, 4096):
        vectors = random_vectors(cuda, 3, count, channels, dtype=dtype)
        ratios = blob_ratios(3, count, classes).to(cuda)
        valid = (torch.rand(3, count) > 0.2).to(cuda)
        with forced("pdcr_backward ", Launch(128, block_j, 8, 3, overlapped=True)):
            _, gradient = assert_pdcr_as_exact_as_plain(vectors, ratios, triton, valid=valid)
            for _ in range(4):
                again = loss_and_gradient(vectors, ratios, triton, image_gradients(vectors), valid=valid)[1]
                assert normwise_error(again, gradient) < 1e-3  # log Z is summed in another order
    assert launched == {"pdcr_bwd_groups_hopper_kernel" if grouped else "pdcr_bwd_hopper_kernel"}


def test_offsets_beyond_32_bits(cuda, triton: str) -> None:
    batch, count, channels = 1030, 1024, 2048
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of free memory")
    assert batch * count * channels > 2**31
    vectors = torch.empty(batch, count, channels, dtype=torch.bfloat16, device=cuda)
    vectors[:-1] = 1
    vectors[-1] = random_vectors(cuda, count, channels, dtype=torch.bfloat16)
    ratios = random_ratios(cuda, 1, count, 2)
    grad = torch.full((batch,), float(count), device=cuda)
    loss, gradient = loss_and_gradient(vectors, ratios.expand(batch, -1, -1), triton, grad)
    alone = loss_and_gradient(vectors[-1:].clone(), ratios, triton, grad[-1:])
    torch.testing.assert_close(loss[-1:], alone[0], rtol=1e-6, atol=0)
    assert normwise_error(gradient[-1:], alone[1]) < 1e-2
    assert gradient[-1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "channels"), [(257, 100), (1024, 256), (4096, 728), (20000, 64)])
def test_equal_bits(device, triton: str, fit: Fit, deterministic, count: int, channels: int, dtype) -> None:
    count = fit(count, 100)
    vectors = random_vectors(device, 2, count, channels, dtype=dtype)
    ratios = random_ratios(device, 2, count, 3)
    grad = image_gradients(vectors)
    first = loss_and_gradient(vectors, ratios, triton, grad)
    for _ in range(4):
        again = loss_and_gradient(vectors, ratios, triton, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_and_expanded_inputs(device, triton: str, fit: Fit, deterministic) -> None:
    """Other strides are other kernels, which may add up the squares of a vector in another order."""
    count = fit(150, 63)
    vectors, ratios = random_vectors(device, 2, count, 20), random_ratios(device, 2, count, 3)
    grad = torch.ones(2, device=device)
    expected = loss_and_gradient(vectors, ratios, triton, grad)
    wide = torch.zeros(2, count, 60, device=device)
    wide[..., ::3] = vectors
    valid = torch.ones(1, 1, dtype=torch.bool, device=device).expand(2, count)
    for strided in (vectors.mT.contiguous().mT, wide[..., ::3]):
        spread = ratios.mT.contiguous().mT
        assert not strided.is_contiguous()
        actual = loss_and_gradient(strided, spread, triton, grad[:1].expand(2), valid=valid)
        for a, e in zip(actual, expected, strict=True):
            assert normwise_error(a, e) <= 8 * FP32_EPS
    one = loss_and_gradient(
        vectors[:1].expand(3, -1, -1), ratios[:1].expand(3, -1, -1), triton, grad[:1].expand(3)
    )
    assert all(torch.equal(one[1][b], one[1][0]) for b in (1, 2))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 1, 4), (2, 2, 4)])
def test_nothing_to_pair(device, triton: str, shape: tuple[int, int, int]) -> None:
    vectors = torch.randn(shape, device=device, requires_grad=True)
    ratios = torch.rand(*shape[:2], 2, device=device)
    loss = functional.pdcr_loss(vectors, ratios, backend=triton)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_reduction(device, triton: str, reduction: str) -> None:
    vectors, ratios = random_vectors(device, 3, 90, 20), random_ratios(device, 3, 90, 2)
    valid = torch.ones(3, 90, dtype=torch.bool, device=device)
    valid[0, 30:] = False
    actual = functional.pdcr_loss(vectors, ratios, valid=valid, reduction=reduction, backend=triton)
    with any_order():
        exact = functional.pdcr_loss(
            vectors.double(), ratios, valid=valid, reduction=reduction, backend="reference"
        )
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_fp64_agrees_to_rounding(device) -> None:
    vectors, ratios = random_vectors(device, 2, 90, 20, dtype=torch.float64), random_ratios(device, 2, 90, 2)
    grad = torch.ones(2, device=device)
    with any_order():
        exact = loss_and_gradient(vectors, ratios, "reference", grad)
    actual = loss_and_gradient(vectors, ratios, "auto", grad)
    assert all(normwise_error(a, e) < 1e-12 for a, e in zip(actual, exact, strict=True))


def test_nan_shows(device, triton: str) -> None:
    vectors, ratios = random_vectors(device, 2, 90, 20), random_ratios(device, 2, 90, 2)
    vectors[0, 7, 3] = torch.nan
    loss, gradient = loss_and_gradient(vectors, ratios, triton, torch.ones(2, device=device))
    assert loss[0].isnan()
    assert gradient[0].isnan().any()
    assert torch.isfinite(loss[1])
    assert torch.isfinite(gradient[1]).all()


def test_second_derivatives_raise(device, triton: str) -> None:
    vectors = random_vectors(device, 1, 20, 8).requires_grad_()
    loss = functional.pdcr_loss(vectors, random_ratios(device, 1, 20, 2), backend=triton)
    (gradient,) = torch.autograd.grad(loss, vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradient.square().sum().backward()


def test_autocast_leaves_products_alone(device, triton: str, deterministic) -> None:
    vectors, ratios = random_vectors(device, 1, 200, 32), random_ratios(device, 1, 200, 2)
    grad = torch.ones(1, device=device)
    expected = loss_and_gradient(vectors, ratios, triton, grad)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = loss_and_gradient(vectors, ratios, triton, grad)
    assert all(torch.equal(a, e) for a, e in zip(inside, expected, strict=True))


@pytest.mark.parametrize(("precision", "least", "most"), [("ieee", 0.0, 1e-5), ("tf32", 2e-5, 1e-2)])
def test_fp32_products_honour_torchs_precision(
    cuda, triton: str, monkeypatch: pytest.MonkeyPatch, precision: str, least: float, most: float
) -> None:
    vectors, ratios = random_vectors(cuda, 1, 1024, 256), random_ratios(cuda, 1, 1024, 2)
    grad = torch.ones(1, device=cuda)
    exact = loss_and_gradient(vectors.double(), ratios, "reference", grad)[1]
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    assert least <= normwise_error(loss_and_gradient(vectors, ratios, triton, grad)[1], exact) < most


@pytest.mark.parametrize("options", [{}, {"affinity": "bipartite"}, {"class_distance": "tv"}], ids=str)
def test_repelled_fraction(device, triton: str, options) -> None:
    vectors, ratios = random_vectors(device, 2, 200, 16), random_ratios(device, 2, 200, 3)
    actual = functional.repelled_fraction(vectors, ratios, backend=triton, **options)
    with any_order():
        exact = functional.repelled_fraction(vectors.double(), ratios, backend="reference", **options)
    torch.testing.assert_close(actual.double(), exact.double(), rtol=0, atol=1e-3)  # pairs at the border
