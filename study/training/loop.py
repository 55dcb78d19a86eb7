"""The training loop.

Everything random is a function of (seed, step) and is made for the whole batch before a process
takes its share, so the numbers do not depend on processes, micro-batches or interruptions.
"""

import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from study.averaging import decay
from study.backbones.base import Backbone, check_attention
from study.data import Archive
from study.diffusion import formulations
from study.files import Stopped, UserError, atomic, sha256, write_json
from study.network import SplitNetwork, arithmetic, build_network, networks_of
from study.processes import listen, meet, own_environment
from study.provenance import Stopwatch, provenance
from study.randomness import seed_of
from study.spec.run import NetworkTraining, Spec
from study.spec.training import Training
from study.training import checkpoint
from study.training.batches import Batches
from study.training.divergence import Watch
from study.training.dynamics import Blocks, LossByNoise, SkipObserver, Table
from study.training.ema import Ema

FP16_SKIPS = 20
"""Steps in a row that fp16's loss scaling may skip before the run counts as diverged."""


class Interrupted(Stopped):
    """Asked to stop; a checkpoint was written and the same command resumes."""


class _Signals:
    """Notes the signals that ask to stop."""

    def __init__(self) -> None:
        self.received: str | None = None
        listen(self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name


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


class _Progress:
    """``state/progress.json`` for ``study status``, and a progress bar for people."""

    def __init__(self, folder: Path, start: int, steps: int, seconds: float, main: bool) -> None:
        self.folder, self.steps, self.main = folder, steps, main
        self.before, self.begun, self.written = seconds, time.time(), 0.0
        interval = 1.0 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc="train",
            unit="step",
            mininterval=interval,
            disable=not main,
            dynamic_ncols=True,
        )

    def __call__(self, step: int, loss: float) -> None:
        self.bar.update(step - self.bar.n)
        if not self.main or time.time() - self.written < 2.0:
            return
        self.written = time.time()
        self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        seconds = self.before + self.written - self.begun
        write_json(
            self.folder / "progress.json",
            {
                "stage": "train",
                "step": step,
                "steps": self.steps,
                "seconds": seconds,
                "time": self.written,
            },
        )


class Trainer:
    """One run: its network, optimiser, averages and log. ``train`` is the way in."""

    def __init__(self, spec: Spec, archive: Archive, state: Path, machine: dict[str, Any]) -> None:
        self.spec, self.archive, self.folder, self.machine = spec, archive, state, machine
        self.settings = spec.training
        _check_data(spec, archive)
        self.models = spec.models  # one after another; nearly always there is one
        self.accelerator = _accelerator(self.settings.precision, len(self.models) > 1)
        self.device = self.accelerator.device
        check_attention(self.settings.attention, self.device)
        self.formulations = formulations(spec.formulation, noise_scale=spec.backbone.noise_scale)
        self.backbone = build_network(spec, archive, machine.get("checkpointing", False))
        self.backbone.to(self.device).train()
        self.ema = Ema(self.backbone)
        optimizer = _optimizer(self.settings, self._parameter_groups())
        self.model, self.optimizer = self.accelerator.prepare(self.backbone, optimizer)
        self.parameters = list(self.backbone.parameters())
        self.blocks = Blocks(self.backbone)
        fp16 = self.settings.precision == "fp16"
        self.watch = Watch(self.settings.divergence, skips=FP16_SKIPS if fp16 else 0)
        self.dynamics, self.timing, self.by_noise = Table(), Table(), LossByNoise()
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.steps = spec.steps
        self.log_every = machine.get("log_every") or max(1, self.steps // 100)
        share = _share(self.settings.batch, self.accelerator)
        self.batches = Batches(
            archive,
            spec,
            self.device,
            share,
            self.formulations[0].draw == "uniform",
            _label_drops(networks_of(self.backbone)[0]),
        )

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

    def save(self, identity: dict[str, Any]) -> None:
        """Write everything that the next steps depend on."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.save(
                self.folder,
                identity,
                {
                    "step": self.step,
                    "seconds": self.seconds,
                    "model": self.backbone.state_dict(),
                    "ema": self.ema.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "watch": self.watch.state_dict(),
                    "dynamics": self.dynamics.columns,
                    "timing": self.timing.columns,
                    "losses": self.losses,
                    "by_noise": [self.by_noise.sums, self.by_noise.counts],
                },
            )
        self.accelerator.wait_for_everyone()

    def resume(self, identity: dict[str, Any]) -> None:
        """Continue from the checkpoint of this identity, if there is one."""
        if self.accelerator.is_main_process:
            state = checkpoint.load(self.folder, identity)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            state = checkpoint.load(self.folder, identity)
        if state is None:
            return
        try:
            self._restore(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.folder / checkpoint.NAME}: not a whole checkpoint of this training "
                f"({type(error).__name__}); move it away to start anew"
            ) from error
        if self.accelerator.is_main_process:
            print(f"resumed at step {self.step} of {self.steps}", flush=True)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = state["step"], state["seconds"]
        self.backbone.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.watch.load_state_dict(state["watch"])
        self.dynamics.columns, self.timing.columns = state["dynamics"], state["timing"]
        self.losses = state["losses"]
        self.by_noise.sums, self.by_noise.counts = state["by_noise"]

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
        average = self.ema.state_dict()
        weights = {
            here + key.removeprefix(there): value.clone()
            for key, value in average.items()
            if key.startswith(there)
        }
        self.ema.load_state_dict(weights)
        self.backbone.load_state_dict({**self.backbone.state_dict(), **weights})

    def _network(self, augment_labels: Tensor | None, label_drops: Tensor | None) -> Any:
        conditioning: dict[str, Any] = {}
        if augment_labels is not None:
            conditioning["augment_labels"] = augment_labels
        if label_drops is not None:
            conditioning["label_drop_uniform"] = label_drops.unbind(1)

        def network(x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
            with self.accelerator.autocast():
                return self.model(x, noise, label, **conditioning).float()

        return network

    def _backward(self, model: NetworkTraining) -> tuple[float, Tensor, Tensor]:
        """Gradients of the batch; its loss, and per-sample noise level and loss."""
        batch = self.batches(self.step)
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
            with self.accelerator.no_sync(self.model) if not last else _nothing():
                loss = formulation.loss(
                    self._network(part["augment_labels"], part["label_drops"]),
                    part["images"],
                    part["draws"],
                    part["noise"],
                    label=part["labels"],
                    stable_target=batch["stable"],
                )
                # The mean over the whole batch; DistributedDataParallel averages over processes.
                total = loss.per_sample.sum() / self.settings.batch
                self.accelerator.backward(total * self.accelerator.num_processes)
            sigmas.append(loss.sigma.detach().float())
            losses.append(loss.elements.detach().flatten(1).mean(1).float())
        sigma, losses = torch.cat(sigmas), torch.cat(losses)
        if self.accelerator.num_processes > 1:
            sigma, losses = self.accelerator.gather((sigma, losses))
        return losses.mean().item(), sigma.cpu(), losses.cpu()

    def _set_lr(self, model: NetworkTraining, done: int) -> float:
        warmup = model.warmup
        lr = model.lr * (min(done / warmup, 1.0) if warmup else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def advance(self) -> str | None:
        """One step. Returns why the run has diverged, or ``None``."""
        model, done = self._turn()
        if isinstance(self.backbone, SplitNetwork):
            self.backbone.active = model.split
            if done == 0 and self.step > 0:
                self._begin_turn(model)
        lr = self._set_lr(model, done)
        logs = self.step % self.log_every == 0 or self.step == self.steps - 1
        with SkipObserver(self.backbone) if logs else _nothing() as observer:
            value, sigma, losses = self._backward(model)
        self.losses.append(value)
        self.by_noise.add(sigma, losses)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.settings.nan_to_num:
            for gradient in gradients:
                torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)
        norm = Blocks.norm(gradients)
        if logs:
            self.dynamics.add(self.step, "loss", sum(self.losses) / len(self.losses))
            self.losses.clear()
            self.by_noise.log(self.dynamics, self.step)
            self.dynamics.add(self.step, "grad_norm", norm)
            self.dynamics.add(self.step, "lr", lr)
            observer.log(self.dynamics, self.step)
            self.blocks.log_gradients(self.dynamics, self.step)
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
            self.blocks.log_updates(self.dynamics, self.step, before)
        self.step += 1
        batch = self.settings.batch
        averaging = decay(self.settings.ema, batch, done * batch)
        split = isinstance(self.backbone, SplitNetwork)
        self.ema.update(averaging, f"networks.{model.split}." if split else "")
        if logs and not math.isfinite(Blocks.norm([p.detach() for p in self.parameters])):
            return "non-finite weights"
        return None


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def _save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    with atomic(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in weights.items()}, temporary)


def _is_sound(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())


def train(
    spec: Spec,
    data: str | Path,
    out: str | Path,
    state: str | Path,
    *,
    machine: dict[str, Any] | None = None,
    threads: int | None = None,
    stop_file: str | Path | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Train one run and write its folder; resume where an earlier attempt stopped.

    ``data`` is a dataset archive, ``out`` the run's ``train/`` folder
    and ``state`` the folder of its checkpoint. ``machine`` holds settings that only concern
    speed. Returns what ``status.json`` holds; a run that diverges is a result, not an error.

    Raises ``Interrupted`` after SIGTERM, SIGINT, SIGHUP, SIGUSR1 or when ``stop_file`` appears (a
    checkpoint is then written), ``UserError`` for settings that cannot be.
    """
    if threads:
        torch.set_num_threads(threads)
    spec = Spec.read(spec)
    machine, out, state = machine or {}, Path(out), Path(state)
    archive = Archive(data)
    if archive.fits(machine.get("resident_mib", 4096) * 2**20):
        archive.resident()
    trainer = Trainer(spec, archive, state, machine)
    identity = {"spec": spec.key, "code": code, "data": archive.sha256}
    trainer.resume(identity)
    signals = _Signals()  # until here there is nothing to save
    stopwatch = Stopwatch(trainer.device, before=trainer.seconds)
    main = trainer.accelerator.is_main_process
    steps, start = trainer.steps, trainer.step
    progress = _Progress(state, start, steps, trainer.seconds, main)
    saved, logged, begun = time.monotonic(), trainer.step, time.perf_counter()
    reason = None
    while trainer.step < steps and reason is None:
        with arithmetic(trainer.settings.precision):
            reason = trainer.advance()
        trainer.seconds = stopwatch.seconds
        progress(trainer.step, trainer.watch.last_finite.get("loss", math.nan))
        if trainer.step - logged >= trainer.log_every:
            now = time.perf_counter()
            trainer.timing.add(
                trainer.step, "step_seconds", (now - begun) / (trainer.step - logged)
            )
            logged, begun = trainer.step, now
        asked = signals.received or (stop_file and Path(stop_file).exists() and str(stop_file))
        if trainer.accelerator.num_processes > 1:
            asked = _agree(trainer, bool(asked)) and (asked or "another process")
        due = time.monotonic() - saved > machine.get("save_every", 60.0)
        if trainer.accelerator.num_processes > 1:
            due = _agree(trainer, due)
        if asked and reason is None and trainer.step < steps:
            trainer.save(identity)
            trainer.accelerator.end_training()
            progress.bar.close()
            raise Interrupted(
                f"stopped by {asked} at step {trainer.step} of {steps}; the same command resumes"
            )
        if due and reason is None:
            trainer.save(identity)
            saved = time.monotonic()
    progress.bar.close()
    if reason is None and not _is_sound(trainer.backbone):
        reason = "non-finite weights"
    if reason is None and trainer.step > start:
        trainer.save(identity)
    seconds = stopwatch.seconds
    status = {
        "status": "done" if reason is None else "diverged",
        "step": trainer.step,
        "steps": steps,
        "reason": reason,
        "last_finite": trainer.watch.last_finite,
        "run": out.parent.name,
        "spec": spec.content(),
        "code": code,
        "data_sha256": archive.sha256,
        "seeds": spec.seeds.model_dump(),
        "parameters": sum(p.numel() for p in trainer.parameters),
        "skips": len(trainer.backbone.long_skips),
        "skip_factors": trainer.backbone.long_skips.factors,
        "images_seen": trainer.step * trainer.settings.batch,
        "train_seconds": seconds,
        "images_per_second": trainer.step * trainer.settings.batch / max(seconds, 1e-9),
        "peak_memory_mib": stopwatch.peak_memory_mib,
        "final_loss": trainer.watch.last_finite.get("loss"),
        "processes": trainer.accelerator.num_processes,
        "provenance": provenance(trainer.device),
    }
    if main:
        out.mkdir(parents=True, exist_ok=True)
        _save_weights(out / "weights.safetensors", trainer.ema.state_dict())
        _save_weights(out / "raw.safetensors", trainer.backbone.state_dict())
        trainer.dynamics.write(out / "dynamics.parquet")
        trainer.timing.write(out / "timing.parquet")
        for key, name in (("weights_sha256", "weights"), ("raw_sha256", "raw")):
            status[key] = sha256(out / f"{name}.safetensors")
        write_json(out / "status.json", status)
        where = f"step {trainer.step} of {steps}"
        print(f"{status['status']} at {where}" + (f": {reason}" if reason else ""), flush=True)
    trainer.accelerator.end_training()
    return status


def _agree(trainer: Trainer, value: bool) -> bool:
    """Whether any process says so; all of them then leave at the same step."""
    flag = torch.tensor([float(value)], device=trainer.device)
    return bool(trainer.accelerator.reduce(flag, reduction="sum").item() > 0)
