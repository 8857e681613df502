"""Print the folder for `nnUNet_extTrainer`: export nnUNet_extTrainer=$(python -m ...integrations.nnunet)."""

from contrastseg_fast.integrations.nnunet import trainer_folder

if __name__ == "__main__":
    print(trainer_folder())
