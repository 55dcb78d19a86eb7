"""Runs are named from their settings alone."""

import copy
import re

from miniature import base

from study.arms import RUN_PATTERN, canonical, runs
from study.config import load


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
        generation__seed=7,
        evaluation__metrics=["fd"],
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


def test_kappa_of_an_unscaled_arm_does_not_matter():
    plain = changed()
    plain["grid"]["skip_scaling"] = [{"method": "none", "kappa": 0.3}, "ls"]
    assert names(plain) == names(base())


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
    assert {"data": 1, "init": 2, "noise": 0} in [run.spec["seeds"] for run in found]


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
    assert canonical(spec)["training"] == {
        "steps": 10,
        "batch": 8,
        "lr": 0.001,
    }
    assert canonical(spec)["formulation"] == {"kind": "edm"}
