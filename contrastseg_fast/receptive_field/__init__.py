"""Which pixels a hidden vector sees: the receptive fields of plain stacks (Eq. 5) and of any network."""

from contrastseg_fast.receptive_field.field import AxisGrid, ReceptiveField, stack_receptive_field
from contrastseg_fast.receptive_field.trace import LayerRun, receptive_fields, trace_layers, unknown_layer

__all__ = [
    "AxisGrid",
    "LayerRun",
    "ReceptiveField",
    "receptive_fields",
    "stack_receptive_field",
    "trace_layers",
    "unknown_layer",
]
