"""EDM's augmentation of training images, with labels that tell the network what was done.

Karras et al. 2020 ("Training Generative Adversarial Networks with Limited Data", appendix B) and
Karras et al. 2022 (EDM, appendix F.2: augmentation with conditioning, so that it does not leak
into the generated images). Stages in order: flips, quarter turns and whole-pixel shifts on pixels;
then scaling, rotation, anisotropic scaling and shift as one resampling; then colour.

Labels of the CIFAR-10 setting (9): x-flip, y-flip, scale w, rotation cos - 1 and sin, anisotropy
w cos and w sin, shift w_x and w_y; raw random numbers, zero where a stage did not act.

Random numbers are inputs: `Augmentation.draw` makes them from one seed per image, so that an
augmented image depends neither on the size nor on the other members of its batch. For the same
reason the reflected border is always as wide as it can be (the image size less one), where the
EDM code makes it as wide as the neediest image of the batch; the results differ by rounding only.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from study.spec.base import Model

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""Low-pass filter of the symlet with six vanishing moments (Daubechies 1992), l2 norm 1."""

BORDER = len(SYM6) // 4
"""Pixels that the downsampling filter reaches beyond the image."""

CHUNK = 256
"""Images resampled at once: bounds the memory of the enlarged images."""

DRAWS: dict[str, tuple[tuple[str, int], ...]] = {
    "xflip": (("integer", 2), ("uniform", 1)),
    "yflip": (("integer", 2), ("uniform", 1)),
    "rotate_int": (("integer", 4), ("uniform", 1)),
    "translate_int": (("uniform", 2), ("uniform", 1)),
    "scale": (("normal", 1), ("uniform", 1)),
    "rotate_frac": (("uniform", 1), ("uniform", 1)),
    "aniso": (("normal", 1), ("uniform", 1), ("uniform", 1), ("uniform", 1)),
    "translate_frac": (("normal", 2), ("uniform", 1)),
    "brightness": (("normal", 1), ("uniform", 1)),
    "contrast": (("normal", 1), ("uniform", 1)),
    "lumaflip": (("integer", 2), ("uniform", 1)),
    "hue": (("uniform", 1), ("uniform", 1)),
    "saturation": (("normal", 1), ("uniform", 1)),
}
"""Random numbers of each stage in order: (uniform or normal, how many), or (integer, below what).

The uniform number that decides whether the stage acts comes after the stage's own numbers. An
integer below k is floor(k u) of a uniform number u.
"""


class AugmentationOptions(Model):
    """EDM's augmentation; the defaults are the CIFAR-10 setting.

    A stage acts on an image with probability multiplier * p; multiplier 0 leaves it out, together
    with its labels.
    """

    p: float = Field(0.12, ge=0, description="Probability that every multiplier is applied to.")
    xflip: float = Field(1e8, ge=0, description="Multiplier: mirror left-right, half the time.")
    yflip: float = Field(1.0, ge=0, description="Multiplier: mirror top-bottom, half the time.")
    rotate_int: float = Field(0.0, ge=0, description="Multiplier: rotation by quarter turns.")
    translate_int: float = Field(0.0, ge=0, description="Multiplier: shift by whole pixels.")
    translate_int_max: float = Field(
        0.125, gt=0, description="Largest shift by whole pixels, relative to the image size."
    )
    scale: float = Field(1.0, ge=0, description="Multiplier: isotropic scaling.")
    rotate_frac: float = Field(1.0, ge=0, description="Multiplier: rotation by any angle.")
    aniso: float = Field(1.0, ge=0, description="Multiplier: anisotropic scaling.")
    translate_frac: float = Field(1.0, ge=0, description="Multiplier: shift by any distance.")
    scale_std: float = Field(0.2, ge=0, description="Standard deviation of log2 of the scale.")
    rotate_frac_max: float = Field(1.0, ge=0, description="Largest angle; 1 is half a turn.")
    aniso_std: float = Field(0.2, ge=0, description="Standard deviation of log2 of the aspect.")
    aniso_rotate_prob: float = Field(
        0.5, ge=0, le=1, description="Probability that the anisotropic axis is turned."
    )
    translate_frac_std: float = Field(
        0.125, ge=0, description="Standard deviation of the shift, relative to the image size."
    )
    brightness: float = Field(0.0, ge=0, description="Multiplier: brightness.")
    contrast: float = Field(0.0, ge=0, description="Multiplier: contrast.")
    lumaflip: float = Field(0.0, ge=0, description="Multiplier: inversion of luma.")
    hue: float = Field(0.0, ge=0, description="Multiplier: rotation of hue.")
    saturation: float = Field(0.0, ge=0, description="Multiplier: saturation.")
    brightness_std: float = Field(0.2, ge=0, description="Standard deviation of the brightness.")
    contrast_std: float = Field(0.5, ge=0, description="Standard deviation of log2 of contrast.")
    hue_max: float = Field(1.0, ge=0, description="Largest rotation of hue; 1 is half a turn.")
    saturation_std: float = Field(
        1.0, ge=0, description="Standard deviation of log2 of the saturation."
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages in use, in order."""
        return tuple(name for name in AUGMENTATION_LABELS if getattr(self, name) > 0)

    @property
    def label_dim(self) -> int:
        """Length of the augmentation label."""
        return sum(AUGMENTATION_LABELS[name] for name in self.stages)


AUGMENTATION_LABELS = {
    "xflip": 1,
    "yflip": 1,
    "rotate_int": 2,
    "translate_int": 2,
    "scale": 1,
    "rotate_frac": 2,
    "aniso": 2,
    "translate_frac": 2,
    "brightness": 1,
    "contrast": 1,
    "lumaflip": 1,
    "hue": 2,
    "saturation": 1,
}
"""Augmentation stages in order, and how many entries each has in the label."""


class Draws(NamedTuple):
    """Random numbers of a batch: uniform [B,U] in [0, 1), normal [B,K] standard normal."""

    uniform: Tensor
    normal: Tensor


class _Reader:
    """Hands out the columns of the random numbers in the order of the stages."""

    def __init__(self, draws: Draws) -> None:
        self.columns = {"uniform": iter(draws.uniform.T), "normal": iter(draws.normal.T)}

    def uniform(self) -> Tensor:
        return next(self.columns["uniform"])

    def normal(self) -> Tensor:
        return next(self.columns["normal"])

    def integer(self, below: int) -> Tensor:
        return (self.uniform() * below).floor().clamp(max=below - 1)

    def angle(self, largest: float) -> Tensor:
        return (self.uniform() * 2 - 1) * (math.pi * largest)


class Augmentation:
    """The augmentation described by `options`, or EDM's CIFAR-10 stages with probability `options`.

    label_dim: length of the labels; uniforms, normals: random numbers per image.
    """

    def __init__(self, options: AugmentationOptions | float = 0.12) -> None:
        if not isinstance(options, AugmentationOptions):
            options = AugmentationOptions(p=options)
        self.options = options
        self.stages = options.stages
        self.label_dim = options.label_dim
        self.uniforms = self.normals = 0
        for stage in self.stages:
            for kind, count in DRAWS[stage]:
                if kind == "normal":
                    self.normals += count
                else:
                    self.uniforms += count if kind == "uniform" else 1

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """images [B,C,H,W], one seed each -> (augmented images, labels [B,label_dim])."""
        return self.apply(images, self.draw(seeds))

    def draw(self, seeds: Sequence[int]) -> Draws:
        """Random numbers of len(seeds) images, each row a function of its own seed."""
        uniform = torch.empty(len(seeds), self.uniforms)
        normal = torch.empty(len(seeds), self.normals)
        generator = torch.Generator()
        for row, seed in enumerate(seeds):
            generator.manual_seed(seed)
            uniform[row] = torch.rand(self.uniforms, generator=generator)
            normal[row] = torch.randn(self.normals, generator=generator)
        return Draws(uniform, normal)

    def apply(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The pure function: images [B,C,H,W] float -> (images, labels [B,label_dim] float32)."""
        # Half precision would blur the images and round the labels.
        with torch.autocast(images.device.type, enabled=False):
            images, labels = self._augment(images, _Reader(_onto(draws, images)))
        if not labels:
            return images, images.new_zeros(len(images), 0, dtype=torch.float32)
        return images, torch.stack(labels, 1).to(torch.float32)

    def _augment(self, images: Tensor, read: _Reader) -> tuple[Tensor, list[Tensor]]:
        o, height, width = self.options, images.shape[2], images.shape[3]
        labels: list[Tensor] = []

        def acts(multiplier: float) -> Tensor:
            return read.uniform() < multiplier * o.p

        def only(value: Tensor, active: Tensor) -> Tensor:
            return torch.where(active, value, torch.zeros_like(value))

        # Flips, quarter turns and shifts that move whole pixels.
        if "xflip" in self.stages:
            flip = only(read.integer(2), acts(o.xflip))
            images = _where(flip == 1, images.flip(3), images)
            labels.append(flip)
        if "yflip" in self.stages:
            flip = only(read.integer(2), acts(o.yflip))
            images = _where(flip == 1, images.flip(2), images)
            labels.append(flip)
        if "rotate_int" in self.stages:
            turns = only(read.integer(4), acts(o.rotate_int))
            x_side = (turns == 1) | (turns == 2)
            y_side = (turns == 2) | (turns == 3)
            images = _where(x_side, images.flip(3), images)
            images = _where(y_side, images.flip(2), images)
            if width != height:
                raise ValueError(f"quarter turns need square images, not {height}x{width}")
            images = _where((turns == 1) | (turns == 3), images.transpose(2, 3), images)
            labels += [x_side.to(images), y_side.to(images)]
        if "translate_int" in self.stages:
            x, y = read.uniform() * 2 - 1, read.uniform() * 2 - 1
            active = acts(o.translate_int)
            shift_x = only(x * width * o.translate_int_max, active).round()
            shift_y = only(y * height * o.translate_int_max, active).round()
            # As in EDM's code a positive number moves the image right and up, while in
            # translate_frac it moves it right and down; the labels are the numbers in both.
            images = _shift(images, shift_x.long(), -shift_y.long())
            labels += [
                shift_x / (width * o.translate_int_max),
                shift_y / (height * o.translate_int_max),
            ]

        # One resampling: where in the source an output position comes from.
        source = torch.eye(3, device=images.device).expand(len(images), 3, 3)
        if "scale" in self.stages:
            w = only(read.normal(), acts(o.scale))
            factor = (-w * o.scale_std).exp2()
            source = source @ _scaling(factor, factor)
            labels.append(w)
        if "rotate_frac" in self.stages:
            angle = only(read.angle(o.rotate_frac_max), acts(o.rotate_frac))
            source = source @ _rotation(angle)
            labels += [angle.cos() - 1, angle.sin()]
        if "aniso" in self.stages:
            w, axis = read.normal(), read.angle(1)
            w = only(w, acts(o.aniso))
            # An axis without stretching means nothing: without it the image stays as it is.
            axis = only(axis, (read.uniform() < o.aniso_rotate_prob) & (w != 0))
            factor = (w * o.aniso_std).exp2()
            source = source @ _rotation(-axis) @ _scaling(1 / factor, factor) @ _rotation(axis)
            labels += [w * axis.cos(), w * axis.sin()]
        if "translate_frac" in self.stages:
            x, y = read.normal(), read.normal()
            active = acts(o.translate_frac)
            x, y = only(x, active), only(y, active)
            std = o.translate_frac_std
            source = source @ _translation(-x * width * std, -y * height * std)
            labels += [x, y]
        if {"scale", "rotate_frac", "aniso", "translate_frac"} & set(self.stages):
            images = _resample(images, source)

        colour = torch.eye(4, device=images.device).expand(len(images), 4, 4)
        luma = torch.tensor([1.0, 1.0, 1.0, 0.0], device=images.device) / math.sqrt(3)
        projection = luma.outer(luma)
        identity = torch.eye(4, device=images.device)
        if "brightness" in self.stages:
            w = only(read.normal(), acts(o.brightness))
            shift = torch.zeros_like(colour)
            shift[:, :3, 3] = (w * o.brightness_std)[:, None]
            colour = (identity + shift) @ colour
            labels.append(w)
        if "contrast" in self.stages:
            w = only(read.normal(), acts(o.contrast))
            factor = (w * o.contrast_std).exp2()
            one = torch.ones_like(factor)
            colour = torch.diag_embed(torch.stack([factor, factor, factor, one], 1)) @ colour
            labels.append(w)
        if "lumaflip" in self.stages:
            flip = only(read.integer(2), acts(o.lumaflip))
            colour = (identity - 2 * projection * flip[:, None, None]) @ colour
            labels.append(flip)
        if "hue" in self.stages:
            angle = only(read.angle(o.hue_max), acts(o.hue))
            colour = _hue_rotation(angle) @ colour
            labels += [angle.cos() - 1, angle.sin()]
        if "saturation" in self.stages:
            w = only(read.normal(), acts(o.saturation))
            factor = (w * o.saturation_std).exp2()[:, None, None]
            colour = (projection + (identity - projection) * factor) @ colour
            labels.append(w)
        if {"brightness", "contrast", "lumaflip", "hue", "saturation"} & set(self.stages):
            images = _recolour(images, colour)
        return images, labels


def _onto(draws: Draws, images: Tensor) -> Draws:
    return Draws(*(numbers.to(images.device, torch.float32) for numbers in draws))


def _where(chosen: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], first, second)


def _matrix(*rows: Sequence[Tensor | float]) -> Tensor:
    """A batch of matrices [B,n,n] from entries that are numbers or [B]."""
    like = next(entry for row in rows for entry in row if isinstance(entry, Tensor))
    return torch.stack(
        [
            torch.stack([e if isinstance(e, Tensor) else torch.full_like(like, e) for e in row], -1)
            for row in rows
        ],
        -2,
    )


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, x.new_ones(x.shape)])


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix([1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0])


def _rotation(angle: Tensor) -> Tensor:
    c, s = angle.cos(), angle.sin()
    return _matrix([c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0])


def _hue_rotation(angle: Tensor) -> Tensor:
    """Rotation of colour space about the grey axis (Rodrigues' formula), [B,4,4]."""
    c, s = angle.cos(), angle.sin()
    same, other = (1 - c) / 3, s / math.sqrt(3)
    return _matrix(
        [c + same, same - other, same + other, 0.0],
        [same + other, c + same, same - other, 0.0],
        [same - other, same + other, c + same, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    )


def _shift(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Shift by whole pixels with reflection at the borders; x, y [B] int64."""
    rows = _reflected(images.shape[2], y)[:, None, :, None].expand_as(images)
    columns = _reflected(images.shape[3], x)[:, None, None, :].expand_as(images)
    return images.gather(2, rows).gather(3, columns)


def _reflected(size: int, shift: Tensor) -> Tensor:
    """Source index [B,size] of every position after a shift [B], reflected at the borders."""
    position = torch.arange(size, device=shift.device) - shift[:, None]
    if size == 1:
        return torch.zeros_like(position)
    return size - 1 - (size - 1 - position % (2 * size - 2)).abs()


def _resample(images: Tensor, source: Tensor) -> Tensor:
    """Images whose position p (centred pixels) shows what was at source @ p, `source` [B,3,3].

    Reflected border; twofold upsampling by the wavelet; bilinear reading; twofold downsampling by
    the same filter reversed, which undoes the upsampling exactly where nothing moves. Images that
    do not move are therefore left alone.
    """
    moving = (source != torch.eye(3, device=source.device)).flatten(1).any(1).nonzero()[:, 0]
    result = images.clone()
    for rows in moving.split(CHUNK):
        result[rows] = _resample_chunk(images[rows], source[rows])
    return result


def _resample_chunk(images: Tensor, source: Tensor) -> Tensor:
    height, width = images.shape[2:]
    finer_y, finer_x = (_finer(n).to(images) for n in (height, width))
    coarser_y, coarser_x = (_coarser(n).to(images) for n in (height, width))
    fine = finer_y @ images @ finer_x.T

    # Output positions: the fine lattice of the image and a border for the filter. Fine position u
    # (centred) lies at (u + 1/2) / 2 in image pixels, because pixel k sits at fine index 2 k.
    out_h, out_w = coarser_y.shape[1], coarser_x.shape[1]
    y = (torch.arange(out_h, device=images.device) - (out_h - 1) / 2 + 0.5) / 2
    x = (torch.arange(out_w, device=images.device) - (out_w - 1) / 2 + 0.5) / 2
    ys, xs = torch.meshgrid(y, x, indexing="ij")
    positions = torch.stack([xs, ys, torch.ones_like(xs)], -1).to(source).reshape(-1, 3)
    read = (positions @ source.transpose(1, 2))[..., :2].reshape(-1, out_h, out_w, 2)
    grid = (2 * read - 0.5) * (2 / read.new_tensor([fine.shape[3], fine.shape[2]]))
    moved = functional.grid_sample(
        fine, grid.to(fine), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return coarser_y @ moved @ coarser_x.T


@cache
def _finer(size: int) -> Tensor:
    """Reflection by size - 1 on both sides, then upsampling, of a row of pixels: a matrix.

    [2 (3 size - 2), size]. Reflecting and filtering are linear, and two matrix products are faster
    than convolutions of single channels.
    """
    row = functional.pad(torch.eye(size, dtype=torch.float64)[:, None], [size - 1] * 2, "reflect")
    sparse = row.new_zeros(size, 1, 2 * row.shape[2] - 1)
    sparse[..., ::2] = row
    weights = torch.tensor(SYM6[::-1], dtype=torch.float64)[None, None]
    return functional.conv1d(sparse, weights, padding=len(SYM6) // 2)[:, 0].T.to(torch.float32)


@cache
def _coarser(size: int) -> Tensor:
    """Downsampling of a row of 2 (size + 2 BORDER) values and removal of the border: a matrix."""
    row = torch.eye(2 * (size + 2 * BORDER), dtype=torch.float64)[:, None]
    weights = torch.tensor(SYM6, dtype=torch.float64)[None, None]
    coarse = functional.conv1d(row, weights, padding=len(SYM6) // 2 - 1, stride=2)
    return coarse[:, 0, BORDER:-BORDER].T.to(torch.float32)


def _recolour(images: Tensor, colour: Tensor) -> Tensor:
    """Affine map of colours, [B,4,4]; grey images take the mean over the three colours."""
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"colour stages need 1 or 3 channels, not {channels}")
    matrix, shift = colour[:, :3, :3], colour[:, :3, 3]
    if channels == 1:
        gain = matrix.sum(2).mean(1)
        return images * gain[:, None, None, None] + shift.mean(1)[:, None, None, None]
    return torch.einsum("bij,bjhw->bihw", matrix.to(images), images) + shift[:, :, None, None]
