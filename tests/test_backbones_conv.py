"""The convolutional backbones: SongUNet (ddpmpp, ncsnpp) and the Patched U-Net."""

import pytest
import torch
from torch import nn

from study.backbones import build as build_backbone
from study.backbones.patch_unet import from_patches, position_code, to_patches
from study.files import UserError
from study.parity import official
from study.spec.backbones import FAMILIES
from study.spec.run import Backbone
from study.spec.scalings import SkipScaling

TINY = ("ddpmpp", "ncsnpp", "patch_unet")
PLAIN = {"method": "none"}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def full(family, options):
    """Options of a run as its spec holds them: every key, defaults filled in."""
    return FAMILIES[family].options(**options).model_dump()


def preset(family, name):
    return {"family": family, "options": full(family, FAMILIES[family].presets[name])}


def build(spec, scaling, **size):
    """The network; of the scaling, keys that only ``cs`` has are left out of the others."""
    scaling = scaling if scaling["method"] == "cs" else {"method": scaling["method"]}
    return build_backbone(Backbone.read(spec), SkipScaling(**scaling), **size)


def tiny(family, scaling=PLAIN, **kwargs):
    return build(preset(family, "tiny"), scaling, resolution=8, channels=1, **kwargs)


def awake(network):
    """Every parameter redrawn, so that no branch stays at its (near-)zero initial value."""
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return network


def song(**changes):
    arguments = {
        "img_resolution": 8,
        "in_channels": 2,
        "out_channels": 3,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
    }
    return official.songunet(**(arguments | changes))


def patched(**changes):
    arguments = {
        "image_size": 8,
        "in_channels": 2,
        "model_channels": 32,
        "out_channels": 4,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "patch_size": 2,
        "channel_mult": [1, 2],
        "use_scale_shift_norm": True,
    }
    return official.patch_unet(**(arguments | changes))


def batch(network, count=3, side=8):
    channels = 2
    return torch.randn(count, channels, side, side), torch.rand(count) * 3


# --- Equality with the official implementations ------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "resolution", "out_channels", "classes", "parameters"),
    [
        ("ddpmpp", "cifar10", 32, 3, 0, 55_733_891),
        ("ddpmpp", "cifar10", 32, 3, 10, 55_735_299),
        ("ncsnpp", "cifar10", 32, 3, 0, 56_397_827),
        ("ncsnpp", "cifar10", 32, 3, 10, 56_400_643),
        ("ddpmpp", "64px", 64, 3, 0, 61_805_571),
        ("ncsnpp", "64px", 64, 3, 0, 62_761_091),
        ("patch_unet", "imagenet256_p4", 256, 6, 1000, 202_148_704),
        ("patch_unet", "ffhq1024_p4", 1024, 6, 0, 162_645_344),
        ("patch_unet", "lsun_p2", 256, 6, 0, 122_916_120),
        ("patch_unet", "lsun_p4", 256, 6, 0, 121_416_544),
        ("patch_unet", "lsun_p8", 256, 6, 0, 121_011_584),
    ],
)
def test_published_sizes(family, name, resolution, out_channels, classes, parameters):
    with torch.device("meta"):
        network = build(
            preset(family, name),
            PLAIN,
            resolution=resolution,
            channels=3,
            out_channels=out_channels,
            num_classes=classes,
            # The published SongUNets were trained, and counted, with augmentation labels.
            augment_dim=0 if family == "patch_unet" else 9,
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_our_patched_cifar10_has_the_size_of_its_peers():
    with torch.device("meta"):
        network = build(preset("patch_unet", "cifar10"), PLAIN, resolution=32, channels=3)
    assert 30e6 < sum(parameter.numel() for parameter in network.parameters()) < 60e6
    assert len(network.long_skips) == 12


@pytest.mark.parametrize("family", TINY)
def test_tiny_is_tiny(family):
    assert 1e5 < sum(parameter.numel() for parameter in tiny(family).parameters()) < 4e5


# --- Long skips --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["none", "inv_sqrt2", "cs", "ls", "ls_unshared"])
def test_every_long_skip_is_scaled_and_consumed_in_order(family, method):
    network = tiny(family, {"method": method, "kappa": 0.5, "exponent": "per_skip"})
    skips = network.long_skips
    assert len(skips) >= 4
    assert len(network.decoder_blocks()) == len(skips)

    events = []

    def observe(index, main, skip, scaled, gate):
        events.append(("fused", index))
        assert skip.shape[1] == skips.shapes[index - 1].width >= 16
        assert skip.shape[2:] == main.shape[2:]
        if skips.factors is None:
            assert gate.shape == (2, skip.shape[1], 1, 1)
        else:
            torch.testing.assert_close(scaled, skip * skips.factors[index - 1])

    def consumed(index):
        return lambda module, inputs: events.append(("consumed", index))

    skips.observer = observe
    for index, block in enumerate(network.decoder_blocks(), start=1):
        block.register_forward_pre_hook(consumed(index))
    network(torch.randn(2, 1, 8, 8), torch.rand(2))
    order = range(len(skips), 0, -1)
    assert events == [(what, i) for i in order for what in ("fused", "consumed")]


@pytest.mark.parametrize("family", TINY)
def test_skip_scaling_changes_the_output(family):
    x, noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    plain = awake(tiny(family))
    outputs = [plain(x, noise)]
    for method in ("inv_sqrt2", "cs", "ls"):
        network = tiny(family, {"method": method, "kappa": 0.5, "exponent": "per_level"})
        missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        assert all(name.startswith("se.") for name in missing)
        assert bool(missing) == (method == "ls")
        outputs.append(network(x, noise))
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other) for other in outputs[:i])


@pytest.mark.parametrize("family", TINY)
def test_levels_of_the_skips_follow_their_resolution(family):
    network = tiny(family)
    sides = {}
    network.long_skips.observer = lambda i, main, skip, *_: sides.__setitem__(i, skip.shape[2])
    network(torch.randn(1, 1, 8, 8), torch.rand(1))
    finest = sides[1]
    levels = [shape.level for shape in network.long_skips.shapes]
    assert levels == sorted(levels)
    assert [finest >> level for level in levels] == [sides[i + 1] for i in range(len(levels))]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["ls", "ls_unshared"])
def test_gates_learn(family, method):
    network = awake(tiny(family, {"method": method}))
    for name, parameter in network.se.named_parameters():
        if name.endswith("layer1.bias"):
            # A narrow gate has a single hidden unit, which may be off for every sample.
            nn.init.constant_(parameter, 5.0)
    network(torch.randn(4, 1, 8, 8), torch.rand(4)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.se.parameters())


def test_narrow_skips_have_no_gates():
    options = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
    spec = {"family": "ddpmpp", "options": full("ddpmpp", options)}
    with pytest.raises(UserError, match="at least 16 channels"):
        build(spec, {"method": "ls"}, resolution=8, channels=1)


# --- What every backbone does ------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
def test_blocks_are_named_by_their_state_and_run_in_order(family):
    network = tiny(family)
    state = network.state_dict()
    ran = []
    for name, block in network.blocks().items():
        assert network.get_submodule(name) is block
        assert any(key.startswith(f"{name}.") for key in state)
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(torch.randn(1, 1, 8, 8), torch.rand(1))
    assert ran == list(network.blocks())


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["none", "ls"])
def test_attention_kinds_agree(family, method):
    x, noise, label = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 2])
    networks = [
        tiny(family, {"method": method}, num_classes=3, attention=kind) for kind in ("sdpa", "math")
    ]
    networks[1].load_state_dict(awake(networks[0]).state_dict())
    one, other = (network(x, noise, label) for network in networks)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", TINY)
def test_checkpointing_changes_nothing(family):
    x, noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    state, results = None, []
    for checkpointing in (False, True):
        network = tiny(family, num_classes=2, dropout=0.5, checkpointing=checkpointing)
        state = state or awake(network).state_dict()
        network.load_state_dict(state)
        torch.manual_seed(1)
        output = network(x, noise, torch.tensor([0, 1]))
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in network.parameters())])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("family", TINY)
def test_dropout_acts_in_training_only(family):
    x, noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    network = awake(tiny(family, dropout=0.5))
    assert not torch.equal(network(x, noise), network(x, noise))
    network.eval()
    assert torch.equal(network(x, noise), network(x, noise))


@pytest.mark.parametrize("family", TINY)
def test_float32_at_the_boundary(family):
    network = awake(tiny(family, num_classes=2, out_channels=2))
    x, noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    exact = network(x, noise, torch.tensor([0, 1]))
    assert network(x.double(), noise.double(), torch.tensor([0, 1])).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, noise, torch.tensor([0, 1]))
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.1 * exact.norm()
    rough.square().mean().backward()


@pytest.mark.parametrize("family", TINY)
def test_labels_matter_and_null_is_the_default(family):
    network = awake(tiny(family, num_classes=3)).eval()
    x, noise = torch.randn(2, 1, 8, 8), torch.rand(2)
    labelled = network(x, noise, torch.tensor([1, 3]))
    other = network(x, noise, torch.tensor([2, 3]))
    assert not torch.allclose(labelled[0], other[0])
    torch.testing.assert_close(labelled[1], network(x, noise)[1])
    unconditional = tiny(family)
    assert torch.equal(unconditional(x, noise, torch.tensor([1, 0])), unconditional(x, noise))


@pytest.mark.parametrize("family", TINY)
def test_same_seed_same_weights(family):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in tiny(family).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- SongUNet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_song_uses_every_parameter(encoder, decoder, embedding):
    taps = [1, 3, 3, 1] if embedding == "fourier" else [1, 1]
    network = awake(
        song(
            encoder_type=encoder,
            decoder_type=decoder,
            embedding_type=embedding,
            resample_filter=taps,
            label_dim=2,
            augment_dim=4,
        )
    )
    x, noise = batch(network)
    output = network(x, noise, torch.tensor([0, 1, 2]), augment_labels=torch.randn(3, 4))
    assert output.shape == (3, 3, 8, 8)
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_song_takes_one_hot_labels():
    network = awake(song(label_dim=3))
    x, noise = batch(network)
    label = torch.tensor([2, 0, 3])
    vector = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 0]])
    assert torch.equal(network(x, noise, label), network(x, noise, vector))


def test_song_label_dropout_gives_the_null_label():
    network = awake(song(label_dim=3, label_dropout=1.0))
    x, noise = batch(network)
    label = torch.tensor([0, 1, 2])
    assert torch.equal(network(x, noise, label), network(x, noise))
    network.eval()
    assert not torch.allclose(network(x, noise, label), network(x, noise))


def test_song_without_augment_input_ignores_augment_labels():
    x, noise = batch(None)
    label = torch.randn(3, 9)
    deaf, hearing = awake(song()), awake(song(augment_dim=9))
    assert torch.equal(deaf(x, noise, augment_labels=label), deaf(x, noise))
    assert not torch.allclose(hearing(x, noise, augment_labels=label), hearing(x, noise))


def test_song_attention_sits_where_published():
    network = song(num_blocks=2, channel_mult=[1, 1, 1], attn_resolutions=[4])
    attending = [name for name, block in network.blocks().items() if hasattr(block, "qkv")]
    assert attending == ["enc.4x4_block0", "enc.4x4_block1", "dec.2x2_in0", "dec.4x4_block2"]


def test_song_resampling_keeps_constants_and_inverts_on_them():
    from study.backbones.songunet import Conv

    for taps in ((1, 1), (1, 3, 3, 1)):
        up, down = (Conv(2, 2, 0, resample=way, taps=taps) for way in ("up", "down"))
        flat = torch.full((1, 2, 12, 12), 3.0)
        inner = down(flat)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.full_like(inner, 3.0))
        inner = up(flat)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.full_like(inner, 3.0))


def test_song_fast_resampling_equals_its_filter():
    from study.backbones.songunet import Conv

    for way in ("up", "down"):
        for kernel in (0, 1, 3):
            fast = Conv(4, 4, kernel, resample=way, taps=(2, 2))
            slow = Conv(4, 4, kernel, resample=way, taps=(2, 2))
            slow.load_state_dict(fast.state_dict())
            assert fast.boxed
            slow.boxed = False
            x = torch.randn(2, 4, 6, 6)
            torch.testing.assert_close(fast(x), slow(x))


def test_song_starts_as_published():
    network = song(model_channels=32, label_dim=3)
    block = network.dec["4x4_block1"]

    def bound(weight):
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
        return weight.abs().max().item() / (6 / (fan_in + fan_out)) ** 0.5

    assert bound(block.conv0.weight) == pytest.approx(1, rel=0.02)
    assert bound(block.affine.weight) == pytest.approx(1, rel=0.02)
    assert bound(block.qkv.weight) == pytest.approx(0.2**0.5, rel=0.02)
    for quiet in (block.conv1, block.proj, network.dec["8x8_aux_conv"]):
        assert bound(quiet.weight) == pytest.approx(1e-5, rel=0.02)
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert biases and not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"encoder_type": "resid"}, ValueError, "encoder_type"),
        ({"decoder_type": "residual"}, ValueError, "decoder_type"),
        ({"embedding_type": "sine"}, ValueError, "embedding_type"),
        ({"channel_mult": []}, ValueError, "channel_mult"),
        ({"img_resolution": 12, "channel_mult": [1, 1, 1, 1]}, ValueError, "multiple of 8"),
        ({"resample_filter": [1, 2, 1]}, ValueError, "even number of taps"),
        ({"model_channels": 3}, ValueError, "cannot be normalised|must be even"),
        ({"model_channels": 70}, ValueError, "cannot be normalised"),
        ({"depth": 3}, TypeError, "depth"),
    ],
)
def test_song_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        song(**changes)


# --- Patched U-Net -----------------------------------------------------------------------------


def test_patches_are_ordered_row_column_colour():
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = to_patches(images, 2)
    assert patches.shape == (1, 8, 2, 3)
    corner = images[0, :, 2:4, 4:6]
    expected = [corner[c, i, j] for i in range(2) for j in range(2) for c in range(2)]
    assert patches[0, :, 1, 2].tolist() == [int(value) for value in expected]
    assert torch.equal(from_patches(patches, 2), images)


def test_position_code():
    code = position_code(8, 4, 4)
    assert code.shape == (1, 8, 4, 4)
    across, down = code[0, :4], code[0, 4:]
    torch.testing.assert_close(across, down.transpose(1, 2))
    for channel in range(4):
        for column in range(4):
            angle = column * 64 / 4 * 10000 ** (-channel / 3)
            expected = torch.sin(torch.tensor(angle)).expand(4)
            torch.testing.assert_close(across[channel, :, column], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("new_order", [False, True])
def test_patched_uses_every_parameter(side, updown, new_order):
    network = awake(
        patched(
            image_size=4 * side,
            patch_size=side,
            resblock_updown=updown,
            use_new_attention_order=new_order,
            num_heads=2,
            num_heads_upsample=4,
            num_classes=3,
            attention_resolutions=[1, 2],
            channel_mult=[1, 2] if updown else [1, 3],
        )
    )
    x, noise = batch(network, side=4 * side)
    output = network(x, noise, torch.tensor([0, 1, 3]))
    assert output.shape == (3, 4, 4 * side, 4 * side)
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_patched_attention_orders_differ_only_in_packing():
    old = awake(patched(num_heads=4))
    new = patched(num_heads=4, use_new_attention_order=True)
    state = old.state_dict()
    for name, tensor in state.items():
        if ".qkv." in name:
            heads = tensor.view(4, 3, -1, *tensor.shape[1:])
            state[name] = heads.transpose(0, 1).reshape(tensor.shape)
    new.load_state_dict(state)
    x, noise = batch(old)
    torch.testing.assert_close(old(x, noise), new(x, noise))


def test_patched_heads():
    network = patched(
        num_heads=2, num_heads_upsample=8, attention_resolutions=[1, 2], channel_mult=[1, 2]
    )
    heads = {
        name: module.heads for name, module in network.named_modules() if hasattr(module, "heads")
    }
    assert heads.pop("middle_block.1") == 2
    assert {name: count for name, count in heads.items() if count == 2} == {
        "input_blocks.1.1": 2,
        "input_blocks.3.1": 2,
    }
    assert set(heads) == {"input_blocks.1.1", "input_blocks.3.1"} | {
        f"output_blocks.{i}.1" for i in range(4)
    }
    by_width = patched(num_head_channels=16)
    assert by_width.middle_block[1].heads == 4


def test_patched_attention_resolutions_and_rates():
    options = {"patch_size": 2, "model_channels": 32, "channel_mult": (1, 1, 1)}
    options |= {"num_res_blocks": 1, "attention_resolutions": (8, 2, 16)}
    spec = {"family": "patch_unet", "options": full("patch_unet", options)}
    ours = build(spec, PLAIN, resolution=16, channels=2, out_channels=4)
    same = patched(image_size=16, channel_mult=[1, 1, 1], attention_resolutions=[1, 4])
    assert list(ours.state_dict()) == list(same.state_dict())


def test_patched_variance_head_leaves_the_trunk_alone():
    network = awake(patched(out_channels=4))
    x, noise = batch(network)
    x.requires_grad_()
    variance = network(x, noise)[:, 2:]
    assert variance.min() > 0 and variance.max() < 1
    variance.sum().backward()
    touched = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {
        n for n, _ in network.named_parameters() if n.startswith(("variance_output", "time_embed"))
    }
    assert x.grad is None or not x.grad.any()


def test_patched_without_null_label():
    network = patched(num_classes=3, classifier_free=False)
    assert network.label_embs.num_embeddings == 3
    x, noise = batch(network)
    with pytest.raises(ValueError, match="no null label"):
        network(x, noise)
    assert patched(num_classes=3).label_embs.num_embeddings == 4


def test_patched_fractional_widths():
    network = patched(model_channels=64, channel_mult=[1, 1.5, 2], image_size=16)
    widths = [shape.width for shape in network.long_skips.shapes]
    assert widths == [64, 64, 96, 96, 128, 128]
    wide = patched(model_channels=64, channel_mult=[1.5, 2], out_channels=2, num_classes=2)
    assert wide.label_embs.embedding_dim == 96
    x, noise = batch(wide)
    assert wide(x, noise, torch.tensor([0, 1, 2])).shape == x.shape


def test_patched_fixed_resampling():
    network = awake(patched(conv_resample=False, channel_mult=[1, 1]))
    assert not any(".op." in name or ".conv." in name for name in network.state_dict())
    x, noise = batch(network)
    assert network(x, noise).shape == (3, 4, 8, 8)


def test_patched_starts_as_published():
    network = patched(num_classes=2, out_channels=2)
    zero = {name for name, p in network.named_parameters() if not p.any()}
    ends = (".emb_layers.weight", ".out_layers.2.weight", ".proj_out.weight", "out.2.weight")
    weights = {name for name in zero if name.endswith("weight")}
    assert weights == {name for name, _ in network.named_parameters() if name.endswith(ends)}
    x, noise = batch(network)
    assert not network(x, noise).any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"channel_mult": [2, 1], "out_channels": 2}, ValueError, "must not decrease"),
        ({"channel_mult": [2, 4]}, ValueError, r"channel_mult\[0\] = 1"),
        ({"use_scale_shift_norm": False}, ValueError, "use_scale_shift_norm"),
        ({"dims": 3}, ValueError, "dims"),
        ({"conv_resample": False}, ValueError, "conv_resample"),
        ({"model_channels": 48}, ValueError, "multiple of 32"),
        ({"num_heads": 3}, ValueError, "num_heads 3"),
        ({"num_head_channels": 24}, ValueError, "num_head_channels 24"),
        ({"image_size": 10}, ValueError, "multiple of 4"),
        ({"channel_mult": []}, ValueError, "channel_mult"),
        ({"depth": 3}, TypeError, "depth"),
    ],
)
def test_patched_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        patched(**changes)


def test_patched_refuses_missing_arguments_and_augmentation_labels():
    with pytest.raises(TypeError, match="model_channels"):
        official.patch_unet(image_size=8, in_channels=3)
    with pytest.raises(UserError, match="augmentation labels"):
        tiny("patch_unet", augment_dim=9)
