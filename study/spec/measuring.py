"""How samples are made and measured."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from study.spec.base import Model, Place, refuse_idle
from study.spec.data import Dataset
from study.spec.guidance import GuidanceOptions
from study.spec.samplers import Sampler


class Guidance(GuidanceOptions):
    """Classifier-free guidance: a scale, or a mapping with the kind of guidance."""

    kind: Literal["edm", "uvit", "udit", "patch"] | None = Field(  # type: ignore[assignment]
        None, description="Whose definition; null = that of the formulation."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"scale": value}
        if not isinstance(value, Mapping):
            raise ValueError("neither a number nor a mapping with scale")
        return value

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        full = handler.resolve_ref_schema(handler(core))
        description = (cls.__doc__ or "").strip()
        return {"anyOf": [{"type": "number"}, full], "description": description}


class Decoder(Model):
    """The autoencoder that turns generated latents into images."""

    weights: Place = Field(
        description="File with the weights of a Stable Diffusion autoencoder: .safetensors, or "
        "tensors that torch saved; keys of the original code or of diffusers."
    )
    scale: float = Field(
        gt=0, description="Latents are divided by it before they are decoded, e.g. 0.18215."
    )


class Generation(Model):
    """How samples are made. The same for all arms of a study."""

    sampler: Sampler = Field(description="Sampler and its options.")
    images: int | None = Field(None, ge=1, description="null = as many as the data set has.")
    seed: int = Field(0, ge=0, description="First sample's seed; sample i has seed + i.")
    weights: Literal["ema", "raw"] = Field("ema", description="Which weights generate.")
    guidance: Guidance | None = Field(
        None, description="Classifier-free guidance: a scale, or {kind, scale, channels}."
    )
    decoder: Decoder | None = Field(
        None, description="What decodes latents; needed by data sets of latents, and only there."
    )
    batch: int = Field(256, ge=1, description="Images at a time; changes no result.")

    def protocol(self) -> dict[str, Any]:
        """What samples depend on, as far as it is not at its default."""
        left_out: Any = {"batch": True, "decoder": {"weights"}}
        return self.model_dump(mode="json", exclude=left_out, exclude_defaults=True)


class Evaluation(Model):
    """Which metrics, on which features."""

    extractor: Literal["digits", "inception", "pixels"] = Field(
        description="Feature extractor: digits trains a small classifier; inception gives FID."
    )
    weights: Place | None = Field(None, description="File with the extractor's weights.")
    metrics: tuple[Literal["fd", "kid", "is", "prc"], ...] = Field(
        ("fd", "kid", "is", "prc"), min_length=1, description="Frechet, KID, IS, precision/recall."
    )
    seed: int = Field(0, ge=0, description="Seed of the classifier that digits trains.")
    reference: Dataset | None = Field(
        None, description="Images to measure against; null = those of the data set itself."
    )

    @model_validator(mode="after")
    def _acts(self) -> "Evaluation":
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: {', '.join(self.metrics)} lists one twice")
        refuse_idle(self)
        return self

    def idle(self) -> Iterator[tuple[str, str]]:
        """Keys that cannot act beside the others, and why."""
        if self.extractor == "digits":
            yield "weights", "digits trains its own classifier"
        else:
            yield "seed", "only digits trains a classifier"
        if self.extractor == "pixels":
            yield "weights", "pixels has none"

    def protocol(self) -> dict[str, Any]:
        """What a measurement depends on, as far as it is not at its default."""
        return self.model_dump(mode="json", exclude={"weights", "reference"}, exclude_defaults=True)
