"""What a model must be to have PDCR attached or gates inserted."""

from __future__ import annotations

from torch import Tensor, nn

from contrastseg_fast import _checks

ORDER = "insert gates, attach PDCR, make the optimizer, then compile or wrap the model"
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_NO_DATA_PARALLEL = "DataParallel, whose replicas would share what is attached (use DistributedDataParallel)"


def check_model(model: nn.Module) -> None:
    """Check that a model is a module, is not compiled, and neither is nor contains a parallel one."""
    if not isinstance(model, nn.Module):
        _checks.fail_type("model", "an nn.Module", type(model).__name__)
    if hasattr(model, "_orig_mod"):
        got = f"a compiled {type(model._orig_mod).__name__}; {ORDER}"
        _checks.fail_type("model", "one to be compiled afterwards", got)
    for module in model.modules():
        if isinstance(module, nn.DataParallel):
            _checks.fail_type("model", f"one without {_NO_DATA_PARALLEL}", "nn.DataParallel")
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith("torch."):
                name = cls.__name__.replace("FSDPModule", "a model sharded by fully_shard")
                _checks.fail_type("model", "one to be wrapped afterwards", f"{name}; {ORDER}")


def refuse_replica(module: nn.Module) -> None:
    """Raise a RuntimeError if a module is a replica made by DataParallel."""
    if getattr(module, "_is_replica", False):
        raise RuntimeError(f"model: expected one process per device, got {_NO_DATA_PARALLEL}")


def check_example(example_input: Tensor | None) -> Tensor:
    """The example input, checked to be a tensor with two or three spatial axes."""
    if not isinstance(example_input, Tensor):
        _checks.fail_type("example_input", "a tensor (B, C, *spatial)", type(example_input).__name__)
    if example_input.ndim not in (4, 5):
        _checks.fail("example_input", "a tensor (B, C, *spatial)", f"shape {tuple(example_input.shape)}")
    return example_input
