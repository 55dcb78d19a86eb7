"""The token backbones: U-ViT (with ScaleLong's options) and U-DiT."""

import copy
import inspect

import pytest
import torch
from torch.nn import functional

from study.backbones import build as build_backbone
from study.backbones.udit import RepFFN, rotary_table, rotate
from study.files import UserError
from study.parity import official
from study.spec.backbones import FAMILIES
from study.spec.base import implementation
from study.spec.run import Backbone
from study.spec.scalings import SkipScaling

FAMILY = ("uvit", "udit")
PLAIN = {"method": "none"}
CS = {"method": "cs", "kappa": 0.5, "exponent": "per_skip"}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def preset(family, name, **changes):
    model, presets = FAMILIES[family].options, FAMILIES[family].presets
    return {"family": family, "options": model(**{**presets[name], **changes}).model_dump()}


def build(spec, scaling, **size):
    """The network; of the scaling, keys that only ``cs`` has are left out of the others."""
    scaling = scaling if scaling["method"] == "cs" else {"method": scaling["method"]}
    return build_backbone(Backbone.read(spec), SkipScaling(**scaling), **size)


def tiny(family, scaling=PLAIN, changes=None, **kwargs):
    spec = preset(family, "tiny", **(changes or {}))
    return build(spec, scaling, **{"resolution": 8, "channels": 1, **kwargs})


def awake(network):
    """Every parameter redrawn, so that no branch stays at its zero initial value."""
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return network


def batch(channels=1, size=8, count=3):
    x = torch.randn(count, channels, size, size)
    return x, torch.tensor([3.0, 500.5, 999.0])[:count]


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


# --- The official implementations --------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "resolution", "channels", "out_channels", "classes", "parameters"),
    [
        ("uvit", "cifar10-S2", 32, 3, 3, 0, 44_255_328),
        ("uvit", "celeba64-S4", 64, 3, 3, 0, 44_292_228),
        ("uvit", "imagenet64-M4", 64, 3, 3, 1000, 130_940_292),
        ("uvit", "imagenet64-L4", 64, 3, 3, 1000, 286_827_652),
        ("uvit", "imagenet256-L2", 32, 4, 4, 1000, 286_763_172),
        ("uvit", "imagenet256-H2", 32, 4, 4, 1000, 500_832_016),
        ("uvit", "imagenet512-L4", 64, 4, 4, 1000, 286_861_524),
        ("uvit", "imagenet512-H4", 64, 4, 4, 1000, 500_942_656),
        ("uvit", "mscoco-S2", 32, 4, 4, 0, 44_692_644),
        ("uvit", "mscoco-S2-deep", 32, 4, 4, 0, 58_345_636),
        ("udit", "S", 32, 4, 8, 1000, 58_896_568),
        ("udit", "B", 32, 4, 8, 1000, 231_251_304),
        ("udit", "L", 32, 4, 8, 1000, 916_335_304),
    ],
)
def test_published_parameter_counts(
    family, name, resolution, channels, out_channels, classes, parameters
):
    with torch.device("meta"):
        network = build(
            preset(family, name),
            PLAIN,
            resolution=resolution,
            channels=channels,
            out_channels=out_channels,
            num_classes=classes,
        )
    assert count(network) == parameters


@pytest.mark.parametrize(
    ("code", "parameters"), [(1, 44_255_328), (3, 44_263_825), (4, 44_306_310)]
)
def test_scalelong_parameter_counts(code, parameters):
    with torch.device("meta"):
        network = official.uvit(
            img_size=32, patch_size=2, embed_dim=512, num_heads=8, scalelong=code, kappa=0.5
        )
    assert count(network) == parameters


def test_ours_for_cifar10_is_about_as_large_as_the_u_vit():
    with torch.device("meta"):
        network = build(preset("udit", "cifar10"), PLAIN, resolution=32, channels=3)
    assert 40e6 < count(network) < 60e6


def test_official_scalelong_codes():
    arguments = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 6, "num_heads": 2}
    factors = {
        code: official.uvit(**arguments, scalelong=code, kappa=0.5).long_skips.factors
        for code in range(5)
    }
    assert factors[0] == [1.0, 1.0, 1.0]
    assert factors[1] == [2**-0.5] * 3
    assert factors[2] == [1.0, 0.5, 0.25]
    assert factors[3] is None
    assert factors[4] is None


def test_official_arguments_without_effect_are_accepted():
    arguments = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
    torch.manual_seed(3)
    plain = official.uvit(**arguments)
    torch.manual_seed(3)
    other = official.uvit(
        **arguments, qk_scale=7.0, norm_layer="torch.nn.LayerNorm", use_checkpoint=True
    )
    x, noise = batch(channels=3)
    assert torch.equal(plain(x, noise), other(x, noise))


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (official.uvit, {"depht": 4}, "depht"),
        (official.uvit, {"norm_layer": "torch.nn.GroupNorm"}, "LayerNorm"),
        (official.uvit, {"scalelong": 5}, "scalelong"),
        (official.uvit, {"scalelong": 3, "skip": False}, "skip is false"),
        (official.udit, {"image_size": 32}, "image_size"),
        (official.udit, {"downsampler": None}, "dwconv"),
        (official.udit, {"downsampler": "dwconv5", "ffn_type": "moe"}, "ffn_type"),
    ],
)
def test_official_mistakes_are_named(network, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        network(**arguments)


# --- Both families -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY)
def test_defaults_of_the_options_are_those_of_the_network(family):
    network = implementation(FAMILIES[family].network)
    options = FAMILIES[family].options().model_dump()
    given = inspect.signature(network).parameters
    told = {key: given[key].default for key in options if key in given}
    told = {key: value for key, value in told.items() if value is not inspect.Parameter.empty}
    assert len(told) > 5
    assert told == {key: options[key] for key in told}


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("method", ["none", "inv_sqrt2", "cs", "ls", "ls_unshared"])
@pytest.mark.parametrize("classes", [0, 10])
def test_tiny_networks_train(family, method, classes):
    network = awake(tiny(family, {**CS, "method": method}, out_channels=2, num_classes=classes))
    assert 100_000 < count(network) < 300_000
    x, noise = batch()
    label = torch.tensor([0, 9, 10]) if classes else None
    output = network(x, noise, label)
    assert output.shape == (3, 2, 8, 8)
    assert output.dtype == torch.float32
    output.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", FAMILY)
def test_attention_kinds_agree(family):
    fused = awake(tiny(family, attention="sdpa"))
    plain = tiny(family, attention="math")
    plain.load_state_dict(fused.state_dict())
    x, noise = batch()
    torch.testing.assert_close(fused(x, noise), plain(x, noise), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILY)
def test_checkpointing_changes_no_number(family):
    usual = awake(tiny(family, {**CS, "method": "ls"})).train()
    saving = tiny(family, {**CS, "method": "ls"}, checkpointing=True).train()
    saving.load_state_dict(usual.state_dict())
    calls = []
    block = next(iter(saving.blocks().values()))
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    x, noise = batch()
    gradients = []
    for network in (usual, saving):
        network(x, noise).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert len(calls) == 2, "the block was not recomputed in the backward pass"
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILY)
def test_long_skips_are_scaled_and_seen_by_probes(family):
    network = awake(tiny(family, CS))
    blocks = network.blocks()
    encoder = [name for name in blocks if name.startswith(("in_blocks", "encoder"))]
    outputs, seen = {}, []
    for name in encoder:
        blocks[name].register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.setdefault(name, output)
        )
    network.long_skips.observer = lambda index, main, skip, scaled, gate: seen.append(
        (index, skip, scaled, gate)
    )
    x, noise = batch()
    network(x, noise)
    total = len(network.long_skips)
    assert [index for index, *_ in seen] == list(range(total, 0, -1))
    assert len(network.decoder_blocks()) == total
    for index, skip, scaled, gate in seen:
        assert gate is None
        torch.testing.assert_close(scaled, 0.5 ** (index - 1) * skip)
    outermost = seen[-1][1]
    assert torch.equal(outermost, outputs[encoder[0]])


@pytest.mark.parametrize("family", FAMILY)
def test_blocks_are_state_dict_prefixes_in_order_of_execution(family):
    network = awake(tiny(family))
    called = []
    for name, block in network.blocks().items():
        assert network.get_submodule(name) is block
        block.register_forward_hook(lambda *_, name=name: called.append(name))
    network(*batch())
    assert called == list(network.blocks())


@pytest.mark.parametrize("family", FAMILY)
def test_scaling_methods_share_the_initial_weights(family):
    states = []
    for method in ("none", "ls", "ls_unshared"):
        torch.manual_seed(5)
        states.append(tiny(family, {"method": method}).state_dict())
    for other in states[1:]:
        assert set(states[0]) < set(other)
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


@pytest.mark.parametrize("family", FAMILY)
def test_gates_keep_pytorchs_initialisation(family):
    network = tiny(family, {"method": "ls_unshared"})
    for gate in network.se:
        bound = gate.layer1.in_features**-0.5
        assert 0.5 * bound < gate.layer1.weight.abs().max() <= bound
        assert gate.layer1.bias.abs().max() > 0


@pytest.mark.parametrize("family", FAMILY)
def test_no_label_means_the_null_label(family):
    network = awake(tiny(family, num_classes=10))
    x, noise = batch()
    null = network(x, noise, torch.full((3,), 10))
    assert torch.equal(network(x, noise), null)
    assert not torch.allclose(network(x, noise, torch.tensor([0, 1, 2])), null)


@pytest.mark.parametrize(
    ("family", "without_null"),
    [("uvit", {"null_label": False}), ("udit", {"class_dropout_prob": 0.0})],
)
def test_networks_without_null_label_need_labels(family, without_null):
    network = tiny(family, changes=without_null, num_classes=10)
    x, noise = batch()
    network(x, noise, torch.tensor([0, 5, 9]))
    with pytest.raises(ValueError, match="no null label"):
        network(x, noise)


@pytest.mark.parametrize("family", FAMILY)
def test_unconditional_networks_ignore_labels(family):
    network = awake(tiny(family))
    x, noise = batch()
    assert torch.equal(network(x, noise, torch.tensor([0, 1, 2])), network(x, noise))


@pytest.mark.parametrize("family", FAMILY)
def test_half_precision_stays_inside(family):
    network = awake(tiny(family, {"method": "ls"}))
    x, noise = batch()
    exact = network(x, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(x, noise)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("family", "changes", "scaling", "resolution", "message"),
    [
        ("uvit", {"num_heads": 5}, "none", 8, "num_heads 5"),
        ("uvit", {"patch_size": 3}, "none", 8, "patch_size 3"),
        ("uvit", {"skip": False}, "cs", 8, "skip is false"),
        ("uvit", {"patch_size": 4}, "ls", 8, "16"),
        ("udit", {"num_heads": 5}, "none", 8, "num_heads 5"),
        ("udit", {"num_heads": 6}, "none", 8, "rope2d"),
        ("udit", {"down_factor": 2}, "none", 12, "multiple of 8"),
        ("udit", {"down_factor": 2}, "none", 4, "multiple of"),
        ("udit", {"down_factor": 1}, "none", 6, "multiple of 4"),
        ("udit", {"down_factor": 1}, "ls", 4, "16"),
    ],
)
def test_what_cannot_be_is_said_before_and_while_building(
    family, changes, scaling, resolution, message
):
    spec = preset(family, "tiny", **changes)
    model = FAMILIES[family].options(**spec["options"])
    method = SkipScaling(method=scaling)
    problem = model.problem(resolution=resolution, channels=1, scaling=method)
    assert message in problem
    with pytest.raises(UserError, match=message):
        build(spec, {**CS, "method": scaling}, resolution=resolution, channels=1)


@pytest.mark.parametrize("family", FAMILY)
def test_presets_have_no_problem(family):
    for name, options in FAMILIES[family].presets.items():
        model = FAMILIES[family].options(**options)
        for method in ("none", "cs", "ls_unshared"):
            scaling = SkipScaling(method=method)
            resolution = 8 if name == "tiny" else 32
            assert model.problem(resolution=resolution, channels=3, scaling=scaling) is None


@pytest.mark.parametrize("family", FAMILY)
def test_what_the_papers_do_not_have_is_refused(family):
    with pytest.raises(UserError, match="no dropout"):
        tiny(family, dropout=0.1)
    with pytest.raises(UserError, match="augmentation"):
        tiny(family, augment_dim=9)


# --- U-ViT -------------------------------------------------------------------------------------


def test_u_vit_initialisation():
    network = tiny("uvit", changes={"embed_dim": 96, "mlp_time_embed": True}, num_classes=10)
    for name in (
        "in_blocks.0.attn.qkv",
        "out_blocks.1.skip_linear",
        "decoder_pred",
        "time_embed.0",
    ):
        layer = network.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    assert network.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert network.label_emb.weight.std().item() == pytest.approx(1, rel=0.1)
    assert network.patch_embed.proj.bias.any()


def test_u_vit_without_long_skips():
    network = tiny("uvit", changes={"skip": False})
    assert len(network.long_skips) == 0
    assert network.decoder_blocks() == []
    assert not any("skip_linear" in name for name in network.state_dict())


def test_u_vit_reads_text_beside_labels():
    network = awake(tiny("uvit", changes={"context_dim": 5, "context_tokens": 4}, num_classes=10))
    x, noise = batch()
    context = torch.randn(3, 4, 5)
    label = torch.tensor([1, 2, 3])
    tokens = []
    network.in_blocks[0].register_forward_hook(lambda _m, inputs, _o: tokens.append(inputs[0]))
    output = network(x, noise, label, context=context)
    assert not torch.allclose(output, network(x, noise, label, context=context.flip(1)))
    # label, time, four text tokens, 16 patches
    bare = tokens[0] - network.pos_embed
    assert bare.shape[1] == 22
    torch.testing.assert_close(bare[:, 0], network.label_emb(label))
    torch.testing.assert_close(bare[:, 2:6], network.context_embed(context))
    torch.testing.assert_close(bare[:, 6:], network.patch_embed(x))
    with pytest.raises(ValueError, match="context"):
        network(x, noise, label)


def test_u_vit_names_the_images_it_was_built_for():
    network = tiny("uvit")
    with pytest.raises(ValueError, match=r"\(1, 8, 8\)"):
        network(torch.zeros(1, 1, 16, 16), torch.zeros(1))


# --- U-DiT -------------------------------------------------------------------------------------

PUBLISHED = {"ffn_type": "rep", "depth": (1, 1, 1, 1, 1), "downsampler": "dwconv5"}


def test_u_dit_starts_at_zero():
    network = tiny("udit", changes=PUBLISHED, num_classes=10)
    x, noise = batch()
    assert not network(x, noise).any()
    assert network.y_embedder_1.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.2)
    scale = network.latent[0].attn1.logit_scale
    torch.testing.assert_close(scale.exp(), torch.full_like(scale, 10.0))


def test_rep_branches_sum_to_one_kernel():
    ffn = awake(RepFFN(4, 8, rep=True))
    x = torch.randn(2, 4, 6, 6)
    h = functional.gelu(ffn.project_in(x))
    branches = h + sum(branch(h) for branch in ffn.dwconv)
    torch.testing.assert_close(ffn(x), ffn.project_out(branches))


def test_merged_form_gives_the_same_output():
    network = awake(tiny("udit", changes=PUBLISHED, num_classes=10))
    before = copy.deepcopy(network.state_dict())
    network.long_skips.observer = lambda *_: None
    x, noise = batch()
    label = torch.tensor([1, 5, 10])
    merged = network.merged()
    again = network.merged()
    assert network.long_skips.observer is not None
    assert merged.long_skips.observer is None
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert count(merged) < count(network)
    expected = network(x, noise, label)
    for one in (merged, again, merged.merged()):
        torch.testing.assert_close(one(x, noise, label), expected, rtol=1e-4, atol=1e-5)

    awake(network)  # other weights
    assert not torch.allclose(network(x, noise, label), expected, atol=1e-2)
    fresh = network.merged()
    torch.testing.assert_close(
        fresh(x, noise, label), network(x, noise, label), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        merged.load_state_dict(before)


def test_label_drops_are_independent_per_embedder():
    network = awake(tiny("udit", changes={"class_dropout_prob": 0.3}, num_classes=10))
    seen = []
    for index in (1, 2, 3):
        network.get_submodule(f"y_embedder_{index}").register_forward_hook(
            lambda _m, inputs, _o: seen.append(inputs[0].tolist())
        )
    x, noise = batch()
    label = torch.tensor([1, 2, 3])
    uniform = (
        torch.tensor([0.0, 0.5, 0.5]),
        torch.tensor([0.5, 0.29, 0.31]),
        torch.tensor([0.9, 0.9, 0.2]),
    )
    assert len(uniform) == network.label_drops
    network(x, noise, label, label_drop_uniform=uniform)
    assert seen == [[10, 2, 3], [1, 10, 3], [1, 2, 10]]
    seen.clear()
    network.train()(x, noise, label)
    assert seen == [[1, 2, 3]] * 3, "no draws, no drops"


def test_rotary_scores_depend_on_the_offset_only():
    table = rotary_table(3, 4, 8, torch.device("cpu"))
    query, key = torch.randn(1, 1, 1, 1, 8), torch.randn(1, 1, 1, 1, 8)
    rotated = [rotate(vector.expand(1, 12, 1, 1, 8), table) for vector in (query, key)]
    grid = [vector.view(3, 4, 8) for vector in rotated]
    scores = torch.einsum("ijc,klc->ijkl", *grid)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    torch.testing.assert_close(scores[2, 3, 0, 1], scores[2, 2, 0, 0])
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])
    torch.testing.assert_close(rotated[0].norm(dim=-1), query.norm().expand(1, 12, 1, 1))


def test_one_down_factor_is_five_equal_ones():
    torch.manual_seed(1)
    one = awake(tiny("udit", changes={"down_factor": 2}, resolution=16))
    five = tiny("udit", changes={"down_factor": (2, 2, 2, 2, 2)}, resolution=16)
    five.load_state_dict(one.state_dict())
    x, noise = batch(size=16)
    assert torch.equal(one(x, noise), five(x, noise))
    with pytest.raises(UserError, match="level 3 of 5 needs a multiple of 16"):
        build(preset("udit", "tiny", down_factor=(1, 1, 4, 1, 1)), PLAIN, resolution=24, channels=1)


def test_u_dit_runs_on_other_grids_unless_its_gates_are_learned():
    plain = awake(tiny("udit"))
    assert plain(torch.randn(2, 1, 16, 8), torch.zeros(2)).shape == (2, 1, 16, 8)
    with pytest.raises(ValueError, match="10x8"):
        plain(torch.randn(2, 1, 10, 8), torch.zeros(2))
    gated = tiny("udit", {"method": "ls"})
    with pytest.raises(ValueError, match="8x8"):
        gated(torch.randn(2, 1, 16, 16), torch.zeros(2))
