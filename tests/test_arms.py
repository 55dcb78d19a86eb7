"""Runs are named from their settings alone."""

import copy
import re

import pytest
import torch
from miniature import base, measured

from study.arms import remarks, runs
from study.backbones import build
from study.files import UserError
from study.skips import Gate, constant_factors
from study.spec.backbones import FAMILIES
from study.spec.run import RUN_PATTERN, Backbone, Seeds
from study.spec.scalings import SkipScaling, same_factors
from study.spec.study import load

OTHER = {"depth": 8}


def names(content: dict) -> set[str]:
    return set(runs(load(content)))


def changed(**changes) -> dict:
    content = copy.deepcopy(base())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            content[section] = {**content[section], name: value}
        else:
            content[section] = value
    return content


def test_names_are_readable_and_match_the_pattern():
    for name in names(base()):
        assert re.fullmatch(RUN_PATTERN, name)
        assert name.startswith(("uvit-none-dsm-s0-", "uvit-ls-dsm-s0-"))


def test_order_layout_and_spelling_of_numbers_keep_names():
    other = changed(training={"lr": 0.001, "batch": 8, "steps": 10})
    other["grid"]["skip_scaling"] = ["ls", {"method": "none"}]
    assert names(other) == names(base())


def test_defaults_written_out_keep_names():
    other = changed(training__weight_decay=0.0, training__betas=[0.9, 0.999])
    other["formulation"] = {"kind": "edm", "P_mean": -1.2}
    assert names(other) == names(base())


def test_what_cannot_change_numbers_keeps_names():
    other = changed(
        title="another",
        machine={"gpus": 4, "threads": 8, "micro_batch": 2, "log_every": 1},
        dataset__note="a note",
        **measured(seeds=7, metrics=["fd"]),
    )
    other["backbones"] = {"vit": {"family": "uvit", "preset": "tiny"}}
    other["grid"]["backbone"] = ["vit"]
    assert names(other) == names(base())


def test_every_setting_that_changes_numbers_changes_names():
    for other in (
        changed(training__lr=2e-3),
        changed(training__attention="math"),
        changed(training__precision="bf16"),
        changed(dataset__max_images=100),
        changed(formulation={"kind": "edm", "sigma_data": 0.6}),
        changed(backbones={"uvit": {"preset": "tiny", "noise_scale": 2.0}}),
        changed(backbones={"uvit": {"preset": "tiny", "options": {"depth": 8}}}),
        changed(seed=[1]),
        changed(seed=[{"noise": 1}]),
    ):
        assert not names(other) & names(base())


def test_adding_and_removing_arms_leaves_the_others():
    more = changed(arms=[{"backbone": "uvit", "skip_scaling": "cs(0.5)", "name": "new"}])
    assert names(base()) < names(more)
    assert len(names(more)) == len(names(base())) + 1
    renamed = changed(arms=[{"backbone": "uvit", "skip_scaling": "cs(0.5)", "name": "other"}])
    assert names(renamed) == names(more)


def displays(content: dict) -> list[str]:
    return [run.display for run in runs(load(content)).values()]


@pytest.mark.parametrize(
    "scalings",
    [
        ["cs(1)", "ls"],
        ["cs(1.0)", "none", "ls"],
        [{"method": "cs", "exponent": "normalised", "innermost": 0}, "ls"],
        [{"method": "cs", "exponent": "per_level"}, "ls"],  # U-ViT's skips are on one level
    ],
)
def test_factors_of_one_are_no_scaling(scalings):
    other = changed()
    other["grid"]["skip_scaling"] = scalings
    assert names(other) == names(base())


@pytest.mark.parametrize("preset", ["tiny", "cifar10", "one", "wide"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scalings_are_one_where_the_network_has_one(name, preset):
    kind = FAMILIES[name]
    options = {**kind.presets["tiny"]}
    if preset == "cifar10":
        options = kind.presets.get(preset, {})
    elif preset == "one":
        options |= {"uvit": {"depth": 2}}.get(name, {})
    elif preset == "wide":
        options |= {"ddpmpp": {"channel_mult": (2, 4)}, "ncsnpp": {"channel_mult": (2, 4)}}.get(
            name, {}
        )
    checked = kind.options.model_validate(options)
    size = {"resolution": 32, "channels": 3}
    entry = Backbone(family=name, options=checked)
    scalings = {text: SkipScaling(method=text) for text in ("none", "ls", "ls_unshared")}
    for exponent in ("per_skip", "per_level"):
        scalings[exponent] = SkipScaling(method="cs", kappa=0.5, exponent=exponent)
    with torch.device("meta"):
        skips = {text: build(entry, one, **size).long_skips for text, one in scalings.items()}

    def gates(text: str) -> int:
        return sum(isinstance(module, Gate) for module in skips[text].gates.modules())

    shapes = checked.skip_shapes()
    assert [level for _, level in shapes] == [shape.level for shape in skips["none"].shapes]
    plain = same_factors(SkipScaling(method="ls_unshared"), shapes).method
    assert (plain == "ls") == (gates("ls") == gates("ls_unshared"))
    for exponent in ("per_skip", "per_level"):
        chosen = SkipScaling(method="cs", kappa=0.5, exponent=exponent)
        same = same_factors(chosen, shapes)
        assert constant_factors(same, [level for _, level in shapes]) == (skips[exponent].factors)
        assert (same.method == "none") == (set(skips[exponent].factors) == {1.0})


def test_a_network_that_cannot_tell_two_scalings_apart_has_one_arm():
    content = changed(backbones={"udit": {"preset": "tiny"}})
    content["grid"] = {"backbone": ["udit"], "skip_scaling": ["none", "ls", "ls_unshared"]}
    assert displays(content) == ["udit · none · dsm", "udit · ls · dsm"]
    assert remarks(load(content)) == [
        "udit: ls_unshared is ls on its long skips; the two are one arm"
    ]


def test_the_order_of_splits_and_models_that_are_the_default_keep_names():
    split = changed(formulation={"kind": "ddpm", "splits": [4.0, 0.25]})
    assert names(changed(formulation={"kind": "ddpm", "splits": [0.25, 4.0]})) == names(split)
    same = [{"split": 0}, {"split": 1, "lr": 1e-3}, {"split": 2, "steps": 10}]
    listed = changed(formulation=split["formulation"], training__models=same)
    assert names(listed) == names(split)
    turned = changed(formulation=split["formulation"], training__models=same[::-1])
    assert not names(turned) & names(split)


def test_a_fixed_average_is_another_setting_than_the_default():
    fixed = changed(training__ema={"rate": 0.9999})
    assert not names(fixed) & names(base())
    assert names(changed(training__ema={"rate": 0.9999, "rampup": 0.05})) == names(base())


def test_arms_that_differ_have_displays_that_differ():
    content = changed()
    content["grid"] = {
        "backbone": ["uvit"],
        "target": ["stf(64)", "stf(128)"],
        "formulation": ["edm", {"kind": "edm", "sigma_data": 0.7}, "ve"],
    }
    assert displays(content) == [
        f"uvit · none · stf · reference={size} · {process}"
        for process in ("kind=edm", "kind=edm · sigma_data=0.7", "kind=ve")
        for size in (64, 128)
    ]
    content["grid"] = {"backbone": ["uvit"], "training": [{"lr": 1e-3}, {"lr": 1.00000001e-3}]}
    assert len(set(displays(content))) == 2


def test_one_setting_has_one_name_and_one_name_one_setting():
    twice = [{"backbone": "uvit", "name": "first"}, {"backbone": "uvit", "name": "second"}]
    with pytest.raises(UserError, match=r"^arms\[1\].name: 'second' has the settings of arms\[0\]"):
        runs(load(changed(arms=twice)))
    seeds = [{**arm, "seed": [number]} for number, arm in enumerate(twice)]
    with pytest.raises(UserError, match="'second' has the settings of"):
        runs(load(changed(arms=seeds)))
    other = [{"backbone": "uvit", "name": "a"}, {"backbone": "uvit", "name": "a", "options": OTHER}]
    with pytest.raises(UserError, match=r"^arms\[1\].name: 'a' is the name of arms\[0\], whose"):
        runs(load(changed(arms=other)))


def test_a_name_is_that_of_every_seed_of_the_arm():
    arm = {"backbone": "uvit", "name": "mine", "seed": [0]}
    assert displays(changed(arms=[arm], seed=[0, 1]))[:2] == ["mine", "mine"]


def test_equal_arms_are_told():
    arm = {"backbone": "uvit", "skip_scaling": "inv_sqrt2"}
    assert remarks(load(changed(arms=[arm]))) == []
    told = "uvit · inv_sqrt2 · dsm is described more than once, which makes one arm"
    assert remarks(load(changed(arms=[arm, arm]))) == [told]
    grids = changed()
    grids["grid"] = [grids["grid"], grids["grid"]]
    (line,) = remarks(load(grids))
    assert line == "uvit · none · dsm and 1 more are described more than once, which makes one arm"
    named = {"backbone": "uvit", "skip_scaling": "ls", "name": "mine"}
    assert remarks(load(changed(arms=[named]))) == []


def test_arms_with_equal_settings_are_one_and_the_explicit_name_wins():
    content = changed(arms=[{"backbone": "uvit", "skip_scaling": "ls", "name": "mine"}])
    found = runs(load(content))
    assert set(found) == names(base())
    assert [run.display for run in found.values() if "-ls-" in run.name] == ["mine"]
    assert all(run.grid for run in found.values())


def test_seeds_share_an_arm_and_set_every_axis():
    found = list(runs(load(changed(seed=[0, {"data": 1, "init": 2}]))).values())
    assert len({run.arm for run in found}) == 2
    assert len(found) == 4
    assert Seeds(data=1, init=2) in [run.spec.seeds for run in found]


def test_extra_arms_are_told_apart_on_the_axes():
    arm = {"backbone": "uvit", "options": {"depth": 8}, "training": {"lr": 5e-3}}
    extra = [run for run in runs(load(changed(arms=[arm]))).values() if not run.grid]
    assert extra[0].axes["backbone"] == "uvit(depth=8)"
    assert extra[0].axes["training"] == "lr=0.005"


def test_grids_can_be_several_and_vary_training():
    content = changed()
    content["grid"] = [
        content["grid"],
        {"backbone": ["uvit"], "training": [{"lr": 1e-2}, {"lr": 1e-1}], "seed": [5]},
    ]
    assert len(names(content)) == 4


def test_canonical_form_leaves_defaults_out():
    spec = next(iter(runs(load(base())).values())).spec
    assert spec.chosen["training"] == {
        "steps": 10,
        "batch": 8,
        "lr": 0.001,
    }
    assert spec.chosen["formulation"] == {"kind": "edm"}
