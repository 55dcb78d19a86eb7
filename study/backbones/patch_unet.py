"""The Patched U-Net, the network behind the backbone ``patch_unet``.

Source: Luhman & Luhman 2022, "Improving Diffusion Model Efficiency Through Patching", and its
released ``UNetModel``, whose state-dict keys, shapes and initialisation these are. It is an ADM
U-Net on a grid of patches (space-to-depth before the first convolution and its inverse after the
last) with a fixed position code, class gates on the residual branches instead of class
embeddings, and a separate head for the learned variance.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from study.backbones.base import Backbone, attention, sinusoidal
from study.skips import LongSkips, SkipShape
from study.spec.backbones import BackboneOptions
from study.spec.scalings import UNSCALED, SkipScaling

GROUPS = 32
"""Groups of every normalisation; so every width is a multiple of it."""


def to_patches(images: Tensor, side: int) -> Tensor:
    """[N, C, H, W] -> [N, side * side * C, H / side, W / side].

    Channels of a patch are ordered (row in patch, column in patch, colour).
    """
    count, colours, height, breadth = images.shape
    grid = images.reshape(count, colours, height // side, side, breadth // side, side)
    grid = grid.permute(0, 3, 5, 1, 2, 4)
    return grid.reshape(count, side * side * colours, height // side, breadth // side)


def from_patches(patches: Tensor, side: int) -> Tensor:
    """Inverse of ``to_patches``."""
    count, width, rows, columns = patches.shape
    grid = patches.reshape(count, side, side, width // side**2, rows, columns)
    grid = grid.permute(0, 3, 4, 1, 5, 2)
    return grid.reshape(count, width // side**2, rows * side, columns * side)


def position_code(
    width: int, rows: int, columns: int, device: torch.device | None = None
) -> Tensor:
    """Fixed code of positions [1, width, rows, columns].

    The first half of the channels are sines of the column, the second half sines of the row.
    Wavelengths grow with the grid: angles are multiplied by 64 / (grid side).
    """
    half = width // 2
    rate = -math.log(10000.0) / (half - 1)
    rate = torch.exp(rate * torch.arange(half, dtype=torch.float32, device=device))

    def sines(side: int) -> Tensor:
        position = torch.arange(side, dtype=torch.float32, device=device)
        return torch.sin(torch.outer(rate, position) * (64 / side))

    across = sines(columns)[:, None, :].expand(half, rows, columns)
    down = sines(rows)[:, :, None].expand(half, rows, columns)
    return torch.cat([across, down])[None]


def _zero(module: nn.Module) -> nn.Module:
    """The module with all its parameters zero: its branch starts silent."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Downsample(nn.Module):
    """Halve the resolution: 3x3 convolution of stride 2, or averaging.

    The convolution is padded as TensorFlow does ("same"): where the side is even, one row at the
    bottom and one column on the right.
    """

    def __init__(self, width_in: int, width_out: int, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        self.op = nn.Conv2d(width_in, width_out, 3, stride=2) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(functional.pad(x, (0, 1, 0, 1)) if self.learned else x)


class Upsample(nn.Module):
    """Double the resolution by repetition, then a 3x3 convolution if ``learned``."""

    def __init__(self, width_in: int, width_out: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 3, padding=1) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class ResidualBlock(nn.Module):
    """Residual block, modulated by time and gated by class; ``resample`` is "up", "down" or None.

    Maps x [N, width_in, H, W], time [N, E] and classes [N, class_width] | None to
    [N, width_out, H', W'].
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        time_width: int,
        *,
        class_width: int | None = None,
        resample: str | None = None,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width_in),
            nn.SiLU(),
            nn.Conv2d(width_in, width_out, 3, padding=1),
        )
        self.resample: nn.Module | None = None
        if resample:
            kind = Upsample if resample == "up" else Downsample
            self.resample = kind(width_in, width_in, learned=False)
        self.classemb_proj = nn.Linear(class_width, width_out) if class_width else None
        self.emb_layers = _zero(nn.Linear(time_width, 2 * width_out))
        self.out_layers = nn.Sequential(
            nn.SiLU(),
            nn.Dropout(dropout),
            _zero(nn.Conv2d(width_out, width_out, 3, padding=1)),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if width_in != width_out:
            self.skip_connection = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, time: Tensor, classes: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, time, classes, use_reentrant=False)
        return self._forward(x, time, classes)

    def _forward(self, x: Tensor, time: Tensor, classes: Tensor | None) -> Tensor:
        norm, act, convolution = self.in_layers
        hidden = act(norm(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = convolution(hidden)
        scale, shift = self.emb_layers(time)[:, :, None, None].chunk(2, dim=1)
        hidden = functional.group_norm(hidden, GROUPS, eps=1e-3)
        hidden = self.out_layers(torch.addcmul(shift, hidden, 1 + scale))
        if self.classemb_proj is not None:
            # The shift of 2 opens the gate at the start (0.88).
            gate = torch.sigmoid(self.classemb_proj(classes) + 2.0)
            hidden = hidden * gate[:, :, None, None]
        return self.skip_connection(x) + hidden


class AttentionBlock(nn.Module):
    """Residual self-attention over the positions of a map [N, width, H, W].

    ``split_first`` packs qkv as (3, heads, width of a head), the "new attention order";
    otherwise as (heads, 3, width of a head).
    """

    def __init__(
        self, width: int, heads: int, *, split_first: bool, kind: str, checkpointing: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.split_first = split_first
        self.kind = kind
        self.checkpointing = checkpointing
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = _zero(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        count, width, height, breadth = x.shape
        x = x.reshape(count, width, height * breadth)
        packed = self.qkv(self.norm(x))
        head = width // self.heads
        order = (3, self.heads) if self.split_first else (self.heads, 3)
        packed = packed.view(count, *order, head, height * breadth)
        axes = (1, 0, 2, 4, 3) if self.split_first else (2, 0, 1, 4, 3)
        # Contiguous, because batched products of strided tensors are slow on CPUs.
        query, key, value = packed.permute(axes).contiguous().unbind(0)
        mixed = attention(query, key, value, scale=head**-0.5, kind=self.kind)
        mixed = mixed.transpose(2, 3).reshape(count, width, height * breadth)
        return (x + self.proj_out(mixed)).view(count, width, height, breadth)


class Stage(nn.Sequential):
    """Layers in order; residual blocks among them receive time and classes as well."""

    def forward(self, x: Tensor, time: Tensor, classes: Tensor | None) -> Tensor:
        for layer in self:
            x = layer(x, time, classes) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class PatchUNet(Backbone):
    """Patched U-Net.

    ``forward(x [N, C, H, W], noise [N], label [N] int64 | None)`` returns [N, C_out, H, W].
    ``noise`` is the timestep. With ``out_channels`` = 2 x ``in_channels`` the output is
    [mean, variance fraction in (0, 1)]; the head of the variance reads detached features, so that
    its loss reaches the head and the time embedding only.

    With ``num_classes`` > 0 a table of class embeddings gates the residual branches;
    ``classifier_free`` adds the row of the null label (index ``num_classes``), which stands in
    for ``label`` None. Without that row a label must be given.

    ``attention_rates`` are downsampling rates of the patched grid (1 = finest); the middle block
    always attends.

    Raises ``ValueError`` for what the published network cannot do: widths that shrink from one
    level to the next coarser one, a learned variance with ``channel_mult[0]`` other than 1,
    fixed resampling (``conv_resample`` false without ``resblock_updown``) between levels of
    different width, widths that are no multiples of 32 or of the heads, and images that patches
    or levels do not divide.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_rates: Sequence[int],
        patch_size: int,
        channel_mult: Sequence[float],
        num_classes: int,
        classifier_free: bool,
        num_heads: int,
        num_head_channels: int,
        num_heads_upsample: int,
        resblock_updown: bool,
        use_new_attention_order: bool,
        conv_resample: bool,
        dropout: float = 0.0,
        scaling: SkipScaling = UNSCALED,
        attention: str = "sdpa",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = [int(mult * model_channels) for mult in channel_mult]
        learned_variance = out_channels == 2 * in_channels
        self._check(image_size, patch_size, model_channels, widths, learned_variance)
        if not (conv_resample or resblock_updown) and len(set(widths)) > 1:
            raise ValueError(
                "conv_resample false needs the same width on every level (or resblock_updown), "
                f"but channel_mult gives {widths}"
            )
        self.num_classes = num_classes
        self.classifier_free = classifier_free
        self.patch_size = patch_size
        self.model_channels = model_channels
        self.learned_variance = learned_variance
        area = patch_size**2
        outermost, innermost = widths[0], widths[-1]
        class_width = outermost if num_classes else None
        if num_classes:
            self.label_embs = nn.Embedding(num_classes + classifier_free, outermost)
        time_width = innermost
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, 4 * model_channels),
            nn.SiLU(),
            nn.Linear(4 * model_channels, time_width),
            nn.SiLU(),
        )

        def residual(width_in: int, width_out: int, resample: str | None = None) -> ResidualBlock:
            return ResidualBlock(
                width_in,
                width_out,
                time_width,
                class_width=class_width,
                resample=resample,
                dropout=dropout,
                checkpointing=checkpointing,
            )

        def attending(width: int, heads: int) -> AttentionBlock:
            return AttentionBlock(
                width,
                _heads(width, heads, num_head_channels),
                split_first=use_new_attention_order,
                kind=attention,
                checkpointing=checkpointing,
            )

        self.input_blocks = nn.ModuleList(
            [Stage(nn.Conv2d(in_channels * area, outermost, 3, padding=1))]
        )
        shapes = [SkipShape(outermost, 0)]
        width = outermost
        for level, next_width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [residual(width, next_width)]
                width = next_width
                if 2**level in attention_rates:
                    layers.append(attending(width, num_heads))
                self.input_blocks.append(Stage(*layers))
                shapes.append(SkipShape(width, level))
            if level < len(widths) - 1:
                coarser = widths[level + 1]
                down = (
                    residual(width, coarser, "down")
                    if resblock_updown
                    else Downsample(width, coarser, conv_resample)
                )
                self.input_blocks.append(Stage(down))
                width = coarser
                shapes.append(SkipShape(width, level + 1))

        self.middle_block = Stage(
            residual(width, width), attending(width, num_heads), residual(width, width)
        )

        decoder_heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        unused = list(shapes)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(num_res_blocks + 1):
                layers = [residual(width + unused.pop().width, widths[level])]
                width = widths[level]
                if 2**level in attention_rates:
                    layers.append(attending(width, decoder_heads))
                if level and index == num_res_blocks:
                    finer = widths[level - 1]
                    layers.append(
                        residual(width, finer, "up")
                        if resblock_updown
                        else Upsample(width, finer, conv_resample)
                    )
                    width = finer
                self.output_blocks.append(Stage(*layers))

        made = (in_channels if learned_variance else out_channels) * area
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, outermost),
            nn.SiLU(),
            _zero(nn.Conv2d(outermost, made, 3, padding=1)),
        )
        if learned_variance:
            self.variance_output_t_emb = nn.Conv2d(time_width, 2 * model_channels, 1)
            self.variance_output_model = nn.Sequential(
                nn.Conv2d(2 * model_channels, model_channels, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(model_channels, made, 3, padding=1),
                nn.Sigmoid(),
            )

        self.long_skips = LongSkips(scaling, shapes, pooling="channels")
        if self.long_skips.gates is not None:
            self.se = self.long_skips.gates

    @staticmethod
    def _check(
        image_size: int,
        patch_size: int,
        model_channels: int,
        widths: Sequence[int],
        learned_variance: bool,
    ) -> None:
        if not widths:
            raise ValueError("channel_mult needs at least one entry")
        divisor = patch_size * 2 ** (len(widths) - 1)
        if image_size % divisor:
            raise ValueError(
                f"patch_size {patch_size} and {len(widths)} levels (channel_mult) need a "
                f"resolution that is a multiple of {divisor}; here it is {image_size}"
            )
        if any(width < GROUPS or width % GROUPS for width in widths):
            raise ValueError(
                f"every width (channel_mult x model_channels) must be a multiple of {GROUPS}; "
                f"here they are {list(widths)}"
            )
        if any(coarse < fine for fine, coarse in zip(widths, widths[1:])):
            raise ValueError(f"channel_mult must not decrease; here the widths are {list(widths)}")
        if learned_variance and widths[0] != model_channels:
            raise ValueError(
                "a learned variance needs channel_mult[0] = 1; here the finest level has "
                f"{widths[0]} channels and model_channels is {model_channels}"
            )

    @classmethod
    def from_options(
        cls,
        options: BackboneOptions,
        *,
        scaling: SkipScaling,
        resolution: int,
        channels: int,
        out_channels: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        attention: str = "sdpa",
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> "PatchUNet":
        """Build from a spec's options.

        The option ``attention_resolutions`` holds resolutions of the patched grid, as the
        published command line does; those that the network does not have are left out.
        """
        if augment_dim:
            raise ValueError("patch_unet takes no augmentation labels; ddpmpp and ncsnpp do")
        given = options.model_dump()
        grid = resolution // given["patch_size"]
        attends = given.pop("attention_resolutions")
        return cls(
            image_size=resolution,
            in_channels=channels,
            out_channels=out_channels,
            num_classes=num_classes,
            attention_rates=[grid // side for side in attends if grid % side == 0],
            dropout=dropout,
            scaling=scaling,
            attention=attention,
            checkpointing=checkpointing,
            **given,
        )

    def blocks(self) -> dict[str, nn.Module]:
        encoder = {f"input_blocks.{i}": block for i, block in enumerate(self.input_blocks)}
        decoder = {f"output_blocks.{i}": block for i, block in enumerate(self.output_blocks)}
        return encoder | {"middle_block": self.middle_block} | decoder

    def decoder_blocks(self) -> list[nn.Module]:
        """Residual blocks only: attention and upsampling that follow in a stage are left out."""
        return [stage[0] for stage in reversed(self.output_blocks)]

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        features = sinusoidal(
            noise.reshape(-1), self.model_channels, last_divisor=True, sine_first=True
        )
        time = self.time_embed(features)
        classes = self._classes(x, label)

        x = self.input_blocks[0](to_patches(x.float(), self.patch_size), time, classes)
        x = x + position_code(*x.shape[1:], device=x.device).to(x.dtype)
        first, skips = x, [x]
        for stage in self.input_blocks[1:]:
            x = stage(x, time, classes)
            skips.append(x)
        x = self.middle_block(x, time, classes)
        for stage in self.output_blocks:
            number = len(skips)
            x = stage(self.long_skips.fuse(number, x, skips.pop()), time, classes)

        image = from_patches(self.out(x), self.patch_size)
        if self.learned_variance:
            seen = torch.cat([first, x], dim=1).detach()
            seen = seen + self.variance_output_t_emb(functional.silu(time)[:, :, None, None])
            variance = from_patches(self.variance_output_model(seen), self.patch_size)
            image = torch.cat([image, variance], dim=1)
        return image.float()

    def _classes(self, x: Tensor, label: Tensor | None) -> Tensor | None:
        if not self.num_classes:
            return None
        if label is None:
            if not self.classifier_free:
                raise ValueError("this network has no null label (classifier_free is false)")
            label = torch.full((x.shape[0],), self.num_classes, device=x.device)
        return self.label_embs(label)


def _heads(width: int, heads: int, head_width: int) -> int:
    if head_width == -1:
        if heads < 1 or width % heads:
            raise ValueError(f"num_heads {heads} does not divide the width {width}")
        return heads
    if head_width < 1 or width % head_width:
        raise ValueError(f"num_head_channels {head_width} does not divide the width {width}")
    return width // head_width
