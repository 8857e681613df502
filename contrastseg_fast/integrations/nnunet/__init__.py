"""PDCR and UAFS in nnU-Net v2 (2.8 or later): trainers for `nnUNetv2_train ... -tr nnUNetTrainerPDCR`.

nnU-Net looks for trainers in its own package and in the folders of the environment variable
`nnUNet_extTrainer`; `python -m contrastseg_fast.integrations.nnunet` prints the folder to name there. The
trainers themselves, to import and to derive from, are in `contrastseg_fast.integrations.nnunet.trainers`.
"""

from __future__ import annotations

from pathlib import Path


def trainer_folder() -> str:
    """The folder that makes the trainers known to nnU-Net, for the environment variable `nnUNet_extTrainer`.

    Returns:
        an absolute path; it holds one module, which imports the trainers.

    Example:
        >>> import os
        >>> sorted(name for name in os.listdir(trainer_folder()) if name.startswith("contrastseg"))
        ['contrastseg_fast_trainers.py']
    """
    return str(Path(__file__).resolve().parent / "external")
