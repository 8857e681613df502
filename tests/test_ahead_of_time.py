"""Every Triton kernel, at every entry of its launch table, compiled for cards that need not be there."""

from __future__ import annotations

import ahead_of_time
import pytest

triton = pytest.importorskip("triton")

# At 80 of 255 registers, ptxas as Triton 3.8 has it still gives up 16 bytes of one kernel, for one more block
# on a processor.
STACK = 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) else 0

SPECS = {ahead_of_time.identifier(*pair): pair for pair in ahead_of_time.all_specs()}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, dict]:
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.fspath == request.node.fspath and "name" in getattr(item, "callspec", item).params
    ]
    return ahead_of_time.compile_all(wanted)


@pytest.mark.parametrize("name", SPECS)
def test_kernel_compiled_ahead_of_time_fits_the_card(name: str, compiled: dict[str, dict]):
    capability, spec = SPECS[name]
    result = compiled[name]
    assert "error" not in result, result["error"]
    assert result["local"] == 0
    assert result["stack"] <= STACK, "spills"
    assert result["stack"] == 0 or result["registers"] <= 96, "spills for want of registers"
    assert result["spilled"] <= STACK // 2, "spills"
    assert result["shared"] <= ahead_of_time.SHARED_MEMORY[capability]
    assert result["tensor_memory"] <= ahead_of_time.TENSOR_MEMORY_COLUMNS
    for instruction in spec.instructions:
        assert any(found.startswith(instruction) for found in result["instructions"]), instruction
    assert len(result["instructions"]) > 5, "a bare trap"
