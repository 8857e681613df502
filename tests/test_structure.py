"""The package's layers: no import circles, the oracle below everything, and nothing fast in the reference."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import contrastseg_fast
from contrastseg_fast import ReceptiveField, functional, reference

PACKAGE = "contrastseg_fast"
ROOT = Path(contrastseg_fast.__file__).parent
MODULES = {
    ".".join([PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
# From the lowest: a module imports modules of its own line and of lines above it.
LAYERS = (
    ("_checks", "equations"),
    ("_backend", "affinity", "receptive_field", "sample_plan", "problems", "call_plan"),
    ("kernels",),
    ("ops",),
    ("sampling", "schedule", "unchecked", "projection"),
    ("functional",),
    ("patches", "pdcr_options"),
    ("pdcr_loss", "uafs"),
    ("reference",),
    ("attach",),
    ("integrations", "experiments", ""),
)


def imported(module: str) -> Iterator[str]:
    """The package's modules that a module imports, at any place in its code."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
            case ast.ImportFrom():
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                source = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
                if source.split(".")[0] == PACKAGE:
                    for alias in node.names:
                        inner = f"{source}.{alias.name}"
                        yield inner if inner in MODULES else source


GRAPH = {module: set(imported(module)) & set(MODULES) - {module} for module in MODULES}


def layer(module: str) -> int:
    """The place of a module in `LAYERS`."""
    top = module.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def test_the_graph_of_imports_is_read() -> None:
    assert f"{PACKAGE}.equations" in GRAPH[f"{PACKAGE}.reference"]
    assert f"{PACKAGE}.kernels.pdcr" in GRAPH[f"{PACKAGE}.ops.pdcr"], "imported within a function"
    assert len(GRAPH) > 40


def test_there_are_no_circles() -> None:
    """Imports within functions count too."""
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError


@pytest.mark.parametrize("module", MODULES)
def test_a_layer_imports_only_lower_ones(module: str) -> None:
    higher = [other for other in GRAPH[module] if layer(other) > layer(module)]
    assert not higher


def test_the_equations_import_torch_alone() -> None:
    tree = ast.parse(MODULES[f"{PACKAGE}.equations"].read_text())
    sources = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert sources == {"__future__", "collections", "itertools", "math", "torch"}


class NoOperators(TorchDispatchMode):
    """Raises where one of the package's operators runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != PACKAGE, func
        return func(*args, **(kwargs or {}))


FIELDS = {
    "stem": ReceptiveField((3, 3), (2, 2), (-1, -1)),
    "deep": ReceptiveField((7, 7), (4, 4), (-3, -3)),
}


def test_the_reference_runs_no_operator_whichever_method_is_called() -> None:
    maps = {"stem": torch.randn(2, 4, 8, 8, requires_grad=True), "deep": torch.randn(2, 4, 4, 4)}
    labels = torch.randint(0, 3, (2, 16, 16))
    pdcr = reference.PDCRLoss(
        FIELDS, 3, cross_layers=[("stem", "deep")], projection="mlp", in_channels=4, skip_homogeneous=True
    )
    gate = reference.UAFS(2, 4, 3)
    with NoOperators():
        samples = [pdcr.sample(x, layer) for layer, x in maps.items()]
        pdcr.loss(samples, labels, torch.ones(2, 1, 16, 16)).backward()
        pdcr.repelled_fraction(samples, labels)
        pdcr(maps, labels)
        gate(maps["stem"]).sum().backward()
        gate.uncertainty(maps["stem"])
    with NoOperators(), pytest.raises(AssertionError):
        functional.entropy_gate(maps["stem"], torch.randn(2, 2, 8, 8))


def test_the_reference_has_the_methods_of_the_fast_modules() -> None:
    for fast, plain in (
        (contrastseg_fast.PDCRLoss, reference.PDCRLoss),
        (contrastseg_fast.UAFS, reference.UAFS),
    ):
        own = {name for name in set(dir(fast)) - set(dir(nn.Module)) if not name.startswith("_")}
        assert own <= set(dir(plain))
