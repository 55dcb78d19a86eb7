"""What an arm costs: parameters, operations, memory for the backward pass, time and energy.

The network is that of the arm at initialisation, on the device of the job and in the precision and
with the attention kernel of the arm. Rows (``batch`` = images at a time, ``device`` = what the
measured ones were measured on; a value that cannot be had is empty):

===================== ============== ===============================================================
quantity              unit           what
===================== ============== ===============================================================
parameters            1              all that are trained; of split networks those of all parts
macs                  MAC/image      multiply-adds of one forward pass
activation_memory     B/image        what a training step keeps for its backward pass
train_step            s              forward, loss, backward, clipping and optimiser
train_throughput      images/s       batch / train_step
train_peak_memory     B              peak of the CUDA allocator in such a step
train_energy          J/step         of such a step
evaluation_throughput evaluations/s  network evaluations of one image, as samplers ask for them
evaluation_energy     J/evaluation   of one of them
===================== ============== ===============================================================

- ``macs`` are half the floating-point operations that ``torch.utils.flop_counter`` counts: matrix
  products and convolutions, resampling filters included, and the products inside attention (the
  count is made with attention written out, whatever kernel the arm uses). Normalisation,
  activations and sums are not counted. Papers' "GFLOPs" of transformers are such MACs.
- ``activation_memory`` is the growth per image of all storages that autograd saves between the
  forward and the backward pass of the training loss, each counted once; parameters do not grow
  and so have no part in it. Without activation checkpointing.
- A step is one of the arm's: its loss and target (the stable target included), its batch (of an
  imported network, which has none, that of the evaluations) and optimiser, at a learning rate of
  zero so that the weights stay. Loading images, augmentation, averaging of the weights and loss
  scaling are not in it. Of split networks one part is measured: every image passes one.
- Times are the shortest of several, after steps that warm up: whatever else a machine does makes a
  step longer and never shorter, and a mean or median would measure that too. Of samples per second:
  divide evaluations per second by the sampler's NFE.
- Energy is what the device says that it used while the step was repeated for a second, the idle
  part included: NVIDIA's counter of the GPU (needs pynvml), or that of all CPU packages (RAPL,
  where the system lets users read it), which also counts what else runs there.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from study.backbones.base import Backbone
from study.diffusion import formulations
from study.diffusion.stf import StableTarget
from study.network import build_network, networks_of
from study.probes.base import ArmSubject, Measured
from study.provenance import provenance
from study.spec.probes import Cost

UNITS = {
    "parameters": "1",
    "macs": "MAC/image",
    "activation_memory": "B/image",
    "train_step": "s",
    "train_throughput": "images/s",
    "train_peak_memory": "B",
    "train_energy": "J/step",
    "evaluation_throughput": "evaluations/s",
    "evaluation_energy": "J/evaluation",
}
"""Quantities in the order of their rows, and their units."""

ENERGY_SECONDS = 1.0
"""How long energy is measured: counters are read some ten to a thousand times a second."""

SIGMA = 0.5
"""Noise level of the evaluations; their cost does not depend on it."""


# --- counted -------------------------------------------------------------------------------------


def macs(forward: Callable[[], Any]) -> int:
    """Multiply-adds of what ``forward`` runs: matrix products and convolutions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() // 2


def network_macs(subject: ArmSubject) -> int:
    """Multiply-adds of one image's forward pass through an arm's network.

    Counted on the meta device, where only shapes exist, with attention written out: fused kernels
    are not known to the counter on every device.
    """
    spec, archive = subject.spec, subject.archive
    written_out = spec.changed(training={"attention": "math"})
    with torch.device("meta"):
        network = networks_of(build_network(written_out, archive))[0].eval()
        image = torch.empty(1, archive.channels, archive.resolution, archive.resolution)
        label = torch.zeros(1, dtype=torch.int64) if network.num_classes else None
        return macs(lambda: network(image, torch.ones(1), label))


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward``.

    Storages are counted once, however many views of them are kept; those of ``parameters`` are
    left out.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # holds the graph, so that no storage is freed and its address reused
    total = sum(kept.values())
    del result
    return total


# --- measured ------------------------------------------------------------------------------------


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The fewest seconds that ``work`` took, after two runs that warm up."""
    for _ in range(2):
        work()
    times = []
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the joules used so far, or ``None`` where nothing reports them."""
    return _gpu_counter(device) if device.type == "cuda" else _cpu_counter()


def _gpu_counter(device: torch.device) -> Callable[[], float] | None:
    # Whatever is missing (the module, the driver, the counter on this card, its right): no energy.
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    return None


def _cpu_counter(
    folder: Path = Path("/sys/class/powercap"), pattern: str = "intel-rapl:[0-9]"
) -> Callable[[], float] | None:
    packages = sorted(folder.glob(pattern))

    def read() -> float:
        return sum(int((one / "energy_uj").read_text(encoding="utf-8")) for one in packages) / 1e6

    try:
        return read if packages and read() > 0 else None
    except (OSError, ValueError):
        return None


def _joules(work: Callable[[], Any], device: torch.device) -> float | None:
    """Joules that one ``work`` takes, over as many as fit into ``ENERGY_SECONDS``."""
    counter = energy_counter(device)
    if counter is None:
        return None
    _wait(device)
    before, begun, done = counter(), time.perf_counter(), 0
    while time.perf_counter() - begun < ENERGY_SECONDS:
        work()
        _wait(device)
        done += 1
    used = counter() - before
    return used / done if used > 0 else None  # counters start anew when they are full


class _Training:
    """Training steps of an arm on images that stay the same."""

    def __init__(self, subject: ArmSubject, network: Backbone, batch: int) -> None:
        spec = subject.spec
        self.settings, self.device = spec.training, subject.device
        self.network = networks_of(network)[0]
        scale = spec.backbone.noise_scale
        self.formulation = formulations(spec.formulation, noise_scale=scale)[0]
        self.reference = None
        if spec.target.kind == "stf":
            self.reference, _ = subject.images(spec.target.reference)
        self.images, self.labels = subject.images(batch)
        self.noise = subject.noise(self.images.shape, "cost")
        self.draws = torch.full((batch,), 0.5, device=self.device)
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.parameters = list(self.network.parameters())
        self.optimizer = kinds[self.settings.optimizer](
            self.parameters,
            lr=0.0,
            betas=tuple(self.settings.betas),
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            fused=self.settings.precision != "fp16",
        )

    def _evaluate(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.settings.precision)
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            return self.network(x, noise, label).float()

    def loss(self, count: int | None = None) -> Tensor:
        """The training loss of the first ``count`` images."""
        stable = None if self.reference is None else StableTarget(self.reference)
        return self.formulation.loss(
            self._evaluate,
            self.images[:count],
            self.draws[:count],
            self.noise[:count],
            label=None if self.labels is None else self.labels[:count],
            stable_target=stable,
        ).per_sample.mean()

    def step(self) -> None:
        self.loss().backward()
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def saved_per_image(self) -> float:
        """Growth of what is kept for the backward pass from two images to four, per image."""
        two, four = (
            saved_bytes(lambda n=n: self.loss(n), self.network.parameters()) for n in (2, 4)
        )
        return (four - two) / 2


def _peak(work: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    _wait(device)
    return torch.cuda.max_memory_allocated(device)


def _timed_training(training: _Training, batch: int, repeats: int) -> dict[str, float | None]:
    seconds = _seconds(training.step, training.device, repeats)
    return {
        "train_step": seconds,
        "train_throughput": batch / seconds,
        "train_peak_memory": _peak(training.step, training.device),
        "train_energy": _joules(training.step, training.device),
    }


def _timed_evaluation(
    subject: ArmSubject, network: Backbone, batch: int, repeats: int
) -> dict[str, float | None]:
    images, labels = subject.images(batch)
    noisy = images + SIGMA * subject.noise(images.shape, "cost")
    denoiser = subject.denoiser(network.eval())

    @torch.no_grad()
    def work() -> None:
        denoiser(noisy, SIGMA, labels)

    seconds = _seconds(work, subject.device, repeats)
    joules = _joules(work, subject.device)
    return {
        "evaluation_throughput": batch / seconds,
        "evaluation_energy": None if joules is None else joules / batch,
    }


def measure(subject: ArmSubject, options: Cost) -> Measured:
    """Counts, times and energy of an arm; see the module's text.

    A batch that does not fit the device's memory leaves its rows empty.
    """
    spec = subject.spec
    trained = spec.training.steps > 0
    own = spec.training.batch if trained else options.evaluation_batch
    batch = options.batch or own
    network = subject.network()
    values: dict[str, float | None] = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": network_macs(subject),
    }
    few = _Training(subject, network, 4)
    values["activation_memory"] = few.saved_per_image()
    missing = []
    for name, work in (
        (
            "training",
            lambda: _timed_training(_Training(subject, network, batch), batch, options.steps),
        ),
        (
            "evaluation",
            lambda: _timed_evaluation(subject, network, options.evaluation_batch, options.steps),
        ),
    ):
        try:
            values |= work()
        except torch.OutOfMemoryError:
            missing.append(f"{name}: out of memory")
    place = provenance(subject.device)
    device = place["device"] if subject.device.type == "cuda" else place["processor"]
    batches = {"train": batch, "evaluation": options.evaluation_batch}
    rows = [
        {
            "quantity": quantity,
            "unit": unit,
            "batch": batches.get(quantity.partition("_")[0], 1),
            "device": device,
            "value": None if values.get(quantity) is None else float(values[quantity]),
        }
        for quantity, unit in UNITS.items()
    ]
    return Measured.of_rows(rows, missing=missing, threads=torch.get_num_threads())
