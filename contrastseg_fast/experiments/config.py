"""The settings of one training run: read from YAML, changed key by key, checked before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from contrastseg_fast import functional, sampling, uafs
from contrastseg_fast.experiments.datasets import DATASETS

CONFIGS = Path(__file__).resolve().parent / "configs"

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Extent = tuple[Positive, ...]
PatchSize = Positive | Extent
Layers = str | tuple[str, ...]


class Section(BaseModel):
    """A part of the settings; unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which cases to learn from, and how they become patches.

    `resize` brings every image to one extent (scores are taken at the original one), `patch` is what the
    network sees at once in training and `inference_patch` in scoring; one extent per axis. `options` are
    those of `open_dataset`. `split_seed` None is the run's seed, so that every seed has another fold to test
    where a dataset has no test part of its own.
    """

    name: Literal[tuple(DATASETS)]  # type: ignore[valid-type]
    folder: str | None = None
    options: dict[str, Any] = {}
    on_error: Literal["raise", "skip"] = "raise"
    resize: Extent | None = None
    patch: Extent | None = None
    inference_patch: Extent | None = None
    foreground_crops: Fraction = 0.5  # the share of patches that are centred on foreground
    augment: bool = True
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training cases
    split_seed: Annotated[int, Field(ge=0)] | None = None
    validation_cases: Positive | None = None
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _has_an_extent(self) -> Data:
        if self.resize is None and self.patch is None:
            raise ValueError("expected resize or patch, so that images fit into a batch, got neither")
        return self

    @property
    def input_shape(self) -> Extent:
        """What the network sees in training."""
        return self.patch or self.resize or ()


class Network(Section):
    """`channels` and `norm` are for the U-Nets alone; the others are as their libraries make them."""

    name: Literal["unet", "dynunet", "fcn", "deeplabv3plus"] = "unet"
    channels: Annotated[tuple[Positive, ...], Field(min_length=2)] = (16, 32, 64, 128)
    residual_units: Annotated[int, Field(ge=0)] = 2
    norm: Literal["batch", "instance"] = "batch"


class PDCR(Section):
    """The regularizer; a weight of 0 leaves it out, and the rest then only says how vectors are examined.

    `layers` are names or patterns, "auto", "encoder", "decoder" or "all"; `patch_size` is one extent, one per
    axis, or a mapping from layers to either.
    """

    weight: Annotated[float, Field(ge=0)] = 0.0
    layers: Layers = "auto"
    patch_size: PatchSize | dict[str, PatchSize] | None = None
    num_samples: Positive | None = 1024
    temperature: Annotated[float, Field(gt=0)] = 0.5
    sampler: Literal[sampling.SAMPLERS] = "grid"  # type: ignore[valid-type]
    variant: Literal[functional.VARIANTS] = "paper"  # type: ignore[valid-type]
    affinity: Literal[functional.AFFINITIES] = "ratio"  # type: ignore[valid-type]
    class_distance: Literal[functional.CLASS_DISTANCES] = "mean"  # type: ignore[valid-type]
    border: Literal[functional.BORDERS] = "full"  # type: ignore[valid-type]
    include_background: bool = True
    skip_homogeneous: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `attach_pdcr`."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name not in ("weight", "layers")
        }


class Gate(Section):
    """UAFS, or what takes its place: squeeze-and-excitation, or CBAM."""

    kind: Literal["none", "uafs", "se", "cbam"] = "none"
    layers: Layers = "encoder"
    hidden_channels: Positive = 16
    norm: Literal[uafs.NORMS] = "batch"  # type: ignore[valid-type]


class Training(Section):
    """`epoch_steps` None: as many as the training cases fill; `amp` None: wherever there is a GPU."""

    steps: Positive = 2000
    epoch_steps: Positive | None = None
    batch_size: Positive = 4
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    momentum: Fraction = 0.9
    schedule: Literal["cosine", "polynomial", "constant"] = "cosine"
    amp: bool | None = None


class Config(Section):
    """The settings of one run."""

    data: Data
    network: Network = Network()
    pdcr: PDCR = PDCR()
    gate: Gate = Gate()
    training: Training = Training()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def record(self) -> dict[str, Any]:
        """All settings as plain values, but for where the data lie and how many processes read them."""
        values = self.model_dump(mode="json", exclude={"data": {"folder", "workers"}})
        values["data"]["options"].pop("isic2016", None)  # a folder too
        return values

    def digest(self) -> str:
        """Eight letters that differ where results may."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:8]

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """These settings with other values at some keys, as in `{"pdcr.weight": 0.1}`.

        Raises:
            ValueError: there is no such key, or a value does not fit.

        Example:
            >>> config = Config(data=Data(name="ph2", resize=(64, 64)))
            >>> config.changed({"pdcr.weight": 0.1, "seed": 3}).pdcr.weight
            0.1
        """
        values = self.model_dump()
        for key, value in changes.items():
            *sections, last = key.split(".")
            section: Any = values
            for name in sections:
                section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                raise ValueError(
                    f"{key}: expected a key of the settings, such as training.steps, got {key!r}"
                )
            section[last] = value
        return _validated(values, "settings")


def load_config(path: Path | str, changes: Sequence[str] = ()) -> Config:
    """Read a YAML file, or one of those that come with the package by its name, and change some values.

    Args:
        path: the file, or a name such as `"hippocampus"`.
        changes: `"key=value"` each, the value in YAML: `"training.steps=100"`.

    Returns:
        the settings.

    Raises:
        OSError: there is no such file.
        ValueError: a key is unknown or missing, or a value does not fit; the message names the key, what was
            expected and what came.

    Example:
        >>> load_config("hippocampus", ["pdcr.weight=0.1"]).pdcr.weight
        0.1
    """
    bundled = CONFIGS / f"{path}.yaml"
    file = bundled if bundled.is_file() else Path(path)
    if not file.is_file():
        known = ", ".join(sorted(found.stem for found in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"{path}: expected a YAML file or one of {known}, got neither")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name}: expected YAML, got: {error}") from error
    config = _validated(values, file.name)
    return config.changed(dict(map(_change, changes)))


def load_published(path: Path) -> dict[str, dict[str, float]]:
    """What the paper reports, to stand beside what was found: `{group: {variant: Dice in %}}`, from YAML.

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        published: dict[str, dict[str, float]] = TypeAdapter(dict[str, dict[str, float]]).validate_python(
            yaml.safe_load(path.read_text(encoding="utf-8"))
        )
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(f"{path.name}: expected {{group: {{variant: Dice in %}}}}, got: {error}") from error
    return published


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set: expected key=value, got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key}: expected a value in YAML, got {value!r}") from error


def _validated(values: Any, source: str) -> Config:
    if not isinstance(values, dict):
        raise ValueError(
            f"{source}: expected sections such as data and training, got {type(values).__name__}"
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(dict.fromkeys(_explain(found) for found in error.errors()))) from error


def _explain(found: Any) -> str:
    """One of pydantic's findings, in the words of this package's errors."""
    key = ".".join(str(part) for part in found["loc"]) or "settings"
    section = ".".join(str(part) for part in found["loc"][:-1])
    match found["type"]:
        case "extra_forbidden":
            part = Config.model_fields[section].annotation if section else Config
            known = ", ".join(part.model_fields)  # type: ignore[union-attr]
            return f"{key}: expected one of {known}, got {found['loc'][-1]!r}"
        case "missing":
            return f"{key}: expected a value, got none"
        case "value_error":
            return f"{key}: {found['ctx']['error']}"
        case _:
            expected = found["msg"].removeprefix("Input should be ")
            return f"{key}: expected {expected}, got {found['input']!r}"
