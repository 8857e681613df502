"""One training run: learn, validate, keep the best, test; killed, it goes on where it was."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from tqdm import tqdm

from contrastseg_fast import ReceptiveField, attach_pdcr, insert_uafs
from contrastseg_fast.attach import AttachedPDCR
from contrastseg_fast.experiments.batches import Cases, Patches, batches
from contrastseg_fast.experiments.comparators import insert_comparator
from contrastseg_fast.experiments.config import Config, Training
from contrastseg_fast.experiments.datasets import open_dataset
from contrastseg_fast.experiments.evaluation import Outcome, embedding_statistics, examine, scores
from contrastseg_fast.experiments.files import replace_bytes, replace_text
from contrastseg_fast.experiments.networks import build
from contrastseg_fast.experiments.provenance import commit
from contrastseg_fast.experiments.training import Trainer

EXAMINED = 16  # test cases whose hidden vectors are looked at
RESULT, CHECKPOINT, BEST = "result.json", "checkpoint.pt", "best.pt"


@dataclass(frozen=True)
class Processes:
    """The processes that share a batch: one, or those that torchrun started."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, found: list[Any]) -> list[Any]:
        """What all processes found, in one list for each of them."""
        if self.world == 1:
            return found
        parts: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, found)
        return [item for part in parts for item in part]

    def sum(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes of torchrun, or be the only one; ends what it began."""
    gpu = torch.cuda.is_available()
    if "LOCAL_RANK" not in os.environ:
        yield Processes(device=torch.device("cuda" if gpu else "cpu"))
        return
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        gc.collect()  # of a wrapped model, which holds the group: its threads must end before Python does
        dist.destroy_process_group()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Equal seeds give equal numbers, wherever torch has a deterministic algorithm; it warns where not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)


class MeanOverImages:
    """PDCR of this process's images, so that the mean over processes is the mean over all images.

    An image without valid vectors is left out of that mean, and processes may have different numbers of
    such images: each weighs its sum with the number of images that count in all.
    """

    def __init__(self, pdcr: AttachedPDCR, team: Processes) -> None:
        self.pdcr = pdcr
        self.team = team

    def __call__(self, labels: Tensor) -> Tensor:
        values = self.pdcr(labels)  # (B, layers), 0 for an image without valid vectors
        counted = self.team.sum((values.detach() != 0).sum(0))
        return (values.sum(0) * self.team.world / counted.clamp(min=1)).mean()


class Experiment:
    """The data, the network and its trainer that some settings stand for.

    Attributes:
        boxes: the patches of the hidden vectors that are examined, by layer.
    """

    def __init__(self, config: Config, team: Processes | None = None) -> None:
        self.config = config
        self.team = team or Processes()
        training, data = config.training, config.data
        if data.folder is None:
            raise ValueError("data.folder: expected the folder of the dataset, got none; see --data")
        if training.batch_size % self.team.world:
            raise ValueError(
                f"training.batch_size: expected a multiple of {self.team.world} processes, "
                f"got {training.batch_size}"
            )
        self.dataset = open_dataset(data.name, data.folder, on_error=data.on_error, **data.options)
        for name in ("resize", "patch", "inference_patch"):
            extent = getattr(data, name)
            if extent is not None and len(extent) != self.dataset.spatial_dims:
                dims = self.dataset.spatial_dims
                raise ValueError(f"data.{name}: expected one extent for each of {dims} axes, got {extent}")
        split = self.dataset.splits(config.seed if data.split_seed is None else data.split_seed)
        train = _part(split.train, data.fraction, config.seed)
        self.train_cases = Cases(self.dataset, train, data)
        self.validation_cases = Cases(self.dataset, split.validation[: data.validation_cases], data)
        self.test_cases = Cases(self.dataset, split.test, data)
        self.epoch_steps = training.epoch_steps or -(-len(train) // training.batch_size)
        self._build()

    def _build(self) -> None:
        config, team, dataset = self.config, self.team, self.dataset
        torch.manual_seed(config.seed)
        model, stages = build(config.network, dataset.spatial_dims, dataset.in_channels, dataset.num_classes)
        example = torch.zeros(1, dataset.in_channels, *config.data.input_shape)

        def attach(layers: Any, fields: Mapping[Any, ReceptiveField] | None = None) -> AttachedPDCR:
            return attach_pdcr(
                model,
                layers,
                dataset.num_classes,
                example_input=example,
                receptive_fields=fields,
                reduction="none" if team.world > 1 else "mean",
                **config.pdcr.options,
            )

        pdcr = attach(stages.named(config.pdcr.layers))
        if config.gate.kind != "none":
            # Found on the network without gates: behind squeeze-and-excitation, every vector sees everything.
            fields = dict(pdcr.loss.receptive_fields)
            pdcr.remove()
            self._insert_gates(model, stages.named(config.gate.layers), example)
            layers = [str(name) for name in fields]
            pdcr = attach(layers, None if config.gate.kind == "uafs" else fields)
        self.boxes = dict(pdcr.loss.patches)
        if config.pdcr.weight == 0:
            pdcr.remove()
        self.model = model.to(team.device)
        learner: nn.Module = self.model
        if team.world > 1:
            gpu = team.device.type == "cuda"
            if gpu:
                self.model = learner = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            learner = DistributedDataParallel(learner, device_ids=[team.device] if gpu else None)
        regularizer = MeanOverImages(pdcr, team) if team.world > 1 else pdcr
        optimizer = _optimizer(config.training, self.model)
        self.trainer = Trainer(
            learner,
            optimizer,
            _schedule(config.training, optimizer),
            regularizer if config.pdcr.weight > 0 else None,
            config.pdcr.weight,
            _amp(config.training, team.device),
        )

    def _insert_gates(self, model: nn.Module, layers: Any, example: Tensor) -> None:
        gate = self.config.gate
        if gate.kind == "uafs":
            options = {"hidden_channels": gate.hidden_channels, "norm": gate.norm}
            insert_uafs(model, layers, self.dataset.num_classes, example_input=example, **options)
            return
        if isinstance(layers, str):
            raise ValueError(
                f'gate.layers: expected "encoder", "decoder", "all" or a list of names for {gate.kind}, '
                f"got {layers!r}"
            )
        insert_comparator(model, gate.kind, layers, example)

    def fit(self, out: Path, quiet: bool = False) -> dict[str, Any]:
        """Train into the folder `out`, from its checkpoint if it has one, and test the best network.

        A validation after each epoch decides which network is the best. `out` gets `checkpoint.pt`,
        `best.pt`, `log.csv`, `result.json`, and TensorBoard's files where that is installed.

        Returns:
            the scores of the test cases and what was found about the hidden vectors.

        Raises:
            ValueError: the checkpoint in `out` is of other settings.
        """
        with deterministic():
            progress = self._resume(out)
            self._train(out, progress, quiet)
            self.team.wait()
            best = torch.load(out / BEST, map_location=self.team.device, weights_only=True)
            self.model.load_state_dict(best["model"])
            found = {
                "settings": self.config.record(),
                "commit": commit(),
                "best_step": best["step"],
                "validation_dice": progress["best"],
                "test_cases": len(self.test_cases),
                "scores": self.score(self.test_cases),
                "embeddings": self._embeddings(),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "seconds": round(progress["seconds"], 1),
            }
        if self.team.first:
            replace_text(out / RESULT, json.dumps(found, indent=2) + "\n")
        return found

    def _resume(self, out: Path) -> dict[str, Any]:
        progress: dict[str, Any] = {"step": 0, "best": -1.0, "history": [], "seconds": 0.0}
        if (out / CHECKPOINT).exists():
            saved = torch.load(out / CHECKPOINT, map_location=self.team.device, weights_only=True)
            if saved["settings"] != self.config.digest():
                raise _other_settings(out)
            for name, part in self._state().items():
                part.load_state_dict(saved[name])
            progress = saved["progress"]
        return progress

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "model": self.model,
            "optimizer": trainer.optimizer,
            "schedule": trainer.schedule,
            "scaler": trainer.scaler,
        }

    def _train(self, out: Path, progress: dict[str, Any], quiet: bool) -> None:
        training, team, data = self.config.training, self.team, self.config.data
        start = progress["step"]
        patches = Patches(self.train_cases, data, self.config.seed)
        stream = batches(
            patches, range(start, training.steps), training.batch_size, team.rank, team.world, data.workers
        )
        board = _tensorboard(out, start) if team.first else None
        totals: dict[str, float] = {}
        began, before = time.perf_counter(), progress["seconds"]
        with tqdm(
            total=training.steps, initial=start, unit="step", disable=quiet or not team.first, leave=False
        ) as bar:
            for step, (images, labels) in enumerate(stream, start=start + 1):
                # What is random in a step follows from its number: a resumed run needs no generator's state.
                torch.manual_seed(_seed_of(self.config.seed, step, team.rank))
                for name, value in self.trainer.step(images.to(team.device), labels.to(team.device)).items():
                    totals[name] = totals.get(name, 0.0) + value
                bar.update()
                if step % self.epoch_steps and step < training.steps:
                    continue
                row: dict[str, Any] = {"step": step, "lr": self.trainer.schedule.get_last_lr()[0]}
                steps = (step - 1) % self.epoch_steps + 1
                sums = torch.tensor(list(totals.values()), dtype=torch.float64, device=team.device)
                means = team.sum(sums) / team.world
                row |= dict(zip(totals, (means / steps).tolist(), strict=True))
                row["validation_dice"] = self.score(self.validation_cases)["dice"]
                totals = {}
                progress["step"] = step
                progress["history"].append(row)
                progress["seconds"] = before + time.perf_counter() - began
                bar.set_postfix(dice=f"{row['validation_dice']:.3f}")
                if team.first:
                    self._save(out, progress, row["validation_dice"])
                    _log(board, row)
                progress["best"] = max(progress["best"], row["validation_dice"])
        if board is not None:
            board.close()

    def _save(self, out: Path, progress: dict[str, Any], dice: float) -> None:
        weights = self.model.state_dict()
        if dice > progress["best"] or not (out / BEST).exists():
            _save_tensors(out / BEST, {"step": progress["step"], "model": weights})
        state = {name: part.state_dict() for name, part in self._state().items()}
        kept = progress | {"best": max(progress["best"], dice)}
        _save_tensors(out / CHECKPOINT, {**state, "progress": kept, "settings": self.config.digest()})
        table = io.StringIO()
        columns = dict.fromkeys(name for row in progress["history"] for name in row)
        writer = csv.DictWriter(table, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(progress["history"])
        replace_text(out / "log.csv", table.getvalue())

    @torch.no_grad()
    def logits(self, image: Tensor, extent: Sequence[int]) -> Tensor:
        """Logits `(M, *extent)` of a prepared image `(C, *spatial)`, whose extent on disk that is."""
        data, team = self.config.data, self.team
        self.model.eval()
        patch = data.inference_patch or data.patch or image.shape[1:]
        with torch.autocast(team.device.type, enabled=self.trainer.amp):
            found: Any = sliding_window_inference(image[None].to(team.device), patch, 4, self.model)
        if tuple(extent) != tuple(image.shape[1:]):
            mode = "trilinear" if len(extent) == 3 else "bilinear"
            found = nn.functional.interpolate(found.float(), tuple(extent), mode=mode)
        return found[0].float()

    def score(self, cases: Cases) -> dict[str, Any]:
        """Mean Dice, Jaccard and accuracy over cases, shared among the processes."""
        for buffer in self.model.buffers() if self.team.world > 1 else ():
            dist.broadcast(buffer, 0)
        names = self.dataset.class_names
        found = []
        for position in range(self.team.rank, len(cases), self.team.world):
            case = cases.prepared(position)
            if case is not None:
                image, labels, extent = case
                if extent != tuple(labels.shape):
                    labels = cases.original_labels(position)
                found.append(scores(self.logits(image, extent).argmax(0).cpu(), labels, names))
        return _means(self.team.gather(found), names)

    def examine(self, cases: Cases, count: int = EXAMINED) -> tuple[Tensor, Tensor, Outcome]:
        """Patches around foreground of some cases, their labels, and what the network makes of them."""
        seen = self.config.data.model_copy(update={"foreground_crops": 1.0, "augment": False})
        patches = Patches(cases, seen, seed=0)
        samples = [patches[number] for number in range(min(count, len(cases)))]
        images, labels = (torch.stack(part) for part in zip(*samples, strict=True))
        device = self.team.device
        outcome = examine(
            self.model, images.to(device), labels.to(device), self.dataset.num_classes, self.boxes
        )
        return images, labels, outcome.cpu()

    def _embeddings(self) -> dict[str, dict[str, float]]:
        pdcr = self.config.pdcr
        _, _, outcome = self.examine(self.test_cases)
        return embedding_statistics(
            outcome.hidden,
            temperature=pdcr.temperature,
            affinity=pdcr.affinity,
            class_distance=pdcr.class_distance,
            include_background=pdcr.include_background,
            variant=pdcr.variant,
        )


def run(config: Config, out: Path, team: Processes | None = None, quiet: bool = False) -> dict[str, Any]:
    """The result of a run in the folder `out`: read if it is finished, else made.

    Raises:
        ValueError: `out` holds a run of other settings.
    """
    if (out / RESULT).exists():
        found: dict[str, Any] = json.loads((out / RESULT).read_text(encoding="utf-8"))
        if found["settings"] != config.record():
            raise _other_settings(out)
        return found
    out.mkdir(parents=True, exist_ok=True)
    return Experiment(config, team).fit(out, quiet)


def _other_settings(out: Path) -> ValueError:
    return ValueError(f"--out: expected a folder without a run of other settings, got {out}")


def load_best(config: Config, out: Path) -> Experiment:
    """A finished run's data, and its network with the weights of its best validation."""
    experiment = Experiment(config)
    best = torch.load(out / BEST, map_location=experiment.team.device, weights_only=True)
    experiment.model.load_state_dict(best["model"])
    return experiment


def _part(names: Sequence[str], fraction: float, seed: int) -> list[str]:
    """A share of the names; of one seed, a smaller share is a part of a larger one."""
    order = np.random.default_rng([seed, 2]).permutation(len(names))
    return [names[k] for k in sorted(order[: max(1, round(fraction * len(names)))])]


def _optimizer(training: Training, model: nn.Module) -> torch.optim.Optimizer:
    lr, decay, momentum = training.lr, training.weight_decay, training.momentum
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay, nesterov=momentum > 0)


def _schedule(training: Training, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    match training.schedule:
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
        case "polynomial":
            return lr_scheduler.PolynomialLR(optimizer, training.steps, power=0.9)
        case _:
            return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _amp(training: Training, device: torch.device) -> bool:
    if training.amp and device.type != "cuda":
        raise ValueError(f"training.amp: expected false or null without a GPU, got {training.amp}")
    return device.type == "cuda" and training.amp is not False


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _means(found: list[dict[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """The scores of single cases as their means; a case whose labels lack a class counts not for it."""

    def mean(values: list[float | None]) -> float:
        known = [value for value in values if value is not None and value == value]
        return float(np.mean(known)) if known else 0.0

    result: dict[str, Any] = {
        name: mean([case[name] for case in found]) for name in ("dice", "jaccard", "accuracy")
    }
    of_class = [case["dice_of_class"] for case in found]
    result["dice_of_class"] = {name: mean([case[name] for case in of_class]) for name in class_names[1:]}
    return result


def _save_tensors(path: Path, values: dict[str, Any]) -> None:
    file = io.BytesIO()
    torch.save(values, file)
    replace_bytes(path, file.getvalue())


def _tensorboard(out: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step)


def _log(board: Any, row: dict[str, Any]) -> None:
    if board is not None:
        for name, value in row.items():
            board.add_scalar(name, value, row["step"])
