"""PDCR and UAFS for any model: layers are chosen by name, and the model's code stays as it is."""

from contrastseg_fast.attach.layers import find_layers
from contrastseg_fast.attach.pdcr import AttachedPDCR, attach_pdcr
from contrastseg_fast.attach.uafs import insert_uafs, remove_uafs

__all__ = ["AttachedPDCR", "attach_pdcr", "find_layers", "insert_uafs", "remove_uafs"]
