"""Trainers with settings of one's own. nnU-Net finds them once `nnUNet_extTrainer` names this folder too."""

from contrastseg_fast.integrations.nnunet.trainers import nnUNetTrainerPDCR, nnUNetTrainerPDCRUAFS


class nnUNetTrainerPDCRStrong(nnUNetTrainerPDCR):
    pdcr_weight = 0.1
    pdcr_warmup_epochs = 50


class nnUNetTrainerPDCRUAFSEncoder(nnUNetTrainerPDCRUAFS):
    """Gates in two encoder stages only, and small patches around the centres of the receptive fields."""

    uafs_layers = ("encoder.stages.2", "encoder.stages.3")
    pdcr_patch_size = 7


class nnUNetTrainerPDCRTrial(nnUNetTrainerPDCR):
    """Two short epochs, to see whether everything runs."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = 5
        self.num_val_iterations_per_epoch = 2
