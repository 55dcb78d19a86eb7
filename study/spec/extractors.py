"""Feature extractors: which networks' features are compared."""

from typing import ClassVar, Literal

from pydantic import Field

from study.spec.base import Options, Place, kinds


class ExtractorOptions(Options):
    """An extractor; ``logits`` says whether it gives class probabilities as well."""

    logits: ClassVar[bool] = True


class DigitsOptions(ExtractorOptions):
    """A small classifier that the study trains; its metrics are never called FID."""

    kind: Literal["digits"] = "digits"
    seed: int = Field(0, ge=0, description="Seed of the classifier that is trained.")


class InceptionOptions(ExtractorOptions):
    """torch-fidelity's Inception; its Frechet distance is FID."""

    kind: Literal["inception"] = "inception"
    weights: Place | None = Field(
        None, description="File with its weights; null = torch-fidelity's own download."
    )


class PixelsOptions(ExtractorOptions):
    """The pixels themselves; no class probabilities, and so no inception score."""

    kind: Literal["pixels"] = "pixels"
    logits: ClassVar[bool] = False


EXTRACTORS: dict[str, type[ExtractorOptions]] = {
    "digits": DigitsOptions,
    "inception": InceptionOptions,
    "pixels": PixelsOptions,
}

Extractor = kinds(EXTRACTORS, "Feature extractor: a kind, or a mapping with its options.")
