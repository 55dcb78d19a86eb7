"""One training: its network, optimiser, averages and log, and what a step does to them."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor

from study.ahead import Ahead
from study.averaging import decay
from study.backbones.base import Backbone, check_attention
from study.data import Archive
from study.diffusion import formulations
from study.diffusion.stf import StableTarget, reference_batch
from study.files import UserError
from study.network import SplitNetwork, build_network, networks_of, repeatable
from study.processes import meet, own_environment
from study.randomness import seed_of
from study.spec.run import NetworkTraining, Spec
from study.spec.training import Training
from study.training import checkpoint, lineage
from study.training.batches import Batches
from study.training.divergence import Watch
from study.training.dynamics import Blocks, SkipObserver, Table
from study.training.ema import Ema
from study.training.log import Log, spacing
from study.training.snapshots import Snapshots, save_weights
from study.weights import LAST

FP16_SKIPS = 20
"""Steps in a row that fp16's loss scaling may skip before the run counts as diverged."""


def _label_drops(network: Backbone) -> int:
    """How many independent draws per image decide where the network itself drops labels."""
    return network.label_drops if getattr(network, "class_dropout_prob", 0) else 0


def _optimizer(settings: Training, parameters: Any) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[settings.optimizer](
        parameters,
        lr=settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=settings.precision != "fp16",  # gradients are unscaled here, not in the kernel
    )


def _accelerator(precision: str, idle_parameters: bool) -> Accelerator:
    mixed = {"fp32": "no", "tf32": "no"}.get(precision, precision)
    distributed = DistributedDataParallelKwargs(find_unused_parameters=idle_parameters)
    gpu = torch.cuda.is_available()
    with own_environment():
        meet("nccl" if gpu else "gloo")
        accelerator = Accelerator(
            mixed_precision=mixed, cpu=not gpu or None, kwargs_handlers=[distributed]
        )
    if precision == "fp16" and accelerator.device.type != "cuda":
        raise UserError(
            f"training.precision: fp16 needs a GPU, but this job runs on "
            f"{accelerator.device.type}; use fp32 or bf16"
        )
    return accelerator


def _compiled(model: Any) -> Any:
    torch._inductor.config.fallback_random = True  # the masks of dropout stay those of the seed
    return torch.compile(model)


def _share(batch: int, accelerator: Accelerator) -> slice:
    processes = accelerator.num_processes
    if batch % processes:
        raise UserError(
            f"training.batch: {batch} images cannot be shared by {processes} processes; "
            "take a multiple"
        )
    size = batch // processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def _check_data(spec: Spec, archive: Archive) -> None:
    training, target = spec.training, spec.target
    if spec.unsupported:
        raise UserError(spec.unsupported)
    if training.conditional and archive.labels is None:
        raise UserError(f"training.conditional: data set {archive.name} has no labels")
    if target.kind == "stf" and target.reference > len(archive):
        raise UserError(
            f"target stf({target.reference}): data set {archive.name} has only "
            f"{len(archive)} images; take at most that many"
        )


class Trainer:
    """One run: its network, optimiser, averages and log. ``train`` is the way in."""

    def __init__(
        self, spec: Spec, archive: Archive, out: Path, state: Path, machine: dict[str, Any]
    ) -> None:
        self.spec, self.archive, self.folder, self.machine = spec, archive, state, machine
        self.settings = spec.training
        _check_data(spec, archive)
        self.models = spec.models  # one after another; nearly always there is one
        self.accelerator = _accelerator(self.settings.precision, len(self.models) > 1)
        self.device = self.accelerator.device
        check_attention(self.settings.attention, self.device)
        self.formulations = formulations(spec.formulation, noise_scale=spec.backbone.noise_scale)
        self.backbone = build_network(spec, archive, machine.get("checkpointing", False))
        torch.backends.cudnn.benchmark = machine.get("cudnn_benchmark", False)
        self.backbone.to(self.device).train()
        if machine.get("channels_last"):
            self.backbone.to(memory_format=torch.channels_last)
        self.averages = {name: Ema(self.backbone) for name in spec.averages}
        optimizer = _optimizer(self.settings, self._parameter_groups())
        self.model, self.optimizer = self.accelerator.prepare(self.backbone, optimizer)
        self.fast = _compiled(self.model) if machine.get("compile") else self.model
        self.parameters = list(self.backbone.parameters())
        self.blocks = Blocks(self.backbone)
        fp16 = self.settings.precision == "fp16"
        self.watch = Watch(self.settings.divergence, skips=FP16_SKIPS if fp16 else 0)
        self.step, self.seconds, self.steps = 0, 0.0, spec.steps
        self.asked = self.due = False
        self.origins: list[dict[str, Any]] = []  # runs that it went on from, and at which steps
        self.strict = True  # until an operation has no kernel that repeats its bits
        self.log = Log(machine.get("log_every") or spacing(self.steps))
        self.timing = Table()
        self.snapshots = Snapshots(spec, out)
        self.saver = checkpoint.Saver(state, beside=self.device.type != "cpu")
        share = _share(self.settings.batch, self.accelerator)
        batches = Batches(
            archive,
            spec,
            self.device,
            share,
            self.formulations[0].draw == "uniform",
            _label_drops(networks_of(self.backbone)[0]),
        )
        # On the CPU the next batch would take its time from this step.
        self.batches = Ahead(batches, 0 if self.device.type == "cpu" else self.steps)

    def _parameter_groups(self) -> Any:
        """What the optimiser is given: of a split network, every part with its own settings."""
        if not isinstance(self.backbone, SplitNetwork):
            return self.backbone.parameters()
        betas = {model.split: tuple(model.betas) for model in self.models}
        return [
            {"params": network.parameters(), "betas": betas[number]}
            for number, network in enumerate(self.backbone.networks)
        ]

    # --- state -------------------------------------------------------------------------------

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """All that may be kept: the averages by their names, and the weights as ``raw``."""
        averages = {name: average.state_dict() for name, average in self.averages.items()}
        return {**averages, "raw": self.backbone.state_dict()}

    def keep(self) -> None:
        """Keep the weights of this step if it is one of those that are kept."""
        if self.main and self.snapshots.due(self.step):
            self.snapshots.keep(self.step, self.weights())

    def save(self, identity: dict[str, Any]) -> None:
        """Write everything that the next steps depend on."""
        if self.main:
            scaler, averages = self.accelerator.scaler, self.weights()
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "model": averages.pop("raw"),
                "averages": averages,
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "watch": self.watch.state_dict(),
                "log": self.log.state_dict(),
                "timing": self.timing.columns,
                "snapshots": self.snapshots.record,
                "origins": self.origins,
            }
            self.saver.save(identity, state)
        self.accelerator.wait_for_everyone()

    def wait(self) -> None:
        """Until what was to be saved is written, in all processes: the first one writes."""
        self.saver.wait()
        self.accelerator.wait_for_everyone()

    def resume(self, identity: dict[str, Any]) -> None:
        """Continue from the checkpoint of this identity, or else of another run of its lineage."""
        try:
            state = self._find(identity) if self.main else None
            self.accelerator.wait_for_everyone()
            if not self.main:
                state = checkpoint.load(self.folder, identity)
            if state is not None:
                self._restore(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder / checkpoint.NAME}: not a whole checkpoint of this training "
                f"({type(error).__name__}); move it away to start anew"
            ) from error
        if self.main:
            self.snapshots.sweep()
        self.keep()

    def _find(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The state to go on from, which is then the folder's checkpoint too."""
        state = checkpoint.load(self.folder, identity)
        if state is not None and self.snapshots.restore(state["snapshots"]):
            print(f"resumed at step {state['step']} of {self.steps}", flush=True)
            return state
        if state is not None:
            print(f"{self.folder}: not used; what it had kept is no longer whole", flush=True)
            (self.folder / checkpoint.NAME).unlink()
        return lineage.go_on(self.folder, identity, self.log.every, self.steps, self.snapshots)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.backbone.load_state_dict(state["model"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, values in moments.items():
                if values.shape == parameter.shape:  # whatever order of memory it was saved in
                    moments[name] = torch.empty_like(parameter).copy_(values)
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])
        log = Log.restored(state["log"])  # which keeps its spacing where another does not fit
        self.log = log.coarser(self.log.every, self.steps - 1) or log
        self.timing.columns = state["timing"]
        self.origins = state["origins"]

    # --- one step ----------------------------------------------------------------------------

    def _turn(self) -> tuple[NetworkTraining, int]:
        """The model that trains at this step, and how many steps it has had."""
        done = self.step
        for model in self.models[:-1]:
            if done < model.steps:
                return model, done
            done -= model.steps
        return self.models[-1], done

    def _begin_turn(self, model: NetworkTraining) -> None:
        """Make ready the next model of a split network, whose losses have their own scale."""
        fresh = Watch(self.watch.factor, self.watch.skips)
        fresh.last_finite = self.watch.last_finite
        self.watch = fresh
        if model.start is None:
            return
        here, there = f"networks.{model.split}.", f"networks.{model.start}."
        weights = {
            here + key.removeprefix(there): value.clone()
            for key, value in self.averages["ema"].state_dict().items()
            if key.startswith(there)
        }
        for average in self.averages.values():
            average.load_state_dict(weights)
        self.backbone.load_state_dict({**self.backbone.state_dict(), **weights})

    def _network(
        self, augment_labels: Tensor | None, label_drops: Tensor | None, logs: bool
    ) -> Any:
        conditioning: dict[str, Any] = {}
        if augment_labels is not None:
            conditioning["augment_labels"] = augment_labels
        if label_drops is not None:
            conditioning["label_drop_uniform"] = label_drops.unbind(1)

        # What is observed is not compiled: an observer looks between the operations.
        model = self.model if logs else self.fast

        def network(x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
            with self.accelerator.autocast():
                return model(x, noise, label, **conditioning).float()

        return network

    def stable(self, images: Tensor, others: Tensor | None) -> StableTarget | None:
        """The target with respect to the whole batch and the images that are added to it.

        ``images`` and ``others`` are this process's parts of both.
        """
        if others is None:
            return None
        if self.accelerator.num_processes > 1:
            count = self.spec.target.reference - self.settings.batch
            short = -(-count // self.accelerator.num_processes) - len(others)
            padded = torch.cat([others, others.new_zeros(short, *others.shape[1:])])
            images, others = self.accelerator.gather((images, padded))
            others = others[:count]
        return StableTarget(reference_batch(images, others))

    def _backward(self, model: NetworkTraining, logs: bool, wishes: tuple[bool, bool]) -> Tensor:
        """Gradients of the batch.

        Returns, still on the device, a row for every process: noise levels and losses of its
        samples, and its wishes.
        """
        batch = self.batches(self.step)
        stable = self.stable(batch["images"], batch["others"])
        formulation = self.formulations[model.split or 0]
        images = batch["images"]
        size = self.machine.get("micro_batch") or len(images)
        pieces = [slice(i, i + size) for i in range(0, len(images), size)]
        sigmas, losses = [], []
        if self.settings.dropout:
            set_seed(
                seed_of(self.spec.seeds.noise, "dropout", self.step) % 2**32,
                device_specific=True,
            )
        for number, piece in enumerate(pieces):
            part = {
                key: None if batch[key] is None else batch[key][piece]
                for key in ("images", "draws", "noise", "labels", "augment_labels", "label_drops")
            }
            last = number == len(pieces) - 1
            with self.accelerator.no_sync(self.model) if not last else nullcontext():
                loss = formulation.loss(
                    self._network(part["augment_labels"], part["label_drops"], logs),
                    part["images"],
                    part["draws"],
                    part["noise"],
                    label=part["labels"],
                    stable_target=stable,
                )
                # The mean over the whole batch; DistributedDataParallel averages over processes.
                total = loss.per_sample.sum() / self.settings.batch
                self.accelerator.backward(total * self.accelerator.num_processes)
            sigmas.append(loss.sigma.detach().float())
            losses.append(loss.elements.detach().flatten(1).mean(1).float())
        told = torch.tensor(wishes, dtype=torch.float32).to(self.device, non_blocking=True)
        row = torch.cat([*sigmas, *losses, told])[None]
        return self.accelerator.gather(row) if self.accelerator.num_processes > 1 else row

    def _read(self, rows: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, float]:
        """Noise levels and losses of the whole batch, and the norm, on the CPU.

        This is where a step waits for the device, once; what all processes wish is known then.
        """
        numbers = torch.cat([rows.flatten(), norm.reshape(1).to(rows)]).cpu()
        rows, norm = numbers[:-1].view(rows.shape), numbers[-1]
        size = self.settings.batch // len(rows)
        sigma, losses, wishes = rows.split([size, size, 2], dim=1)
        self.asked, self.due = wishes.bool().any(0).tolist()
        return sigma.flatten(), losses.flatten(), norm.item()

    def _set_lr(self, model: NetworkTraining, done: int) -> float:
        warmup = model.warmup
        lr = model.lr * (min(done / warmup, 1.0) if warmup else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _observed(
        self, model: NetworkTraining, logs: bool, wishes: tuple[bool, bool]
    ) -> tuple[Any, Tensor]:
        """The same, and what an observer of the long skips saw of it if this step is logged.

        The bits repeat wherever torch can make them; a network of the user's own may hold an
        operation where it cannot.
        """
        watching = SkipObserver(self.backbone) if logs else nullcontext()
        try:
            with repeatable(self.strict), watching as observer:
                return observer, self._backward(model, logs, wishes)
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"machine.compile: torch cannot compile this network here ({reason}); leave "
                    "compile out"
                ) from None
            if not isinstance(error, RuntimeError):
                raise
            if not self.strict or "determinis" not in str(error):
                raise
            reason = str(error).partition(",")[0]
        print(f"study: {reason}: a second training may differ in its last bits", file=sys.stderr)
        self.strict = False
        self.optimizer.zero_grad()
        return self._observed(model, logs, wishes)

    def advance(self, stop: bool = False, due: bool = False) -> str | None:
        """One step. Returns why the run has diverged, or ``None``.

        ``stop`` and ``due``: whether this process wishes the training to stop, or a checkpoint.
        Afterwards ``asked`` and ``due`` say whether any process does.
        """
        model, done = self._turn()
        if isinstance(self.backbone, SplitNetwork):
            self.backbone.active = model.split
            if done == 0 and self.step > 0:
                self._begin_turn(model)
        lr = self._set_lr(model, done)
        logs = self.step % self.log.every == 0 or self.step == self.steps - 1
        observer, rows = self._observed(model, logs, (stop, due))
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.settings.nan_to_num:
            for gradient in gradients:
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        sigma, losses, norm = self._read(rows, Blocks.norm(gradients))
        value = losses.mean().item()
        self.log.add(self.step, value, sigma, losses)
        if logs:
            self.log.rows.add(self.step, "grad_norm", norm)
            self.log.rows.add(self.step, "lr", lr)
            observer.log(self.log.rows, self.step)
            self.blocks.log_gradients(self.log.rows, self.step)
            before = self.blocks.copy()
        reason = self.watch.step(self.step, value, norm)
        if reason is not None:
            return reason
        if self.settings.clip is not None and math.isfinite(norm):
            if norm > self.settings.clip:
                torch._foreach_mul_(gradients, self.settings.clip / norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if logs:
            self.blocks.log_updates(self.log.rows, self.step, before)
        self.step += 1
        batch, split = self.settings.batch, isinstance(self.backbone, SplitNetwork)
        for name, settings in self.settings.averages.items():
            averaging = decay(settings, batch, done * batch)
            self.averages[name].update(averaging, f"networks.{model.split}." if split else "")
        if logs and not Blocks.norm([p.detach() for p in self.parameters]).isfinite():
            return "non-finite weights"
        return None

    # --- the end -----------------------------------------------------------------------------

    def facts(self, seconds: float) -> dict[str, Any]:
        """What ``status.json`` says of the training."""
        images = self.step * self.settings.batch
        return {
            "last_finite": self.watch.last_finite,
            "final_loss": self.watch.last_finite.get("loss"),
            "parameters": sum(p.numel() for p in self.parameters),
            "skips": len(self.backbone.long_skips),
            "skip_factors": self.backbone.long_skips.factors,
            "images_seen": images,
            "train_seconds": seconds,
            "images_per_second": images / max(seconds, 1e-9),
            "processes": self.accelerator.num_processes,
            "origins": self.origins,
        }

    def write(self, out: Path) -> dict[str, Any]:
        """Write the run's files but ``status.json``; returns the hashes of its weights."""
        weights = self.weights()
        hashes = {
            f"{name}_sha256": save_weights(out / LAST[which], weights[which])
            for name, which in (("weights", "ema"), ("raw", "raw"))
        }
        self.snapshots.keep_last(self.step, weights)
        self.log.table().write(out / "dynamics.parquet")
        self.timing.write(out / "timing.parquet")
        return {**hashes, "snapshots": self.snapshots.record}
