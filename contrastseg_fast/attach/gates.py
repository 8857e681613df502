"""Where the gates live in a model, and the hook that applies one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from contrastseg_fast.attach.model_checks import refuse_replica
from contrastseg_fast.uafs import UAFS

GATES = "uafs"  # the name of the gates' submodule in a model


class Gates(nn.ModuleDict):
    """The gates of a model by layer. As a step of an `nn.Sequential` it returns its input.

    Attributes:
        handles: remove the hooks of the gates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def forward(self, x: Any) -> Any:
        return x


class GateHook:
    """A forward hook that gates the first tensor of a layer's output.

    It is a class, not a closure, so that a copied or pickled model gets a hook with its own gate.
    """

    def __init__(self, gate: UAFS) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> Any:
        refuse_replica(module)
        leaves, structure = tree_flatten(output)
        position = next(k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[position] = self.gate(leaves[position])
        return tree_unflatten(leaves, structure)
