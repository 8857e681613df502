"""Contrastive and selective hidden embeddings for medical image segmentation, fast and exact.

    from contrastseg_fast import PDCRLoss, UAFS                   # the paper's two modules
    from contrastseg_fast import attach_pdcr, insert_uafs         # the same, put into any network
    from contrastseg_fast import ReceptiveField, receptive_fields

`contrastseg_fast.functional` has the functions below the modules, and `contrastseg_fast.reference` the same
names in plain PyTorch, to be read against the paper.
"""

from contrastseg_fast.attach import attach_pdcr, insert_uafs, remove_uafs
from contrastseg_fast.pdcr_loss import PDCRLoss
from contrastseg_fast.receptive_field import ReceptiveField, receptive_fields
from contrastseg_fast.uafs import UAFS

__version__ = "0.1.0"
__all__ = [
    "UAFS",
    "PDCRLoss",
    "ReceptiveField",
    "attach_pdcr",
    "insert_uafs",
    "receptive_fields",
    "remove_uafs",
]
