"""What does a step see? Images, labels, draws and noise as functions of (seed, step, sample).

Random numbers are drawn for the whole batch, so that they do not depend on how many processes
share it; images are loaded and augmented by the process that trains on them. A reference batch has
the training images as its first rows, so with stable targets every process needs them all.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from study.data import Archive, order, reference_indices
from study.diffusion.stf import StableTarget, reference_batch
from study.randomness import generator, seed_of
from study.spec.run import Spec


class Batches:
    """The batch of any step: the rows ``share`` of it, and the whole reference.

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

    def _load(
        self, indices: np.ndarray, rows: slice, step: int, part: str
    ) -> tuple[Tensor, Tensor | None]:
        """Images and labels of these rows of the images ``indices``."""
        draw = None
        if getattr(self.archive, "moments", False):
            noise = generator(self.seeds.data, "latent", part, step)
            shape = (len(indices), self.archive.channels, *[self.archive.resolution] * 2)
            draw = torch.randn(shape, generator=noise)[rows]
        images, labels = self.archive.batch(indices[rows], draw)
        if self.settings.flip:
            flips = torch.rand(len(indices), generator=generator(self.seeds.data, part, step))
            images = torch.where((flips[rows] < 0.5)[:, None, None, None], images.flip(3), images)
        return images, labels

    def _augment(
        self, images: Tensor, first: int, step: int, part: str
    ) -> tuple[Tensor, Tensor | None]:
        """Augmented images and their labels; ``first`` is the row of the first in the batch."""
        if self.augmentation is None:
            return images, None
        rows = range(first, first + len(images))
        seeds = [seed_of(self.seeds.data, "augment", part, step, row) for row in rows]
        return self.augmentation(images.to(self.device), seeds)

    def _reference(self, images: Tensor, indices: np.ndarray, step: int) -> StableTarget:
        """The target with respect to the whole batch and the images that are added to it."""
        count = self.target.reference - self.batch
        rest = reference_indices(self.seeds.data, step, count, len(self.archive), exclude=indices)
        others, _ = self._load(rest, slice(None), step, "reference")
        others, _ = self._augment(others, 0, step, "reference")
        return StableTarget(reference_batch(images, others).to(self.device))

    def __call__(self, step: int) -> dict[str, Any]:
        """Images, labels, draws and noise of the process's share, and the whole reference."""
        indices = order(self.seeds.data, step * self.batch, self.batch, len(self.archive))
        own, stable = self.share, None
        loaded = slice(0, self.batch) if self.target.kind == "stf" else own
        images, labels = self._load(indices, loaded, step, "flip")
        images, augment_labels = self._augment(images, loaded.start, step, "batch")
        if self.target.kind == "stf":
            stable = self._reference(images, indices, step)
            images, labels, augment_labels = (
                None if value is None else value[own] for value in (images, labels, augment_labels)
            )
        shape = (self.batch, *images.shape[1:])
        levels = generator(self.seeds.noise, "level", step)
        found = {
            "images": images,
            "labels": None,
            "augment_labels": augment_labels,
            "draws": (torch.rand if self.uniform else torch.randn)(self.batch, generator=levels)[
                own
            ],
            "noise": torch.randn(shape, generator=generator(self.seeds.noise, "noise", step))[own],
            "label_drops": None,
        }
        if self.settings.conditional:
            found["labels"] = self._dropped(labels, step)
            if self.label_drops:
                drops = generator(self.seeds.noise, "label drops", step)
                drawn = torch.rand(self.batch, self.label_drops, generator=drops)
                found["label_drops"] = drawn[own]
        moved = {
            key: None if value is None else value.to(self.device, non_blocking=True)
            for key, value in found.items()
        }
        return {**moved, "stable": stable}

    def _dropped(self, labels: Tensor, step: int) -> Tensor:
        """The share's labels, some of them replaced by the null label."""
        if not self.settings.label_dropout:
            return labels
        drop = torch.rand(self.batch, generator=generator(self.seeds.noise, "drop", step))
        null = torch.full_like(labels, self.archive.num_classes)
        return torch.where(drop[self.share] < self.settings.label_dropout, null, labels)
