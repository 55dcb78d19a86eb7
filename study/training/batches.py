"""What does a step see? Images, labels, draws and noise as functions of (seed, step, sample).

Random numbers are drawn for the whole batch, so that they do not depend on how many processes
share it; images are loaded and augmented by the process that trains on them, and so is its part of
a reference batch, which `Trainer` gathers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.data import Archive, order, reference_indices
from study.randomness import generator, seed_of
from study.spec.run import Spec


class Batches:
    """The batch of any step: the rows ``share`` of it, and of the reference images beside it.

    ``uniform``: whether noise levels come from uniform draws instead of normal ones.
    ``label_drops``: how many draws per image decide where the network itself drops labels.
    """

    def __init__(
        self,
        archive: Archive,
        spec: Spec,
        device: torch.device,
        share: slice,
        uniform: bool,
        label_drops: int = 0,
    ) -> None:
        self.archive, self.device, self.share, self.uniform = archive, device, share, uniform
        self.label_drops = label_drops
        self.settings, self.target, self.seeds = spec.training, spec.target, spec.seeds
        self.batch = self.settings.batch
        self.augmentation = None
        if self.settings.augment:
            from study.diffusion.augmentation import Augmentation

            self.augmentation = Augmentation(self.settings.augment)

    def _moved(self, values: Tensor) -> Tensor:
        """The values on the device; from memory that it can read by itself."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def _load(
        self, indices: np.ndarray, rows: slice, step: int, part: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images, labels and labels of augmentation of these rows of the images ``indices``."""
        name, draw = "flip" if part == "batch" else part, None
        if getattr(self.archive, "moments", False):
            noise = generator(self.seeds.data, "latent", name, step)
            shape = (len(indices), self.archive.channels, *[self.archive.resolution] * 2)
            draw = self._moved(torch.randn(shape, generator=noise)[rows])
        images, labels = self.archive.batch(indices[rows], draw, self._moved)
        if self.settings.flip:
            flips = torch.rand(len(indices), generator=generator(self.seeds.data, name, step))
            flips = self._moved(flips[rows] < 0.5)[:, None, None, None]
            images = torch.where(flips, images.flip(3), images)
        if self.augmentation is None or not len(images):
            return images, labels, None
        seeds = [
            seed_of(self.seeds.data, "augment", part, step, row)
            for row in range(*rows.indices(len(indices)))
        ]
        images, augment_labels = self.augmentation(images, seeds)
        return images, labels, augment_labels

    def _others(self, indices: np.ndarray, step: int) -> Tensor:
        """This process's part of the images that are added to the batch as its reference."""
        count = self.target.reference - self.batch
        rest = reference_indices(self.seeds.data, step, count, len(self.archive), exclude=indices)
        size = self.share.stop - self.share.start
        rank, processes = self.share.start // size, self.batch // size
        each = -(-count // processes)
        return self._load(rest, slice(rank * each, (rank + 1) * each), step, "reference")[0]

    def __call__(self, step: int) -> dict[str, Any]:
        """Images, labels, draws and noise of the process's share, on the device.

        ``others``: its part of the reference that belongs to a stable target, beside the batch.
        """
        indices = order(self.seeds.data, step * self.batch, self.batch, len(self.archive))
        own = self.share
        images, labels, augment_labels = self._load(indices, own, step, "batch")
        shape = (self.batch, *images.shape[1:])
        levels = generator(self.seeds.noise, "level", step)
        draws = (torch.rand if self.uniform else torch.randn)(self.batch, generator=levels)
        noise = torch.randn(shape, generator=generator(self.seeds.noise, "noise", step))
        found: dict[str, Any] = {
            "images": images,
            "labels": None,
            "augment_labels": augment_labels,
            "draws": self._moved(draws[own]),
            "noise": self._moved(noise[own]),
            "label_drops": None,
            "others": self._others(indices, step) if self.target.kind == "stf" else None,
        }
        if self.settings.conditional:
            found["labels"] = self._moved(self._dropped(labels, step))
            if self.label_drops:
                drops = generator(self.seeds.noise, "label drops", step)
                drawn = torch.rand(self.batch, self.label_drops, generator=drops)
                found["label_drops"] = self._moved(drawn[own])
        return found

    def _dropped(self, labels: Tensor, step: int) -> Tensor:
        """The share's labels, some of them replaced by the null label."""
        if not self.settings.label_dropout:
            return labels
        drop = torch.rand(self.batch, generator=generator(self.seeds.noise, "drop", step))
        null = torch.full_like(labels, self.archive.num_classes)
        return torch.where(drop[self.share] < self.settings.label_dropout, null, labels)
