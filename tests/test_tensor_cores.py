"""The model of tensor cores against an H100, and the Triton kernels with products that the model gives."""

from __future__ import annotations

import math

import pytest
import tensor_cores
import torch
from conftest import normwise_error, random_ratios
from gpu.oracle import random_ratios as ratios_on_the_card
from gpu.oracle import random_vectors
from test_pdcr import PAPER, loss_and_gradient
from torch import Tensor

from contrastseg_fast import _backend

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Relative errors of the loss of 500 vectors at cosine 0.9999 on an H100: what `test_clustered_vectors` said
# where it failed (benchmarks/results/gpu_h100_2026-11-27.json).
MEASURED = {
    ("fp16", 64, 0.07): 2.0e-6,
    ("bf16", 256, 0.07): 4.0e-6,
    ("fp16", 256, 0.07): 1.3e-5,
    ("bf16", 600, 0.07): 1.55e-5,
    ("fp16", 600, 0.07): 4.15e-5,
    ("fp16", 600, 0.5): 6.7e-7,
}


def clustered(count: int, channels: int, dtype: torch.dtype, images: int = 1) -> Tensor:
    """The vectors of `test_clustered_vectors`."""
    cpu = torch.device("cpu")
    centre = random_vectors(cpu, 1, 1, channels)
    return (centre + 0.01 * random_vectors(cpu, images, count, channels)).to(dtype)


def loss(cosines: Tensor, distances: Tensor, temperature: float, sum_of_cosines: Tensor) -> Tensor:
    """Eq. 7's mean as the kernels form it, with the numerator's constant part from the sum of all vectors."""
    log_z = (cosines * distances / temperature).logsumexp(-1)
    attraction = sum_of_cosines - (cosines * distances).sum((-2, -1))
    return log_z.mean(-1) - attraction / temperature / cosines.shape[-1] ** 2


@pytest.mark.parametrize(("dtype", "channels", "temperature"), MEASURED)
def test_the_model_tells_what_was_measured(dtype: str, channels: int, temperature: float) -> None:
    """Within a quarter; fp32 roundings outside of the tensor cores add their own."""
    vectors = clustered(500, channels, DTYPES[dtype], images=2)
    ratios = ratios_on_the_card(torch.device("cpu"), 2, 500, 2).double()
    distances = (ratios[:, :, None] - ratios[:, None]).abs().mean(-1)
    lengths = torch.linalg.vector_norm(vectors.double(), dim=-1)
    scale = 1 / (lengths[:, :, None] * lengths[:, None])
    exact = vectors.double() @ vectors.double().mT * scale
    given = torch.stack([tensor_cores.product(image, image) for image in vectors]) * scale
    sums = exact.sum((-2, -1))
    predicted = normwise_error(
        loss(given, distances, temperature, sums), loss(exact, distances, temperature, sums)
    )
    assert predicted == pytest.approx(MEASURED[dtype, channels, temperature], rel=0.26)


@pytest.mark.parametrize("channels", [16, 64, 256, 1000, 2048])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parallel_vectors_shift_by_no_more_than_the_bar(channels: int, dtype: torch.dtype) -> None:
    vectors = clustered(40, channels, dtype)[0]
    exact = vectors.double() @ vectors.double().mT
    shift = ((tensor_cores.product(vectors, vectors) - exact) / exact).mean().item()
    assert -tensor_cores.largest_shift(channels, dtype) < shift < 0


def test_unlike_vectors_do_not_shift() -> None:
    vectors = torch.randn(60, 256).half()
    error = tensor_cores.product(vectors, vectors) - vectors.double() @ vectors.double().mT
    others = error[~torch.eye(60, dtype=torch.bool)] / 256
    assert abs(others.mean()) < 0.02 * tensor_cores.largest_shift(256, torch.float16)


def test_sums_of_few_bits_are_exact() -> None:
    a, b = torch.randint(-8, 8, (5, 48)), torch.randint(-8, 8, (7, 48))
    assert torch.equal(tensor_cores.product(a.half(), b.half()), (a @ b.mT).double())


@pytest.fixture
def with_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let interpreted kernels and the products of slabs sum as the model does."""
    pytest.importorskip("triton")
    if not _backend.interpreting():
        pytest.skip("kernels are interpreted with TRITON_INTERPRET=1 only")
    from triton.runtime import interpreter

    from contrastseg_fast.kernels.pdcr import plan, slabs

    def create_dot(_self: object, a, b, accumulator, *_options: object):
        given = tensor_cores.product(torch.from_numpy(a.data), torch.from_numpy(b.data).mT)
        total = given.float().numpy() + accumulator.data
        return interpreter.TensorHandle(total, accumulator.dtype.scalar)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([tensor_cores.product(x, y.mT) for x, y in zip(a, b, strict=True)]).float()

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(slabs, "product", product)
    monkeypatch.setattr(plan, "ROWS", plan.RowLaunch(128, 128, 4))


@pytest.mark.parametrize("channels", [64, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernels_keep_the_bar(with_tensor_cores: None, channels: int, dtype: torch.dtype) -> None:
    """The loss: `largest_loss_error`. The gradient: twice plain PyTorch's error, as without tensor cores."""
    temperature, count = 0.07, 100
    affinity = PAPER._replace(temperature=temperature)
    vectors, ratios, grad = clustered(count, channels, dtype), random_ratios(1, count, 2), torch.ones(1)
    value, _, gradient = loss_and_gradient("triton", vectors, ratios, None, affinity, grad)
    exact, _, exact_gradient = loss_and_gradient("default", vectors.double(), ratios, None, affinity, grad)
    _, _, plain_gradient = loss_and_gradient("default", vectors.float(), ratios, None, affinity, grad)
    error = (value.double() - exact).abs().item()
    rounding = torch.finfo(torch.float32).eps / temperature
    assert math.isfinite(error)
    assert error <= tensor_cores.largest_loss_error(channels, dtype, temperature) + rounding
    allowed = 2 * normwise_error(plain_gradient.to(dtype), exact_gradient)
    assert normwise_error(gradient, exact_gradient) <= allowed
