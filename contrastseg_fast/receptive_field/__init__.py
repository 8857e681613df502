"""Which pixels a hidden vector sees: receptive fields of plain stacks (Eq. 5) and of any model."""

from contrastseg_fast.receptive_field.field import (
    LayerRun,
    ReceptiveField,
    receptive_fields,
    stack_receptive_field,
    trace_layers,
    unknown_layer,
)

__all__ = [
    "LayerRun",
    "ReceptiveField",
    "receptive_fields",
    "stack_receptive_field",
    "trace_layers",
    "unknown_layer",
]
