"""What training logs of a network, measured on the weights that a run ended with.

The quantities are those of ``train/dynamics.parquet``, and the same code measures them
(``study.training.dynamics``), so that the two can be laid side by side; imported checkpoints, which
have no history, get them here. Images, noise and noise levels are the same in all runs of a data
set. Nothing is random beside the noise: no augmentation, no dropout, no dropped labels.

Rows (``value`` is the number; ``samples`` says over how many images):

============================ ========================================== =========================
quantity                     where                                      sigma
============================ ========================================== =========================
skip_norm, skip_norm_scaled  long skip, "1" = outermost                 noise level of all images
decoder_norm_before, _after  long skip                                  noise level
decoder_frobenius_after      long skip                                  noise level
gate_mean, _std, _min, _max  long skip (learned scalings only)          noise level
loss, grad_norm              "", or "networks.0" ... of split networks  none: training's levels
grad_norm_block              block, with ``position`` in the network    none: training's levels
loss_by_noise                centre of the bin, as training writes it   centre of the bin
============================ ========================================== =========================

Norms are L2, over all tokens and channels of a sample, averaged over samples; the Frobenius norm
is over all samples together and so grows with the root of their number. ``decoder_norm_before`` is
the decoder's part of a fusion, ``_after`` what the block that takes the fusion gives (ScaleLong,
figure 1, shows its norm over training). The loss is the run's own: its formulation and its target,
the stable target field with a fixed reference batch of the run's size (of ``samples``, if that is
more) whose first rows are the images. ``loss`` and ``loss_by_noise`` are means over pixels;
gradients are those of the mean over samples of the loss as it is trained, before clipping, in
single precision. Loss and gradients take noise levels in training's proportions, evenly spread.
"""

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from study.backbones.base import Backbone
from study.diffusion import formulations
from study.diffusion.stf import StableTarget
from study.network import arithmetic, networks_of
from study.probes.base import Measured, RunSubject
from study.probes.levels import even_draws, pieces, take
from study.spec.probes import Dynamics
from study.training.dynamics import BINS, Blocks, LossByNoise, SkipObserver, Table


def _row(quantity: str, where: str, value: float, samples: int, **more: Any) -> dict[str, Any]:
    fixed = {"quantity": quantity, "where": where, "position": None, "sigma": math.nan}
    return {**fixed, "samples": samples, "value": value, **more}


@torch.no_grad()
def _norms(
    subject: RunSubject,
    network: Backbone,
    options: Dynamics,
    images: Tensor,
    labels: Tensor | None,
    noise: Tensor,
) -> list[dict[str, Any]]:
    """Norms and gates at every noise level that the network knows."""
    denoiser, rows = subject.denoiser(network), []
    for sigma in options.sigmas:
        if not denoiser.sigma_min <= sigma <= denoiser.sigma_max:
            continue
        table = Table()
        with ExitStack() as stack:
            # Of split networks the one that is asked for sigma sees something, the others nothing.
            observers = [stack.enter_context(SkipObserver(one)) for one in networks_of(network)]
            for piece in pieces(len(images), options.batch):
                denoiser(images[piece] + sigma * noise[piece], sigma, take(labels, piece))
        for observer in observers:
            observer.log(table, 0)
        columns = (table.columns[name] for name in ("quantity", "where", "value"))
        for quantity, where, value in zip(*columns, strict=True):
            rows.append(_row(quantity, where, value, len(images), sigma=sigma))
    return rows


def _loss_and_gradients(
    subject: RunSubject,
    network: Backbone,
    options: Dynamics,
    images: Tensor,
    labels: Tensor | None,
    noise: Tensor,
) -> list[dict[str, Any]]:
    """Loss by noise level, and the norm of its gradient by block."""
    spec, count, rows = subject.spec, len(images), []
    stable = None
    if spec.target.kind == "stf":
        reference, _ = subject.images(max(spec.target.reference, count))
        stable = StableTarget(reference)
    parts = networks_of(network)
    made = formulations(spec.formulation, noise_scale=spec.backbone.noise_scale)
    by_noise = LossByNoise()
    network.zero_grad()
    for number, (part, formulation) in enumerate(zip(parts, made, strict=True)):

        def evaluate(x: Tensor, level: Tensor, label: Tensor | None = None, one=part) -> Tensor:
            return one(x, level, label).float()

        draws = even_draws(count, formulation.draw).to(images.device)
        total = 0.0
        for piece in pieces(count, options.batch):
            loss = formulation.loss(
                evaluate,
                images[piece],
                draws[piece],
                noise[piece],
                label=take(labels, piece),
                stable_target=stable,
            )
            (loss.per_sample.sum() / count).backward()
            values = loss.elements.detach().flatten(1).mean(1).double().cpu()
            by_noise.add(loss.sigma.detach().float().cpu(), values)
            total += values.sum().item()
        where = "" if len(parts) == 1 else f"networks.{number}"
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        rows.append(_row("loss", where, total / count, count))
        rows.append(_row("grad_norm", where, Blocks.norm(gradients).item(), count))
    places = {name: position for position, name in enumerate(network.blocks())}
    table = Table()
    Blocks(network).log_gradients(table, 0)
    for where, value in zip(table.columns["where"], table.columns["value"], strict=True):
        more = {"position": places.get(where)}
        rows.append(_row("grad_norm_block", where, value, count, **more))
    for where, total, seen in zip(BINS, by_noise.sums, by_noise.counts, strict=True):
        if seen > 0:
            value = (total / seen).item()
            rows.append(_row("loss_by_noise", where, value, int(seen), sigma=float(where)))
    return rows


def measure(subject: RunSubject, options: Dynamics) -> Measured:
    """Norms, gates, losses and gradients of the trained network; see the module's text."""
    network = subject.network(weights=options.weights)
    images, labels = subject.images(options.samples)
    noise = subject.noise(images.shape, "dynamics")
    given = (subject, network, options, images, labels, noise)
    rows = _norms(*given)
    with arithmetic("fp32"):
        rows += _loss_and_gradients(*given)
    return Measured.of_rows(rows)
