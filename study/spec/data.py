"""Data sets: where images come from, and how they are converted."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from study.spec.base import Model, Name, Place, refuse_idle

_SPLITS: dict[str, tuple[str | None, ...]] = {
    "digits": (None, "train", "all"),
    "cifar10": (None, "train", "test", "all"),
    "archive": (None, "train"),
}

IMAGES = {
    ("digits", "train"): 1797,
    ("digits", "all"): 1797,
    ("cifar10", "train"): 50_000,
    ("cifar10", "test"): 10_000,
    ("cifar10", "all"): 60_000,
}
"""Images of sources that are always the same."""


CLASSES = {"digits": 10, "cifar10": 10, "imagenet": 1000}
"""Classes of sources that are always the same."""


class DatasetSettings(Model):
    """What a data set is: its source, and how it is converted."""

    name: Name = Field(description="Name of the archive, results/datasets/<name>.zip.")
    source: Literal[
        "digits",
        "folder",
        "zip",
        "tar",
        "cifar10",
        "imagenet",
        "lsun",
        "celeba",
        "ffhq",
        "afhq",
        "latents",
        "archive",
    ] = Field(description="Where the images come from; digits is bundled, all others need a path.")
    split: Literal["train", "val", "test", "all"] | None = Field(
        None, description="Part of the source; null = train where there is one (FFHQ: all)."
    )
    resolution: int | None = Field(
        None, ge=4, description="Side in pixels after conversion; null keeps it (all must agree)."
    )
    crop: Literal["none", "center", "center_dhariwal", "celeba"] = Field(
        "none", description="How non-square images become square."
    )
    resize: Literal["lanczos", "box", "bilinear", "bicubic"] | None = Field(
        None, description="Filter of the resizing; null = lanczos (crop celeba: bilinear)."
    )
    color: Literal["rgb", "grey", "keep"] | None = Field(
        None, description="Colour mode of the archive; null = rgb (digits, archive: keep)."
    )
    labels: bool = Field(True, description="Keep class labels where the source has them.")
    channels: int | None = Field(
        None, ge=1, description="Channels that the images must have; null = as they are."
    )
    classes: int | None = Field(
        None, ge=1, description="Classes that the labels must have; null = as the source has."
    )
    max_images: int | None = Field(
        None, ge=1, description="Take only that many, evenly spaced in the source's order."
    )
    moments: Literal["mean_std", "mean_logvar"] | None = Field(
        None, description="Latents stored as moments: which; null = plain latents."
    )
    scale: float = Field(1.0, gt=0, description="Latents: factor, e.g. 0.18215.")

    @model_validator(mode="after")
    def _fits_its_source(self) -> Self:
        splits = _SPLITS.get(self.source, (None, "train", "val", "test", "all"))
        if self.split not in splits:
            known = ", ".join("null" if split is None else split for split in splits)
            raise ValueError(f"split {self.split}: source {self.source} has only {known}")
        if self.crop == "center_dhariwal" and self.resolution is None:
            raise ValueError("crop center_dhariwal needs a resolution")
        refuse_idle(self)
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.source not in ("latents", "archive"):
            yield "moments", "only latents are moments"
            yield "scale", "it is a factor of latents"
        if self.source == "latents":
            for key in ("crop", "resize", "color"):
                yield key, "latents are not images"
        elif self.crop == "center_dhariwal":
            yield "resize", "crop center_dhariwal has its own filters"
        elif self.resolution is None:
            yield "resize", "without a resolution nothing is resized"

    @property
    def images(self) -> int | None:
        """How many images it has; ``None`` where its source decides."""
        known = IMAGES.get((self.source, self.split or "train"))
        return known and min(known, self.max_images or known)

    @property
    def known_classes(self) -> int | None:
        """How many classes its labels have; ``None`` where its source decides."""
        return self.classes or CLASSES.get(self.source)

    @property
    def shape(self) -> tuple[int | None, int | None]:
        """Resolution and channels that the settings fix; ``None`` where the images decide."""
        native = {"digits": 8, "cifar10": 32}.get(self.source)
        return self.resolution or native, self._channels()

    def _channels(self) -> int | None:
        if self.channels is not None:
            return self.channels
        if self.source == "digits" and self.color != "rgb":
            return 1
        if self.source in ("latents", "archive") or self.color == "keep":
            return None
        return 1 if self.color == "grey" else 3


class Images(DatasetSettings):
    """A data set: what it is, and where it lies."""

    path: Place | None = Field(None, description="Folder, zip or tar to read; ~ is your home.")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="Broken images: stop and name them, or leave them out with a list."
    )
    note: str = Field("", description="Printed wherever metrics on this data set appear.")

    @model_validator(mode="after")
    def _lies_somewhere(self) -> Self:
        if self.source != "digits" and self.path is None:
            raise ValueError(f"source {self.source} needs dataset.path")
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.source == "digits":
            yield "path", "digits comes with a package"
        yield from super().idle()

    @property
    def settings(self) -> DatasetSettings:
        """The data set wherever it lies."""
        return DatasetSettings(**self.model_dump(include=set(DatasetSettings.model_fields)))


class Decoder(Model):
    """The autoencoder that turns generated latents into images."""

    weights: Place = Field(
        description="File with the weights of a Stable Diffusion autoencoder: .safetensors, or "
        "tensors that torch saved; keys of the original code or of diffusers."
    )
    scale: float = Field(
        gt=0, description="Latents are divided by it before they are decoded, e.g. 0.18215."
    )


class Dataset(Images):
    """A data set that runs are trained on, and what their samples are measured against."""

    reference: Images | None = Field(
        None, description="Images to measure against; null = those of the data set itself."
    )
    decoder: Decoder | None = Field(
        None, description="What decodes latents; needed by data sets of latents, and only there."
    )

    @property
    def measured(self) -> Images:
        """The images that samples are measured against."""
        return self.reference or self
