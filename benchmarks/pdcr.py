"""`pdcr_loss`, forward and backward (Eqs. 3, 6 and 7, mean over all pairs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.masks import mask_ratios
from benchmarks.operation import OURS, Implementation, Inputs, Operation, Result, Run, Unavailable, Work
from contrastseg_fast import functional, reference
from contrastseg_fast.affinity import make_affinity
from contrastseg_fast.ops import pdcr as op

TEMPERATURE = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TILES = (256, 512, 1024)
CHECKED = 4096
KEOPS_PAIRS = 2**20
FLEX_CHANNELS = (16, 32, 64, 128, 256)  # head dimensions it is made for
_LOSS_SCALE = {"fp16": 2.0**16}  # without it, gradients of a mean over N^2 pairs vanish in fp16

COMPILED_16_BIT = "torch.compile, 16-bit products"

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Vectors `(batch, count, channels)`; ratios of `classes` at random, or those of a real mask."""

    count: int
    channels: int = 256
    ratios: str = "random"
    classes: int = 2
    dtype: str = "fp32"
    batch: int = 1

    def __str__(self) -> str:
        batch = f"B={self.batch}," if self.batch > 1 else ""
        return f"{self.ratios},{batch}N={self.count},C={self.channels},M={self.classes},{self.dtype}"

    @property
    def matrix_bytes(self) -> int:
        """Of one N x N matrix for each image, fp32."""
        return 4 * self.batch * self.count**2


def _inputs(size: Size, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    vectors = torch.randn(size.batch, size.count, size.channels, generator=generator, device=device)
    if size.ratios == "mask":
        ratios = mask_ratios(size.batch, size.count, size.classes)
    else:
        ratios = torch.rand(size.batch, size.count, size.classes, generator=generator, device=device)
        ratios /= ratios.sum(-1, keepdim=True)
    return vectors.to(device, DTYPES[size.dtype]), ratios.to(device)


def _with_gradient(loss: Loss) -> Callable[[Size, Inputs], Run]:
    def prepare(size: Size, inputs: Inputs) -> Run:
        vectors, ratios = inputs
        scale = _LOSS_SCALE.get(size.dtype, 1.0)

        def run() -> Result:
            leaf = vectors.detach().requires_grad_()
            value = loss(leaf, ratios)
            return value.detach(), *torch.autograd.grad(value, leaf, torch.full_like(value, scale))

        return run

    return prepare


def _reference(vectors: Tensor, ratios: Tensor) -> Tensor:
    return reference.pdcr_loss(vectors, ratios, temperature=TEMPERATURE)


def _compiled(size: Size, inputs: Inputs) -> Run:
    return _with_gradient(torch.compile(_reference, dynamic=False, fullgraph=True))(size, inputs)


def loss_by_16_bit_products(vectors: Tensor, ratios: Tensor) -> Tensor:
    """Eq. 7 with unit vectors rounded to the vectors' dtype, as most losses of this kind are written.

    Faster than the reference, which multiplies in fp32, and with twice the rounding error.
    """
    u = torch.nn.functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)
    s = (u @ u.mT).float()
    d = (ratios[:, :, None] - ratios[:, None]).abs().mean(-1)
    log_z = (s * d / TEMPERATURE).logsumexp(-1, keepdim=True)
    return (log_z - s * (1 - d) / TEMPERATURE).mean()


def _compiled_16_bit(size: Size, inputs: Inputs) -> Run:
    loss = torch.compile(loss_by_16_bit_products, dynamic=False, fullgraph=True)
    return _with_gradient(loss)(size, inputs)


def needs_16_bit(size: Any, _device: str) -> str | None:
    return "for 16-bit vectors" if size.dtype == "fp32" else None


def _ours(vectors: Tensor, ratios: Tensor) -> Tensor:
    return functional.pdcr_loss(vectors, ratios, temperature=TEMPERATURE)


def _forward_alone(_size: Size, inputs: Inputs) -> Run:
    """The part of ours that FlexAttention has a counterpart of, and the sums next to it."""
    return lambda: (_ours(*inputs),)


def flex_log_z(attention: Callable[..., Any], vectors: Tensor, ratios: Tensor) -> Tensor:
    """log Z of Eq. 7 `(B, N)` as the log-sum-exp of attention with d as a factor of its scores."""
    from torch.nn.attention.flex_attention import AuxRequest

    u = torch.nn.functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)[:, None]
    classes = ratios.shape[-1]

    def times_distance(score: Tensor, b: Tensor, _head: Tensor, i: Tensor, k: Tensor) -> Tensor:
        distance = (ratios[b, i, 0] - ratios[b, k, 0]).abs()
        for m in range(1, classes):
            distance = distance + (ratios[b, i, m] - ratios[b, k, m]).abs()
        return score * (distance / classes)

    wanted = AuxRequest(lse=True)
    _, found = attention(u, u, u, score_mod=times_distance, scale=1 / TEMPERATURE, return_aux=wanted)
    return found.lse[:, 0]


def _flex(_size: Size, inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    attention = torch.compile(flex_attention, dynamic=False)
    return lambda: (flex_log_z(attention, *inputs),)


def _flex_unsuited(size: Size, _device: str) -> str | None:
    if size.channels not in FLEX_CHANNELS:
        return f"made for head dimensions of {FLEX_CHANNELS}"
    return None


class _ChunkedLoss(torch.autograd.Function):
    """The operator's plain-PyTorch kernel, as on devices without a kernel of their own."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, ratios: Tensor) -> Tensor:
        affinity = make_affinity(
            "ratio",
            num_classes=ratios.shape[-1],
            temperature=TEMPERATURE,
            class_distance="mean",
            include_background=True,
            variant="paper",
        )
        ctx.options = ([*affinity], "mean")
        loss, log_z, *saved = op._forward(vectors, ratios, None, *ctx.options)
        ctx.save_for_backward(log_z, vectors, ratios, None, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return op._backward(grad, *ctx.saved_tensors, *ctx.options), None


def _chunked(vectors: Tensor, ratios: Tensor) -> Tensor:
    return _ChunkedLoss.apply(vectors, ratios)


def _keops(size: Size, inputs: Inputs) -> Run:
    try:
        import pykeops
        from pykeops.torch import LazyTensor
    except Exception as error:  # its import also looks for a compiler
        raise Unavailable(f"pykeops cannot be imported: {error}") from error
    pykeops.set_verbose(False)

    def loss(vectors: Tensor, ratios: Tensor) -> Tensor:
        batch, count, _ = vectors.shape
        u = torch.nn.functional.normalize(vectors.float(), dim=-1)
        s = LazyTensor(u[:, :, None]) | LazyTensor(u[:, None])
        d = (LazyTensor(ratios[:, :, None]) - LazyTensor(ratios[:, None])).abs().sum(-1) / ratios.shape[-1]
        log_z = (s * d / TEMPERATURE).logsumexp(dim=2)
        attraction = (s * (1 - d)).sum(dim=2)
        return (log_z.sum() - attraction.sum() / (TEMPERATURE * count)) / (batch * count)

    return _with_gradient(loss)(size, inputs)


def _keops_too_slow(size: Size, device: str) -> str | None:
    if device == "cpu" and size.batch * size.count**2 > KEOPS_PAIRS:
        return "over ten seconds a call on a CPU"
    return None


def _released(vectors: Tensor, ratios: Tensor) -> Tensor:
    """Eq. 7 through B x C x N x N, as the authors' code goes about it."""
    x, phi = vectors.mT, ratios.mT
    s = torch.nn.CosineSimilarity(dim=1)(x.unsqueeze(3), x.unsqueeze(2)).float()
    d = (phi.unsqueeze(3) - phi.unsqueeze(2)).abs().mean(1)
    attracting, repelling = torch.exp(s * (1 - d) / TEMPERATURE), torch.exp(s * d / TEMPERATURE)
    return -torch.log(attracting / repelling.sum(2, keepdim=True)).mean()


def _three_products(_size: Size, inputs: Inputs) -> Run:
    """U U^T, and twice N x N @ N x C: what every version that forms N x N must at least do."""
    u = inputs[0]
    matrix, product = u.new_empty(*u.shape[:2], u.shape[1]), torch.empty_like(u)

    def run() -> Result:
        torch.matmul(u, u.mT, out=matrix)
        torch.matmul(matrix, u, out=product)
        torch.matmul(matrix.mT, u, out=product)
        return ()

    return run


def _two_products_in_tiles(tile: int) -> Callable[[Size, Inputs], Run]:
    """U U^T and N x N @ N x C, one tile after the other, each used while it is in the cache."""

    def prepare(_size: Size, inputs: Inputs) -> Run:
        blocks = [block for image in inputs[0] for block in image.split(tile)]
        products = [torch.zeros_like(block) for block in blocks]
        matrix = inputs[0].new_empty(tile, tile)
        per_image = len(blocks) // len(inputs[0])

        def run() -> Result:
            for a, block in enumerate(blocks):
                first = a - a % per_image
                for other, product in zip(
                    blocks[first : first + per_image], products[first : first + per_image], strict=True
                ):
                    part = matrix[: len(block), : len(other)]
                    torch.mm(block, other.mT, out=part)
                    product.addmm_(part.mT, block)
            return ()

        return run

    return prepare


def _product_bytes(size: Size) -> float:
    """Of one matrix and one product, in the vectors' dtype."""
    return DTYPES[size.dtype].itemsize * size.batch * size.count * (size.count + size.channels)


def _dense_bytes(matrices: float) -> Callable[[Size], float]:
    return lambda size: matrices * size.matrix_bytes


def pairs_that_differ(ratios: Tensor) -> float:
    """The share of pairs whose distance is not 0; the others need no product."""
    equal = 0
    for image in ratios:
        _, counts = image.unique(dim=0, return_counts=True)
        equal += int(counts.square().sum())
    return 1 - equal / (ratios.shape[0] * ratios.shape[1] ** 2)


def _work(size: Size, inputs: Inputs) -> Work:
    """Both directions, every symmetric pair once, equal ratios skipped: S twice, and H U."""
    vectors, ratios = inputs
    pairs = size.batch * size.count**2 * pairs_that_differ(ratios)
    return Work(
        bytes=3 * vectors.nbytes + 2 * ratios.nbytes + 8 * size.batch * size.count,
        flops=4 * pairs * size.channels,
        exponentials=pairs,
        dtype=size.dtype,
    )


def _oracle(_size: Size, inputs: Inputs) -> Result:
    vectors, ratios = (each.double() for each in inputs)
    return _with_gradient(_reference)(_size, (vectors, ratios))()


OPERATION = Operation(
    name="pdcr_loss",
    make_inputs=_inputs,
    oracle=_oracle,
    checked=lambda size: replace(size, count=size.count if size.count <= CHECKED else CHECKED // 4),
    tiny=lambda size: replace(size, count=min(size.count, 49), channels=min(size.channels, 8)),
    tolerance=lambda size: 1e-5 if size.dtype == "fp32" else 1e-2,
    memory_unit=lambda size: 4 * size.batch * size.count * size.channels,
    work=_work,
    implementations=(
        Implementation(OURS, _with_gradient(_ours)),
        Implementation(
            "reference",
            _with_gradient(_reference),
            bytes_needed=lambda size: (2 * size.classes + 5) * size.matrix_bytes,
        ),
        Implementation("torch.compile", _compiled, bytes_needed=_dense_bytes(3), compiles=True),
        Implementation(
            COMPILED_16_BIT, _compiled_16_bit, _dense_bytes(3), needs_16_bit, devices=("cuda",), compiles=True
        ),
        Implementation("chunked", _with_gradient(_chunked)),
        Implementation("KeOps", _keops, refuse=_keops_too_slow),
        Implementation(
            "released",
            _with_gradient(_released),
            bytes_needed=lambda size: 6 * size.channels * size.matrix_bytes,
        ),
        Implementation("forward alone", _forward_alone, devices=("cuda",), yardstick=True),
        Implementation(
            "FlexAttention, log Z alone",
            _flex,
            refuse=_flex_unsuited,
            devices=("cuda",),
            yardstick=True,
            compiles=True,
        ),
        Implementation(
            "three products", _three_products, bytes_needed=_product_bytes, yardstick=True, weighed=False
        ),
        *(
            Implementation(
                f"two products, tiles of {tile}",
                _two_products_in_tiles(tile),
                devices=("cpu",),
                yardstick=True,
                weighed=False,
            )
            for tile in TILES
        ),
    ),
)
TILE_PRODUCTS = tuple(f"two products, tiles of {tile}" for tile in TILES)
