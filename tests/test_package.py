"""The package as a whole: what importing it costs, what it does without its extension, compiled graphs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import contrastseg_fast
from contrastseg_fast import _backend, functional, reference

ROOT = Path(__file__).parent.parent


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    assert set(contrastseg_fast.__all__) == {
        "PDCRLoss",
        "UAFS",
        "ReceptiveField",
        "receptive_fields",
        "attach_pdcr",
        "insert_uafs",
        "remove_uafs",
    }
    for name in (
        "pdcr_loss",
        "foreground_ratio",
        "sample_grid",
        "entropy_gate",
        "nt_xent_loss",
        "warmup_weight",
    ):
        assert callable(getattr(functional, name))
    for name in ("PDCRLoss", "UAFS", "pdcr_loss", "foreground_ratio", "entropy_gate"):
        assert callable(getattr(reference, name))


def test_import_is_light():
    heavy = (
        "triton",
        "monai",
        "lightning",
        "nnunetv2",
        "segmentation_models_pytorch",
        "timm",
        "matplotlib",
        "sklearn",
        "contrastseg_fast.experiments",
        "contrastseg_fast.integrations",
        "contrastseg_fast.kernels",
    )
    code = f"import contrastseg_fast, sys; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_the_extension_is_built_where_there_is_a_compiler():
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    assert _backend.has_cpu_extension(), _backend.cpu_error()


_WITHOUT_EXTENSION = """
import sys
sys.modules["contrastseg_fast._C"] = None  # importing it raises ImportError
import torch
from contrastseg_fast import _backend
from contrastseg_fast.functional import entropy_gate, foreground_ratio, pdcr_loss
from contrastseg_fast import reference
assert not _backend.has_cpu_extension()
torch.manual_seed(0)
labels = torch.randint(0, 3, (2, 20, 20))
starts = torch.randint(-3, 20, (2, 50, 2))
ratios, _ = foreground_ratio(labels, starts, (5, 5), 3)
torch.testing.assert_close(ratios, reference.foreground_ratio(labels, starts, (5, 5), 3)[0])
vectors = torch.randn(2, 50, 8, requires_grad=True)
loss = pdcr_loss(vectors, ratios)
torch.testing.assert_close(loss, reference.pdcr_loss(vectors, ratios))
loss.backward()
features, logits = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)
torch.testing.assert_close(entropy_gate(features, logits), reference.entropy_gate(features, logits))
for function, arguments in (
    (pdcr_loss, (vectors, ratios)),
    (foreground_ratio, (labels, starts, (5, 5), 3)),
    (entropy_gate, (features, logits)),
):
    try:
        function(*arguments, backend="cpu")
    except RuntimeError as error:
        print(error)
"""


def test_pure_python_install_computes_the_same():
    lines = run_python(_WITHOUT_EXTENSION).splitlines()
    assert len(lines) == 3
    for line, op in zip(lines, ("pdcr_loss", "foreground_ratio", "entropy_gate"), strict=True):
        assert line.startswith(f"backend: {op} with backend='cpu' needs the C++ extension")


def test_builds_without_a_compiler(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    environment = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler" in result.stderr
    assert list(tmp_path.rglob("functional.py"))
    assert not list(tmp_path.rglob("*.so"))
    required = {**environment, "CONTRASTSEG_FAST_REQUIRE_EXTENSION": "1"}
    result = subprocess.run(command, cwd=ROOT, env=required, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "no-such-compiler" in result.stderr


def test_explicit_backends_never_fall_back():
    vectors, ratios = torch.randn(1, 4, 3), torch.full((1, 4, 2), 0.5)
    for backend in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend='{backend}' expects CUDA tensors, got cpu tensors"):
            functional.pdcr_loss(vectors, ratios, backend=backend)
    with pytest.raises(ValueError, match="backend: expected one of"):
        functional.pdcr_loss(vectors, ratios, backend="numpy")


def _whole_call(features, logits, labels, starts):
    gated, uncertainty = functional.entropy_gate(features, logits, return_uncertainty=True)
    ratios, valid_fraction = functional.foreground_ratio(labels, starts, (5, 7), 3, border="clip")
    vectors = gated.flatten(2).mT
    loss = functional.pdcr_loss(vectors, ratios, valid=valid_fraction >= 0.5, class_distance="tv")
    return loss + uncertainty.mean()


def _whole_call_inputs():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 6, 6, generator=generator, requires_grad=True)
    logits = torch.randn(2, 3, 6, 6, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, 24, 24), generator=generator)
    starts = torch.randint(-4, 22, (2, 36, 2), generator=generator)
    return features, logits, labels, starts


def test_compiles_to_one_graph():
    inputs = _whole_call_inputs()
    expected = _whole_call(*inputs)
    gradients = torch.autograd.grad(expected, inputs[:2])
    compiled = torch.compile(_whole_call, fullgraph=True)
    actual = compiled(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, inputs[:2]), gradients, strict=True):
        torch.testing.assert_close(a, e)


def test_exports():
    class Whole(torch.nn.Module):
        def forward(self, features, logits, labels, starts):
            return _whole_call(features, logits, labels, starts)

    inputs = tuple(x.detach() for x in _whole_call_inputs())
    program = torch.export.export(Whole(), inputs)
    torch.testing.assert_close(program.module()(*inputs), _whole_call(*inputs))


def test_autocast_keeps_the_loss_in_fp32():
    features, logits, labels, starts = _whole_call_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _whole_call(features.bfloat16(), logits.bfloat16(), labels, starts)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, _whole_call(features, logits, labels, starts), rtol=0.02, atol=0)
