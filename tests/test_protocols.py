"""Protocols: which measurements they make of which runs, and what a mistake in one is told."""

import re

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from miniature import base, measured, protocol

from study import arms
from study.files import UserError
from study.spec.measuring import MEASUREMENT_PATTERN, Measurement, Only, Protocol
from study.spec.study import load, schema

CONDITIONAL = {"training": {"steps": 10, "batch": 8, "lr": 1e-3, "conditional": True}}
GUIDED = {"training": {**CONDITIONAL["training"], "label_dropout": 0.1}}
CURVE = {"training": {"steps": 10, "batch": 8, "lr": 1e-3, "snapshots": 4}}
"""Snapshots at steps 4, 8 and, as always, at the last one, 10."""


def resolved(*sections: dict, **protocols: dict) -> dict[str, arms.Run]:
    """The runs of the smallest study with other sections, and with these protocols if any."""
    content = base()
    for section in sections:
        content |= section
    if protocols:
        content["protocols"] = protocols
    return arms.runs(load(content))


def planned(*sections: dict, **protocols: dict) -> list:
    """The measurements of the first run."""
    return list(next(iter(resolved(*sections, **protocols).values())).measurements)


def names(*sections: dict, **protocols: dict) -> list[str]:
    return [one.name for one in planned(*sections, **protocols)]


def told(*sections: dict, **protocols: dict) -> str:
    """The one line that a study is refused with."""
    with pytest.raises(UserError) as caught:
        resolved(*sections, **protocols)
    (line,) = str(caught.value).splitlines()
    return line


def digits_and(**others: dict) -> dict:
    """A study of several data sets: the digits, and others."""
    return {"dataset": None, "datasets": {"digits": {"source": "digits"}, **others}}


def without(content: dict, *keys: str) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


# --- axes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "keys", "count"),
    [
        ([], {}, 1),
        ([], {"seeds": [0, 50_000, 100_000]}, 3),
        ([], {"sampler": {"kind": "edm_heun", "steps": [3, 5, 9]}}, 3),
        ([], {"sampler": ["edm_heun", {"kind": "dpm_solver", "steps": 10}]}, 2),
        ([], {"images": [500, None]}, 2),
        ([], {"weights": ["ema", "raw"]}, 2),
        ([GUIDED], {"guidance": [None, 1.5, {"scale": 3.0, "channels": 1}]}, 3),
        ([CONDITIONAL], {"labels": ["data", "uniform", 3, {"classes": [1, 7]}]}, 4),
        ([CURVE], {"at": "snapshots"}, 3),
        ([CURVE], {"at": [4, "final"], "weights": "ema", "images": [100, 200]}, 4),
        ([GUIDED], {"guidance": [1.5, 2.0], "seeds": [0, 1], "images": [100, 200]}, 8),
        # One extractor more is no other measurement: the same samples serve all.
        ([], {"extractors": ["digits", "pixels"]}, 1),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_list_is_an_axis(sections, keys, count):
    found = planned(*sections, **measured(**keys)["protocols"])
    assert len(found) == len({one.name for one in found}) == count
    assert len({one.cell.key for one in found}) == count


def test_the_main_measurement_is_the_first_cell_of_final_else_of_the_first_by_name():
    several, one = protocol(seeds=[7, 8], images=[300, 100]), protocol(seeds=7, images=100)
    for found in (planned(a=several, b=one), planned(b=one, a=several)):
        assert (found[0].cell.seed, found[0].cell.images) == (7, 300)
        assert [each.protocols for each in found] == [("a",), ("a",), ("a", "b"), ("a",)]
    found = planned(a=several, final=one)
    assert (found[0].cell.images, found[0].protocols) == (100, ("final", "a"))


def test_steps_are_those_of_the_weights():
    found = planned(CURVE, **measured(at=["snapshots", "final"])["protocols"])
    assert [(one.step, one.last, one.cell.at) for one in found] == [
        (10, True, "final"),
        (8, False, 8),
        (4, False, 4),
    ]
    (last,) = planned(CURVE, **measured(at=10)["protocols"])
    assert last.name == found[0].name


def test_a_row_of_the_manifest_says_everything_of_a_measurement():
    (run, *_) = resolved(GUIDED, **measured(guidance=1.5, seeds=3)["protocols"]).values()
    (row,) = run.row()["measurements"]
    assert row == {
        "measurement": run.measurements[0].name,
        "protocols": ["final"],
        "step": 10,
        "last": True,
        "best_of": "",
        "images": 1797,
        "cell": {
            "at": "final",
            "weights": "ema",
            "sampler": row["cell"]["sampler"],
            "guidance": {"kind": "edm", "scale": 1.5, "channels": None},
            "images": None,
            "seed": 3,
            "labels": "data",
            "decoder": None,
        },
        "extractors": {"digits": ["fd", "kid", "is", "prc"]},
    }
    assert row["cell"]["sampler"]["steps"] == 3 and "rho" in row["cell"]["sampler"]


# --- names ---------------------------------------------------------------------------------------

PINNED = {
    "final-edm-heun-18-37e6e247": {"sampler": "edm_heun"},
    "final-edm-heun-3-f9f1b4e8": {},
    "final-dpm-solver-50-raw-30085e4d": {"sampler": "dpm_solver", "weights": "raw"},
    "final-ancestral-dfe22dd2": {"sampler": {"kind": "ancestral", "respacing": "4"}, "images": 64},
    "final-edm-heun-3-g1.5-35e9431d": {"guidance": 1.5},
    "step4-edm-heun-3-c5faa27f": {"at": 4, "seed": 9, "labels": 3},
}
"""Names of measurements as they were given: they name the folders of finished samples."""


def test_names_stay():
    made = {}
    for name, keys in PINNED.items():
        made[name] = Measurement.model_validate({"sampler": protocol()["sampler"], **keys}).name
    assert made == {name: name for name in PINNED}
    assert all(re.fullmatch(MEASUREMENT_PATTERN, name) for name in PINNED)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"guidance": 1.5}, {"guidance": {"scale": 1.5}}),
        ({"guidance": 2}, {"guidance": 2.0}),
        ({"sampler": "edm_heun"}, {"sampler": {"kind": "edm_heun", "steps": 18}}),
        (
            {"sampler": {"steps": 3, "kind": "edm_heun"}},
            {"sampler": {"kind": "edm_heun", "steps": 3, "rho": 7}},
        ),
        ({}, {"at": "final", "weights": "ema", "images": None, "seeds": 0, "labels": "data"}),
        ({"seeds": 4}, {"seeds": [4]}),
        ({"labels": 3}, {"labels": {"classes": [3]}}),
        ({"at": "final"}, {"at": 10}),
        ({"images": None}, {"images": 1797}),
        ({"guidance": 1.5}, {"guidance": {"kind": "edm", "scale": 1.5}}),
        ({"at": "final"}, {"at": ["final", 10]}),
    ],
    ids=str,
)
def test_names_do_not_depend_on_spelling(one, other):
    assert names(GUIDED, first=protocol(**one)) == names(GUIDED, second=protocol(**other))


def test_names_depend_on_nothing_but_their_cell():
    few, many = protocol(images=100), protocol(at="snapshots", seeds=[1, 2])
    here = names(CURVE, few=few, many=many)
    assert names(CURVE, many=many, few=few) == here
    assert names(CURVE, a=many, b=few) == here[1:] + here[:1]
    told_otherwise = {**few, "metrics": ["fd"], "extractors": "pixels", "keep": "none"}
    assert names(CURVE, few=told_otherwise) == here[:1]


def test_every_setting_that_changes_samples_changes_names():
    others = [
        {"at": 4},
        {"weights": "raw"},
        {"sampler": "edm_heun"},
        {"guidance": 1.5},
        {"images": 300},
        {"seeds": 1},
        {"labels": "uniform"},
    ]
    sections = {"training": {**GUIDED["training"], **CURVE["training"]}}
    found = [names(sections, one=protocol(**keys)) for keys in ({}, *others)]
    assert len({name for (name,) in found}) == len(others) + 1


def test_more_protocols_or_extractors_rename_nothing():
    former = resolved()
    more = resolved(
        final=protocol(extractors=["digits", "pixels"]), other=protocol(seeds=1, images=64)
    )
    assert list(more) == list(former)
    for name, run in former.items():
        kept, added = more[name].measurements
        assert kept.name == run.measurements[0].name != added.name


def test_how_latents_are_decoded_is_part_of_the_name_and_where_the_weights_lie_is_not():
    images = {"name": "x", "source": "folder", "path": "x"}
    latents = {"name": "z", "source": "latents", "path": "z", "resolution": 8, "channels": 4}
    latents |= {"reference": images, "labels": False}

    def decoded(weights: str, scale: float) -> list[str]:
        decoder = {"weights": weights, "scale": scale}
        return names(
            {"dataset": {**latents, "decoder": decoder}},
            final=protocol(extractors="pixels", metrics=["fd"]),
        )

    assert decoded("a.pth", 0.5) == decoded("b.pth", 0.5) != decoded("a.pth", 0.25)


# --- protocols together --------------------------------------------------------------------------


def test_two_protocols_of_one_cell_make_one_measurement_that_serves_both():
    first = protocol(metrics=["fd"], keep="none")
    second = protocol(extractors=["pixels", "digits"], metrics=["kid", "fd"], keep="grid")
    (one,) = planned(first=first, second=second)
    assert one.protocols == ("first", "second")
    assert one.extractors == {"digits": ("fd", "kid"), "pixels": ("fd", "kid")}
    assert one.keep == "grid"
    assert planned(second=second, first={**first, "keep": "samples"})[0].keep == "samples"


def test_an_extractor_measures_what_it_can():
    (one,) = planned(**measured(extractors=["pixels", "digits"])["protocols"])
    assert one.extractors == {
        "pixels": ("fd", "kid", "prc"),
        "digits": ("fd", "kid", "is", "prc"),
    }


def test_like_takes_the_rest_from_another_protocol():
    other = protocol(images=64, metrics=["fd"], weights="raw", keep="grid")
    first, second = planned(first=other, second={"like": "first", "seeds": 5, "keep": "none"})
    assert second.cell == first.cell.model_copy(update={"seed": 5})
    assert (second.extractors, second.keep) == (first.extractors, "none")
    # In any order.
    assert names(second={"like": "first", "seeds": 5}, first=other) == [first.name, second.name]


@pytest.mark.parametrize(
    ("protocols", "words"),
    [
        ({"b": {"like": "a"}}, "protocols.b.like: 'a' is no protocol that is written in full"),
        ({"a": protocol(), "b": {"like": "c"}}, "protocols.b.like: 'c' is no protocol that is"),
        ({"a": protocol(), "b": {"like": "c"}}, "written in full; allowed: a"),
        (
            {"a": protocol(), "b": {"like": "a"}, "c": {"like": "b"}},
            "protocols.c.like: 'b' is no protocol that is written in full; allowed: a",
        ),
        ({"a": protocol(), "b": {"like": "b"}}, "protocols.b.like: 'b' is no protocol that"),
        ({"a": protocol(), "b": {"like": ["a"]}}, "protocols.b.like: ['a'] is no protocol that"),
        ({"a": 3, "b": {"like": "c"}}, "protocols.b.like: 'c' is no protocol that is written"),
        (
            {"a": protocol(), "b": {"like": "a", "metrics": ["is"], "extractors": "pixels"}},
            "protocols.b: metrics: 'is' needs class logits, which pixels does not have",
        ),
        (
            {"a": protocol(), "b": protocol(extractors={"kind": "digits", "seed": 1})},
            "protocols.b.extractors: digits has other options than elsewhere; a study "
            "has one extractor of each kind",
        ),
    ],
)
def test_what_protocols_cannot_be_together_is_one_line(protocols, words):
    assert words in told(**protocols)


# --- one protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"at": "best"}, 'at: neither final, snapshots, a step nor best(<protocol>); got "best"'),
        ({"at": 1.5}, "at: neither final, snapshots, a step nor best(<protocol>); got 1.5"),
        ({"at": ["final", None]}, "at[1]: neither final, snapshots, a step nor best(<protocol>)"),
        ({"at": -1}, "at: input should be greater than or equal to 0; got -1"),
        ({"at": 10**6}, "at: uvit · none · dsm keeps no snapshot at step 1000000, but at 10; add"),
        ({"at": {"best": "a", "metrc": "fd"}}, "at.metrc: unknown key; did you mean 'metric'?"),
        ({"weights": "ema1"}, "weights: string should match pattern"),
        ({"weights": "ema2"}, "weights: uvit · none · dsm keeps no ema2 at step 10, but ema, raw"),
        ({"guidance": "1.5"}, 'guidance: neither a number nor a mapping with scale; got "1.5"'),
        ({"guidance": {"kind": "x", "scale": 1.0}}, "guidance.kind: input should be 'edm', 'uvit'"),
        ({"guidance": [1.5, {"scale": 1.5}]}, "guidance: entries 0 and 1 are the same"),
        ({"images": 0}, "images: input should be greater than or equal to 1; got 0"),
        ({"seeds": [0, 0]}, "seeds: entries 0 and 1 are the same; got [0, 0]"),
        ({"seeds": "0"}, "seeds: '0' is text (it stands in quotes); write 0"),
        ({"seeds": []}, "seeds: tuple should have at least 1 item"),
        ({"sampler": {"kind": "edm_heun", "steps": [3, 3]}}, "sampler: entries 0 and 1 are the"),
        ({"sampler": {"kind": "edm_heun", "steps": [3, "5"]}}, "sampler[1].steps: '5' is text"),
        ({"labels": "even"}, "labels: input should be 'data' or 'uniform'; got \"even\""),
        ({"labels": 1.5}, "labels: neither data, uniform, a class nor some classes; got 1.5"),
        ({"labels": -3}, "labels: input should be greater than or equal to 0; got -3"),
        ({"labels": {"classes": []}}, "labels.classes: tuple should have at least 1 item"),
        ({"labels": 3}, "labels: the network is told no class; set training.conditional: true"),
        ({"labels": "uniform"}, "labels: the network is told no class; set training.condi"),
        ({"extractors": "pixel"}, "extractors: kind 'pixel' is unknown; allowed: digits, incep"),
        ({"extractors": {"kind": "digits", "weights": "w"}}, "extractors.weights: unknown key"),
        ({"extractors": ["digits", {"kind": "digits", "seed": 1}]}, "extractors: digits has other"),
        ({"metrics": ["fid"]}, "metrics[0]: input should be 'fd', 'kid', 'is' or 'prc'; got"),
        ({"metrics": []}, "metrics: tuple should have at least 1 item"),
        ({"keep": "all"}, "keep: input should be 'samples', 'grid' or 'none'; got \"all\""),
        ({"only": {"backbon": "uvit"}}, "only.backbon: unknown key; did you mean 'backbone'?"),
        ({"step": 3}, "step: unknown key; "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_in_a_protocol_is_one_line_that_names_its_key(keys, words):
    line = told(**measured(**keys)["protocols"])
    assert f"protocols.final.{words}" in line


def test_a_study_has_a_protocol():
    assert told({"protocols": {}}).startswith("protocols: ")
    with pytest.raises(UserError, match=r"^protocols: missing$"):
        load(without(base(), "protocols"))


def test_raw_weights_of_a_snapshot_are_kept_on_request_alone():
    raw = protocol(at="snapshots", weights="raw")
    line = told(CURVE, final=raw)
    assert line == (
        "protocols.final.weights: uvit · none · dsm keeps no raw at step 8, but ema; "
        "training.snapshots: {every: n, raw: true} keeps raw ones, too"
    )
    asked = {"training": {**CURVE["training"], "snapshots": {"every": 4, "raw": True}}}
    assert len(names(asked, final=raw)) == 3


# --- best ----------------------------------------------------------------------------------------


def test_the_best_snapshot_is_told_by_the_measurements_of_another_protocol():
    curve = protocol(at="snapshots", images=100, metrics=["fd"])
    for protocols in (
        {"curve": curve, "best": protocol(at="best(curve)")},
        {"best": protocol(at={"best": "curve", "metric": "fd"}), "curve": curve},
    ):
        found = {one.name: one for one in planned(CURVE, **protocols)}
        (best,) = (one for one in found.values() if one.protocols == ("best",))
        assert best.name.startswith("best-")
        assert (best.step, best.last) == (None, False)
        assert best.cell.at.model_dump() == {
            "best": tuple(sorted(name for name in found if name != best.name)),
            "extractor": "digits",
            "metric": "fd",
        }


def test_a_longer_curve_has_another_best():
    best = {"curve": protocol(at="snapshots", images=100), "best": protocol(at="best(curve)")}
    more = {"training": {**CURVE["training"], "snapshots": 2}}
    first, *curve = names(CURVE, **best)
    second, *longer = names(more, **best)
    assert first != second
    assert set(curve) < set(longer)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("best(none)", "best(none) needs another protocol, at known snapshots; there are curve"),
        ("best(final)", "best(final) needs another protocol, at known snapshots; there are curve"),
        ({"best": "curve", "metric": "recall"}, "protocol curve does not measure recall with dig"),
        (
            {"best": "curve", "extractor": "pixels"},
            "protocol curve does not measure fd with pixels",
        ),
        ({"best": "curve", "metric": "prc"}, "input should be "),
    ],
)
def test_what_cannot_be_best_is_one_line(at, words):
    curve = protocol(at="snapshots", metrics=["fd"])
    assert words in told(CURVE, final=protocol(at=at), curve=curve)


def test_the_best_of_the_best_is_refused():
    others = {"curve": protocol(at="snapshots"), "b": protocol(at="best(curve)")}
    line = told(CURVE, **others, c=protocol(at="best(b)"))
    assert line.startswith("protocols.c.at: best(b) needs another protocol, at known snapshots")


# --- which runs ----------------------------------------------------------------------------------

MANY = {
    **digits_and(few={"source": "digits", "max_images": 100}),
    "grid": {
        "dataset": ["digits", "few"],
        "backbone": ["uvit", "ddpmpp"],
        "skip_scaling": ["none", "cs(0.7)"],
        "target": ["dsm", "stf(16)"],
        "formulation": ["edm", "vp"],
    },
    "arms": [{"name": "mine", "dataset": "few", "backbone": "uvit", "skip_scaling": "ls"}],
    "backbones": {"uvit": {"preset": "tiny"}, "ddpmpp": {"preset": "tiny"}},
    "seed": [0, 3],
}


@pytest.mark.parametrize(
    ("only", "count"),
    [
        ({}, 66),
        ({"dataset": "few"}, 34),
        ({"backbone": "ddpmpp"}, 32),
        ({"skip_scaling": "cs(0.7)"}, 32),
        ({"target": "stf"}, 32),
        ({"target": "stf(16)"}, 32),
        ({"target": ["stf(16)", "dsm"]}, 66),
        ({"formulation": "vp"}, 32),
        ({"name": "mine"}, 2),
        ({"seed": 3}, 33),
        ({"backbone": "uvit", "skip_scaling": ["none", "ls"], "seed": [0], "dataset": "few"}, 5),
    ],
    ids=str,
)
def test_only_chooses_by_every_key(only, count):
    study = load({**base(), **MANY, "only": only})
    found = arms.runs(study)
    assert len(found) == 66
    assert len(arms.selected(study, found)) == count
    some = {"protocols": {"all": protocol(), "some": protocol(seeds=1, only=only)}}
    runs = resolved(MANY, some)
    assert list(runs) == list(found)
    assert sum(len(run.measurements) == 2 for run in runs.values()) == count


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ({"backbone": "udit"}, "only.backbone: no arm has 'udit'; there are ddpmpp, uvit"),
        ({"dataset": ["few", "x"]}, "only.dataset: no arm has 'x'; there are digits, few"),
        ({"seed": 1}, "only.seed: no arm has 1; there are 0, 3"),
        ({"seed": "0"}, "only.seed: '0' is text (it stands in quotes); write 0"),
        ({"name": "yours"}, "only.name: no arm has 'yours'; there are "),
        ({"target": "stf(8)"}, "only.target: no arm has 'stf(8)'; there are dsm, stf, stf(16)"),
        ({"name": "mine", "backbone": "ddpmpp"}, "only: no arm has all of these values together"),
        ({"arm": "mine"}, "only.arm: unknown key; "),
        (["uvit"], "only: "),
    ],
    ids=str,
)
def test_only_names_what_is_there(only, words):
    if len(only) == 1:  # a protocol may measure no arm of a part of a grid
        assert f"protocols.final.{words}" in told(MANY, **measured(only=only)["protocols"])

    def chosen() -> None:
        study = load({**base(), **MANY, "only": only})
        arms.selected(study, arms.runs(study))

    with pytest.raises(UserError) as caught:
        chosen()
    (line,) = str(caught.value).splitlines()
    assert line.startswith(words)


def test_weights_of_others_have_no_curve_and_nothing_that_is_best_of_it():
    theirs = {"arms": [{"name": "theirs", "backbone": "uvit", "checkpoint": "w.pth"}]}
    curve = protocol(at="snapshots", images=100)
    runs = resolved(
        CURVE, theirs, final=protocol(), curve=curve, best=protocol(at="best(curve)")
    ).values()
    counts = {run.display: len(run.measurements) for run in runs}
    assert counts == {"uvit · none · dsm": 5, "uvit · ls · dsm": 5, "theirs": 1}


# --- several data sets ---------------------------------------------------------------------------

FEW = {"source": "digits", "max_images": 100}


def several(**grid) -> dict:
    return {**digits_and(few=FEW), "grid": {"backbone": ["uvit"], **grid}}


def test_data_sets_are_an_axis_of_grids_and_a_choice_of_arms():
    found = resolved(
        several(dataset=["digits", "few"]),
        {"arms": [{"backbone": "uvit", "dataset": "few", "skip_scaling": "ls"}]},
    ).values()
    assert [(run.spec.dataset.name, run.display) for run in found] == [
        ("digits", "uvit · none · dsm · digits"),
        ("few", "uvit · none · dsm · few"),
        ("few", "uvit · ls · dsm · few"),
    ]
    assert [run.row()["measurements"][0]["images"] for run in found] == [1797, 100, 100]


def test_several_data_sets_rename_no_run_of_the_one():
    (alone,) = resolved({"grid": {"backbone": ["uvit"]}})
    assert alone in resolved(several(dataset=["digits", "few"]))
    (one,) = resolved(
        {
            "dataset": None,
            "datasets": {"digits": {"source": "digits"}},
            "grid": {"backbone": ["uvit"]},
        }
    )
    assert one == alone


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (several(), "grid.dataset: missing; the study has several data sets: digits, few"),
        (several(dataset="x"), "grid.dataset: 'x' is no data set of this study; allowed: digits, "),
        (several(dataset=["few", "few"]), "grid.dataset: entries 0 and 1 are the same"),
        (
            {**several(dataset="few"), "arms": [{"backbone": "uvit"}]},
            "arms[0].dataset: missing; the study has several data sets: digits, few",
        ),
        (
            {**several(dataset="few"), "arms": [{"backbone": "uvit", "dataset": "x"}]},
            "arms[0].dataset: 'x' is no data set of this study; allowed: digits, few",
        ),
        (
            {"dataset": None, "datasets": {"few": {**FEW, "name": "many"}}},
            "datasets.few.name: 'many'; leave it out, or write few",
        ),
        ({"dataset": None}, "dataset: missing; a study has `dataset`, or several as `datasets`"),
        (
            {"datasets": {"few": FEW}},
            "dataset: the study has `datasets`, too; put it there",
        ),
        (
            digits_and(few={**FEW, "reference": {"name": "digits", **FEW}}),
            "datasets.few.reference.name: 'digits' is the name of datasets.digits, with other",
        ),
        (
            {
                **digits_and(few={**FEW, "labels": False}),
                "grid": {"backbone": ["uvit"], "dataset": ["digits", "few"]},
            },
            "protocols.final.extractors: digits trains a classifier and needs "
            "datasets.few.labels: true",
        ),
        (
            {"dataset": {**base()["dataset"], "labels": False}},
            "protocols.final.extractors: digits trains a classifier and needs dataset.labels",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_of_data_sets_is_one_line(content, words):
    assert words in told(content)


# --- the schema ----------------------------------------------------------------------------------


def test_the_schema_takes_every_spelling():
    content = {
        **without(base(), "dataset"),
        "datasets": {"digits": {"source": "digits"}, "few": FEW},
        "grid": {"dataset": ["digits", "few"], "backbone": ["uvit"]},
        "only": {"dataset": "few", "seed": [0]},
        "protocols": {
            "final": protocol(sampler={"kind": "edm_heun", "steps": [3, 5]}, seeds=[0, 1]),
            "curve": {"like": "final", "at": ["snapshots", 4], "images": [None, 100]},
            "best": {"like": "final", "at": "best(curve)", "guidance": [None, 1.5, {"scale": 2}]},
            "mine": protocol(extractors=["digits", {"kind": "pixels"}], labels=[3, "uniform"]),
        },
    }
    load(content)
    validator = Draft202012Validator(schema())
    validator.validate(content)
    for wrong in ({"at": "finale"}, {"sampler": {"kind": "edm_heun", "steps": [0]}}, {"seeds": []}):
        assert not validator.is_valid({**base(), **measured(**wrong)})


# --- what the README says of it ------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def yaml_after(words: str) -> dict:
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", README.partition(words)[2], re.DOTALL)[1])


def test_studies_of_the_readme_are_studies():
    found = planned(yaml_after("## Measure: protocols"))
    assert [one.protocols for one in found] == [("final",), ("best",), ("curve",)]
    assert len(resolved({"dataset": None, **yaml_after("**Several data sets**")})) == 4


def test_the_readme_says_every_key_of_a_protocol_with_an_example_that_works():
    table = README.partition("## Measure: protocols")[2].partition("| key |")[2]
    rows = re.findall(r"^\| `(\w+)` \|.*`([^`]+)` \|$", table.partition("\n\n")[0], re.MULTILINE)
    assert [key for key, _ in rows] == list(Protocol.model_fields)
    full = {**protocol(), "metrics": ["fd", "is"]}
    averages = {"training": {**GUIDED["training"], "snapshots": 4}}
    for key, example in rows:
        written = yaml.safe_load(example)
        assert key in written
        assert planned(averages, final=full, other={"like": "final", **written})


def test_the_readme_says_every_key_of_only():
    keys = README.partition("is chosen by `only`, with the keys")[2].partition(", each")[0]
    assert re.findall(r"`(\w+)`", keys) == list(Only.model_fields)


# --- what only some arms can be measured with ----------------------------------------------------

TWO_KINDS = {
    "arms": [{"name": "told", "backbone": "uvit", "training": {"conditional": True}}],
    "training": {**base()["training"], "label_dropout": 0.0},
}


def test_a_protocol_asks_nothing_of_arms_that_it_does_not_measure():
    some = protocol(labels=[0, 1], only={"name": "told"})
    runs = resolved(TWO_KINDS, final=protocol(), classes=some)
    assert sorted(len(run.measurements) for run in runs.values()) == [1, 1, 3]
    line = told(TWO_KINDS, final=protocol(), classes={**some, "only": None})
    assert line.startswith("uvit · none · dsm: protocols.classes.labels: the network is told no")


@pytest.mark.parametrize(
    ("curve", "best", "words"),
    [
        ({"weights": ["ema", "raw"]}, {}, "protocols.best.at: best(curve) compares snapshots, but"),
        ({"images": [10, 20]}, {}, "protocols.best.at: best(curve) compares snapshots, but"),
        ({}, {"weights": "raw"}, "protocols.best.weights: uvit · none · dsm keeps no raw at step"),
        ({}, {"weights": "ema7"}, "protocols.best.weights: uvit · none · dsm keeps no ema7 at"),
    ],
)
def test_the_best_is_told_by_like_measurements_of_weights_that_are_kept(curve, best, words):
    along = protocol(**{"at": "snapshots", "images": 100} | curve)
    sections = CURVE
    if "weights" in curve:
        kept = {"every": 4, "raw": True}
        sections = {"training": {**CURVE["training"], "snapshots": kept}}
    assert words in told(sections, curve=along, best=protocol(**{"at": "best(curve)"} | best))


@pytest.mark.parametrize("probe", ["target_variance", "scaling_laws"])
def test_a_probe_of_one_data_set_is_not_made_of_several(probe):
    several = {
        **digits_and(few=FEW),
        "grid": {"backbone": ["uvit"], "dataset": ["digits", "few"]},
        "probes": [probe],
    }
    assert told(several).startswith(f"probes[0]: {probe} looks at one data set, and the study has")
