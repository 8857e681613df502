"""What nnU-Net finds: the trainers, under their names."""

from contrastseg_fast.integrations.nnunet.trainers import (
    nnUNetTrainerPDCR,
    nnUNetTrainerPDCRUAFS,
    nnUNetTrainerUAFS,
)

__all__ = ["nnUNetTrainerPDCR", "nnUNetTrainerPDCRUAFS", "nnUNetTrainerUAFS"]
