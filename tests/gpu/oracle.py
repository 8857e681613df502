"""The float64 reference next to plain PyTorch in fp32: what the GPU kernels are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensor_cores
import torch
from conftest import normwise_error
from torch import Tensor

from contrastseg_fast import functional, reference

FP32_EPS = torch.finfo(torch.float32).eps
LARGEST_FP32_ERROR = 1e-5
_PAIRS_AT_ONCE = 1 << 25
COMPARED: list[
    tuple[str, float, float, float]
] = []  # name, our error, plain PyTorch's, allowed; see outcomes.py


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a larger tensor."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


@contextmanager
def any_order() -> Iterator[None]:
    """Let the oracle use operators that have no deterministic kernel."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)


def random_vectors(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-2])).to(device, dtype)


def random_ratios(device: torch.device, batch: int, count: int, classes: int) -> Tensor:
    """Proportions of which a third is shared by many vectors, as with real masks."""
    generator = torch.Generator().manual_seed(count + classes)
    ratios = torch.rand(batch, count, classes, generator=generator)
    ratios = ratios / ratios.sum(-1, keepdim=True).clamp(min=1e-6)
    ratios[:, : count // 3] = ratios[:, :1]
    return ratios[:, torch.randperm(count, generator=generator)].contiguous().to(device)


def loss_and_gradient(
    vectors: Tensor, ratios: Tensor, backend: str, grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss of every image, and the vectors' gradient."""
    leaf = vectors.detach().requires_grad_()
    loss = functional.pdcr_loss(leaf, ratios, reduction="none", backend=backend, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaf, grad.to(loss.dtype))


def image_gradients(vectors: Tensor) -> Tensor:
    """Incoming gradients that keep those of 16-bit vectors among the normal numbers, all different."""
    batch, count = vectors.shape[:2]
    return count * torch.linspace(0.5, 1.5, batch, device=vectors.device)


def assert_pdcr_as_exact_as_plain(
    vectors: Tensor, ratios: Tensor, backend: str, *, grad: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Errors against float64 are at most twice those of plain PyTorch that upcasts to fp32 first.

    A few roundings come on top, of numbers near 1 or of exponents up to 1 / temperature, and for the loss of
    16-bit vectors on a GPU what tensor cores truncate.
    """
    grad = image_gradients(vectors) if grad is None else grad
    actual = loss_and_gradient(vectors, ratios, backend, grad, **options)
    with any_order():
        exact = loss_and_gradient(vectors.double(), ratios, "reference", grad, **options)
        plain = loss_and_gradient(vectors.float(), ratios, "reference", grad, **options)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == vectors.dtype
    sharpness = 1 / options.get("temperature", 0.5)
    rounding = FP32_EPS * max(4.0, min(sharpness, 16.0), sharpness / 4)
    truncation = 0.0
    if vectors.is_cuda and exact[0].any():
        per_image = tensor_cores.largest_loss_error(vectors.shape[-1], vectors.dtype, 1 / sharpness)
        truncation = per_image * len(vectors) ** 0.5 / torch.linalg.vector_norm(exact[0]).item()
    assert_as_exact("loss", actual[0], plain[0], exact[0], rounding + truncation)
    assert_as_exact("gradient", actual[1], plain[1].to(vectors.dtype), exact[1], rounding)
    return actual


def assert_as_exact(name: str, actual: Tensor, plain: Tensor, exact: Tensor, rounding: float) -> None:
    assert actual.shape == exact.shape, name
    assert torch.isfinite(actual).all(), name
    error, of_plain = normwise_error(actual, exact), normwise_error(plain, exact)
    allowed = 2 * of_plain + rounding
    COMPARED.append((name, error, of_plain, allowed))
    assert error <= allowed, f"{name}: {error:.3g} against {allowed:.3g}"


def sampled_rows(
    vectors: Tensor, ratios: Tensor, rows: Tensor, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Eq. 7's mean over pairs of one image `(N, C)`, and its gradient at some rows, in chunks of rows."""
    length = torch.linalg.vector_norm(vectors.to(dtype), dim=-1, keepdim=True)
    u, phi = vectors.to(dtype) / length, ratios.to(dtype)
    count = len(u)

    def pairs(chosen: Tensor) -> tuple[Tensor, Tensor]:
        distance = sum((phi[chosen, m, None] - phi[:, m]).abs() for m in range(phi.shape[1]))
        return u[chosen] @ u.mT, distance / phi.shape[1]

    log_z = torch.empty(count, dtype=dtype, device=u.device)
    attraction = torch.zeros((), dtype=torch.float64, device=u.device)
    for chosen in torch.arange(count, device=u.device).split(max(1, _PAIRS_AT_ONCE // count)):
        s, d = pairs(chosen)
        log_z[chosen] = (s * d / temperature).logsumexp(-1)
        attraction += (s * (1 - d)).sum(dtype=torch.float64)
    loss = (count * log_z.sum(dtype=torch.float64) - attraction / temperature) / count**2
    s, d = pairs(rows)
    exponent = s * d / temperature
    share = (exponent - log_z[rows, None]).exp() + (exponent - log_z).exp()
    grad_unit = (count * d * share - 2 * (1 - d)) @ u / (temperature * count**2)
    grad_unit -= (grad_unit * u[rows]).sum(-1, keepdim=True) * u[rows]
    return loss, grad_unit / length[rows]


def gate_results(
    features: Tensor, logits: Tensor, grads: tuple[Tensor, Tensor], backend: str
) -> list[Tensor]:
    """Gated features, uncertainty, and the gradients of features and logits."""
    leaves = features.detach().requires_grad_(), logits.detach().requires_grad_()
    gated, u = functional.entropy_gate(*leaves, return_uncertainty=True, backend=backend)
    grads = grads[0].to(gated.dtype), grads[1].to(u.dtype)
    return [gated.detach(), u.detach(), *torch.autograd.grad((gated, u), leaves, grads)]


def assert_gate_as_exact_as_plain(
    features: Tensor, logits: Tensor, grads: tuple[Tensor, Tensor], backend: str
) -> list[Tensor]:
    """As `assert_pdcr_as_exact_as_plain`, for all four results of the gate."""
    grads = grads[0].to(features.dtype), grads[1].float()  # as they arrive
    actual = gate_results(features, logits, grads, backend)
    with any_order():
        exact = gate_results(features.double(), logits.double(), grads, "reference")
        plain = gate_results(features.float(), logits.float(), grads, "reference")
    dtypes = (features.dtype, torch.float32, features.dtype, logits.dtype)
    names = ("gated", "uncertainty", "features' gradient", "logits' gradient")
    for name, dtype, a, p, e in zip(names, dtypes, actual, plain, exact, strict=True):
        assert a.dtype == dtype, name
        if e.numel():
            assert_as_exact(name, a, p.to(dtype), e, 4 * FP32_EPS)
    return actual


def counted_on_the_cpu(
    labels: Tensor, starts: Tensor, size: tuple[int, ...], num_classes: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Eq. 4 by cropping and counting, where a loop over patches costs no launches."""
    ratios, fraction = reference.foreground_ratio(labels.cpu(), starts.cpu(), size, num_classes, **options)
    return ratios.to(labels.device), fraction.to(labels.device)
