"""The oracle itself, against the paper's sums written as Python loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import blob_labels, normwise_error, random_ratios
from torch import Tensor

from contrastseg_fast import reference
from contrastseg_fast.receptive_field import ReceptiveField

Pairs = tuple[Tensor, Tensor, Tensor]  # vectors, ratios, valid
OPTIONS = [
    *(
        {"affinity": a, "variant": v}
        for a in ("ratio", "constant", "diagonal", "bipartite")
        for v in ("paper", "released")
    ),
    {"class_distance": "sum"},
    {"class_distance": "tv"},
    {"class_distance": "mean", "include_background": False},
    {"class_distance": "sum", "include_background": False, "variant": "released"},
    {"temperature": 0.07},
]


def pair_weights(
    phi_i: list[float],
    phi_j: list[float],
    same: bool,
    affinity: str = "ratio",
    class_distance: str = "mean",
    include_background: bool = True,
    variant: str = "paper",
) -> tuple[float, float]:
    """w and wbar of one pair (Eq. 3 and section 5.3.2)."""
    if affinity == "constant":
        w, wbar = 0.5, 0.5
    elif affinity == "diagonal":
        w, wbar = (1.0, 0.0) if same else (0.0, 1.0)
    elif affinity == "bipartite":
        equal = phi_i.index(max(phi_i)) == phi_j.index(max(phi_j))
        w, wbar = (1.0, 0.0) if equal else (0.0, 1.0)
    else:
        first = 0 if include_background else 1
        d = sum(abs(a - b) for a, b in zip(phi_i[first:], phi_j[first:], strict=True))
        d /= {"mean": len(phi_i) - first, "sum": 1, "tv": 2}[class_distance]
        w, wbar = 1 - d, d
    return (wbar, w) if variant == "released" else (w, wbar)


def loss_by_loops(
    vectors: list[list[float]],
    ratios: list[list[float]],
    valid: list[bool],
    temperature: float = 0.5,
    variant: str = "paper",
    **options: object,
) -> float:
    """Eq. 7 of one image, term by term."""
    members = [i for i, counts in enumerate(valid) if counts]
    shift = 1 if variant == "released" else 0

    def similarity(i: int, j: int) -> float:
        norms = math.hypot(*vectors[i]) * math.hypot(*vectors[j])
        product = sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True))
        return (product / norms if norms else 0.0) - shift

    def weights(i: int, j: int) -> tuple[float, float]:
        return pair_weights(ratios[i], ratios[j], i == j, variant=variant, **options)

    total = 0.0
    for i, j in itertools.product(members, members):
        numerator = math.exp(similarity(i, j) * weights(i, j)[0] / temperature)
        denominator = sum(math.exp(similarity(i, k) * weights(i, k)[1] / temperature) for k in members)
        total -= math.log(numerator / denominator)
    return total


@pytest.fixture
def pairs() -> Pairs:
    """Two images of seven vectors, one of length zero, with ratios of three classes; some are not valid."""
    vectors = torch.randn(2, 7, 4, dtype=torch.float64)
    vectors[0, 2] = 0
    ratios = random_ratios(2, 7, 3, torch.float64)
    ratios[1, 1] = ratios[1, 0]
    valid = torch.tensor([[1, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1, 0]], dtype=torch.bool)
    return vectors, ratios, valid


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_pdcr_loss_equals_eq_7_by_loops(pairs: Pairs, options: dict, masked: bool) -> None:
    vectors, ratios, valid = pairs
    valid = valid if masked else torch.ones_like(valid)
    sums = torch.tensor(
        [
            loss_by_loops(v, r, m, **options)
            for v, r, m in zip(vectors.tolist(), ratios.tolist(), valid.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    means = sums / valid.sum(1) ** 2
    given = valid if masked else None
    for reduction, expected in (("none", means), ("mean", means.mean()), ("sum", sums.sum())):
        actual = reference.pdcr_loss(vectors, ratios, valid=given, reduction=reduction, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pdcr_loss_passes_gradcheck(pairs: Pairs, options: dict) -> None:
    vectors, ratios, valid = pairs
    vectors[0, 2] = 0.5  # the loss has a kink at a vector of length zero
    vectors.requires_grad_()
    torch.autograd.gradcheck(lambda v: reference.pdcr_loss(v, ratios, valid=valid, **options), vectors)


def test_gradient_equals_the_closed_form() -> None:
    count, tau = 9, 0.3
    vectors = torch.randn(1, count, 5, dtype=torch.float64, requires_grad=True)
    ratios = random_ratios(1, count, 4, torch.float64)
    reference.pdcr_loss(vectors, ratios, temperature=tau, reduction="sum").backward()
    v, phi = vectors.detach()[0], ratios[0]
    length = v.norm(dim=1, keepdim=True)
    u = v / length
    d = (phi[:, None] - phi[None]).abs().mean(-1)
    e = torch.exp(u @ u.T * d / tau)
    z = e.sum(1)
    g = (count * d * e * (1 / z[:, None] + 1 / z[None]) - 2 * (1 - d)) @ u / tau
    expected = (g - (g * u).sum(1, keepdim=True) * u) / length
    torch.testing.assert_close(vectors.grad[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_get_gradient_zero_and_nobody_else_does(dtype: torch.dtype) -> None:
    vectors = torch.randn(2, 6, 3, dtype=dtype)
    vectors[0, 1], vectors[1, 4] = 0, 0
    vectors.requires_grad_()
    reference.pdcr_loss(vectors, random_ratios(2, 6, 3)).backward()
    is_zero = (vectors == 0).all(-1)
    assert (vectors.grad[is_zero] == 0).all()
    assert (vectors.grad[~is_zero].norm(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_length_of_a_vector_scales_its_gradient_only(size: float) -> None:
    vectors = torch.randn(1, 8, 5)
    ratios = random_ratios(1, 8, 3)
    scaled = vectors.clone()
    scaled[0, ::2] *= size
    plain, rescaled = vectors.requires_grad_(), scaled.requires_grad_()
    loss, loss_rescaled = reference.pdcr_loss(plain, ratios), reference.pdcr_loss(rescaled, ratios)
    loss.backward()
    loss_rescaled.backward()
    torch.testing.assert_close(loss_rescaled, loss)
    back = rescaled.grad.double()
    back[0, ::2] *= size
    assert normwise_error(back, plain.grad) < 1e-5


def test_order_of_the_vectors_does_not_matter(pairs: Pairs) -> None:
    vectors, ratios, valid = pairs
    order = torch.randperm(7)
    loss = reference.pdcr_loss(vectors, ratios, valid=valid, reduction="none")
    permuted = reference.pdcr_loss(
        vectors[:, order], ratios[:, order], valid=valid[:, order], reduction="none"
    )
    torch.testing.assert_close(permuted, loss)


def test_tv_equals_eq_3_for_two_classes() -> None:
    vectors, ratios = torch.randn(2, 9, 4), random_ratios(2, 9, 2)
    mean = reference.pdcr_loss(vectors, ratios)
    torch.testing.assert_close(reference.pdcr_loss(vectors, ratios, class_distance="tv"), mean)


@pytest.mark.parametrize("temperature", [1e-3, 1e6])
def test_extreme_temperatures_are_finite(temperature: float) -> None:
    vectors = torch.randn(2, 33, 8, requires_grad=True)
    loss = reference.pdcr_loss(
        vectors, random_ratios(2, 33, 4), temperature=temperature, class_distance="sum"
    )
    loss.backward()
    assert loss.isfinite()
    assert vectors.grad.isfinite().all()
    if temperature == 1e6:
        torch.testing.assert_close(loss.item(), math.log(33), rtol=1e-5, atol=0)


def test_autocast_does_not_round_the_similarities() -> None:
    vectors, ratios = torch.randn(2, 9, 4), random_ratios(2, 9, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reference.pdcr_loss(vectors, ratios)
    assert torch.equal(loss, reference.pdcr_loss(vectors, ratios))


@pytest.mark.parametrize(("batch", "count"), [(2, 0), (0, 5), (0, 0)])
def test_without_pairs_the_loss_is_zero_and_connected(batch: int, count: int) -> None:
    vectors = torch.randn(batch, count, 4, requires_grad=True)
    ratios = random_ratios(batch, count, 2)
    loss = reference.pdcr_loss(vectors, ratios)
    loss.backward()
    assert loss.item() == 0
    assert (vectors.grad == 0).all()
    assert reference.repelled_fraction(vectors, ratios).tolist() == [0] * batch


def test_a_single_vector_attracts_itself_without_effect() -> None:
    vectors = torch.randn(3, 1, 4, dtype=torch.float64, requires_grad=True)
    loss = reference.pdcr_loss(vectors, random_ratios(3, 1, 2), temperature=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(-4)
    assert vectors.grad.abs().max() < 1e-14
    assert reference.repelled_fraction(vectors, random_ratios(3, 1, 2)).tolist() == [0] * 3


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_images_without_valid_vectors_are_left_out_of_the_mean(pairs: Pairs) -> None:
    vectors, ratios, valid = pairs
    vectors.requires_grad_()
    valid[1] = False
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = reference.pdcr_loss(vectors, ratios, valid=valid)
        loss.backward()
    torch.testing.assert_close(loss, reference.pdcr_loss(vectors[:1], ratios[:1], valid=valid[:1]))
    assert (vectors.grad[1] == 0).all()
    nothing = reference.pdcr_loss(vectors, ratios, valid=torch.zeros_like(valid))
    assert nothing.item() == 0
    assert nothing.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repelled_fraction_is_the_sign_of_the_derivative(pairs: Pairs, options: dict) -> None:
    vectors, ratios, valid = pairs
    options = {"temperature": 0.5, **options}
    tau = options["temperature"]
    actual = reference.repelled_fraction(vectors, ratios, valid=valid, **options)
    variant = options.get("variant", "paper")
    affinity = {k: v for k, v in options.items() if k not in ("temperature", "variant")}
    for b in range(2):
        members = valid[b].nonzero()[:, 0]
        u = torch.nn.functional.normalize(vectors[b, members], dim=1)
        s = (u @ u.T - int(variant == "released")).requires_grad_()
        w, wbar = reference.affinity_matrices(ratios[b : b + 1], **affinity)
        w, wbar = w[0][members][:, members], wbar[0][members][:, members]
        if variant == "released":
            w, wbar = wbar, w
        loss = -(torch.exp(s * w / tau) / torch.exp(s * wbar / tau).sum(1, keepdim=True)).log().sum()
        (slope,) = torch.autograd.grad(loss, s)
        pairs_below = torch.ones_like(s).tril(-1).bool()
        expected = ((slope + slope.T)[pairs_below] > 1e-12).double().mean()
        torch.testing.assert_close(actual[b].double(), expected)


def ratios_by_loops(
    labels: Tensor,
    starts: Tensor,
    size: tuple[int, ...],
    num_classes: int,
    border: str,
    ignore_index: int | None,
) -> tuple[list, list]:
    """Eq. 4 pixel by pixel, for integer labels `(B, *spatial)`."""
    shape = labels.shape[1:]
    ratios, fractions = [], []
    for b, corner in itertools.product(range(len(labels)), starts.tolist()):
        counts, ignored, inside, area = [0] * num_classes, 0, 0, math.prod(size)
        for pixel in itertools.product(*(range(c, c + s) for c, s in zip(corner, size, strict=True))):
            if any(p < 0 or p >= extent for p, extent in zip(pixel, shape, strict=True)):
                counts[0] += border == "background"
                continue
            inside += 1
            label = labels[(b, *pixel)].item()
            if label == ignore_index:
                ignored += 1
            elif 0 <= label < num_classes:
                counts[int(label)] += 1
        denominator = (inside if border == "clip" else area) - ignored
        ratios.append([count / denominator if denominator else 0 for count in counts])
        fractions.append((inside - ignored) / inside if inside else 0)
    return ratios, fractions


@pytest.mark.parametrize("border", ["full", "clip", "background"])
@pytest.mark.parametrize("ignore_index", [None, 2, 255, -1])
@pytest.mark.parametrize(("shape", "size"), [((9, 7), (3, 4)), ((5, 6, 4), (3, 2, 9))])
def test_foreground_ratio_equals_eq_4_by_loops(
    border: str, ignore_index: int | None, shape: tuple[int, ...], size: tuple[int, ...]
) -> None:
    labels = torch.randint(0, 3, (2, *shape))
    if ignore_index is not None:
        labels[torch.rand(labels.shape) < 0.3] = ignore_index
        labels[0, :5] = ignore_index  # some boxes hold nothing else
    starts = torch.cat([torch.randint(-4, 8, (12, len(shape))), torch.full((1, len(shape)), -100)])
    ratios, fractions = reference.foreground_ratio(
        labels, starts, size, 3, border=border, ignore_index=ignore_index
    )
    expected_ratios, expected_fractions = ratios_by_loops(labels, starts, size, 3, border, ignore_index)
    torch.testing.assert_close(ratios.flatten(0, 1), torch.tensor(expected_ratios))
    torch.testing.assert_close(fractions.flatten(), torch.tensor(expected_fractions, dtype=torch.float32))

    one_hot = torch.stack([labels == m for m in range(3)], 1).float()
    if ignore_index is not None:
        one_hot.masked_fill_((labels == ignore_index)[:, None], 7)
    soft_ratios, soft_fractions = reference.foreground_ratio(
        one_hot, starts.expand(2, -1, -1), size, 3, border=border, ignore_index=7
    )
    torch.testing.assert_close(soft_ratios, ratios)
    torch.testing.assert_close(soft_fractions, fractions)


def test_foreground_ratio_averages_soft_labels() -> None:
    labels = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    ratios, _ = reference.foreground_ratio(labels, torch.tensor([[1, 2]]), (3, 2), 2)
    torch.testing.assert_close(ratios[0, 0], labels[0, :, 1:4, 2:4].mean((1, 2)).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float16, torch.uint16])
def test_foreground_ratio_takes_labels_of_any_dtype(dtype: torch.dtype) -> None:
    labels = blob_labels(2, (12, 11), 2)
    starts = torch.randint(-2, 10, (5, 2))
    expected, _ = reference.foreground_ratio(labels, starts, (4, 4), 2)
    actual, _ = reference.foreground_ratio(labels.to(dtype)[:, None], starts, (4, 4), 2)
    assert torch.equal(actual, expected)


def test_entropy_gate_equals_eqs_9_and_10_by_loops() -> None:
    features, logits = (
        torch.randn(2, 3, 4, dtype=torch.float64),
        torch.randn(2, 5, 4, dtype=torch.float64) * 3,
    )
    gated, u = reference.entropy_gate(features, logits, return_uncertainty=True)
    for b, x in itertools.product(range(2), range(4)):
        powers = [math.exp(z) for z in logits[b, :, x].tolist()]
        a = [p / sum(powers) for p in powers]
        expected = -sum(p * math.log2(p) for p in a) / math.log2(5)
        assert u[b, 0, x].item() == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gated[b, :, x], features[b, :, x] * (1 + (1 - expected)))


def test_entropy_gate_passes_gradcheck() -> None:
    features = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda f, z: reference.entropy_gate(f, z, return_uncertainty=True), (features, logits)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_entropy_gate_at_one_hot_and_constant_logits(dtype: torch.dtype) -> None:
    features = torch.full((1, 1, 1, 4), 3, dtype=dtype)
    logits = torch.tensor([[0, 1e4, 0, 5], [0, 0, -1e4, 5], [0, 0, -math.inf, 5]], dtype=dtype)
    logits = logits[None, :, None].requires_grad_()
    gated, u = reference.entropy_gate(features, logits, return_uncertainty=True)
    gated.sum().backward()
    assert u.flatten().tolist() == pytest.approx([1, 0, 0, 1], abs=1e-6)
    assert gated.dtype == dtype
    assert gated.flatten().tolist() == pytest.approx([3, 6, 6, 3], rel=1e-2)
    assert logits.grad.isfinite().all()


def test_pdcr_module_follows_algorithm_1_by_hand() -> None:
    """One layer of four vectors, each seeing a 2 x 2 block of a 4 x 4 label map."""
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]])[None]
    features = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    ratios = [[1.0, 0.0], [0.0, 1.0], [0.25, 0.75], [1.0, 0.0]]
    expected = loss_by_loops(features.flatten(2).mT[0].tolist(), ratios, [True] * 4) / 16
    field = ReceptiveField(size=(2, 2), stride=(2, 2), start=(0, 0))
    module = reference.PDCRLoss([field, field], num_classes=2)
    actual = module([features, features * 2], labels)
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_uafs_module_gates_by_its_head() -> None:
    gate = reference.UAFS(2, in_channels=3, num_classes=4).eval()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(gate(x), reference.entropy_gate(x, gate.head(x)))
