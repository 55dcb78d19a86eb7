"""``study parity``: the golden cases, and what makes a case fail."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from study.cli import app
from study.files import UserError
from study.parity import judge
from study.parity.case import DESCRIPTIONS, Settings, kind_of, names, read
from study.parity.coverage import SYSTEMS, coverage
from study.parity.edm import stable_target
from study.parity.judge import Verdict, run_case
from study.parity.kinds import KINDS, runner_of
from study.parity.metrics import half_squared_distances
from study.parity.tolerance import tolerances

GOLDEN = Path(__file__).parent / "golden"
NAMES = names(GOLDEN)[0]


# --- the recorded official outputs -------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_golden_case(name):
    verdict = run_case(GOLDEN, name)
    assert verdict.passed, verdict.problems
    stored = [key for key in load_file(GOLDEN / f"{name}.safetensors") if key.startswith("out/")]
    assert verdict.outputs == len(stored)


def golden(name):
    return read(GOLDEN, name)


def test_discrete_samplers_repeat_the_released_arithmetic():
    """To the last digit on the machine of the records; elsewhere a function may round otherwise."""
    case, tensors = golden("ddpm-dit-a")
    made = KINDS["ddpm-dit"]({**case, "loss_runs": {}}, tensors)
    for name in ("ddpm25", "ddim25"):
        for quantity in ("trajectory", "pred_xstart"):
            wanted = tensors[f"out/{name}/{quantity}"]
            torch.testing.assert_close(made[f"out/{name}/{quantity}"], wanted, rtol=2e-6, atol=2e-6)


def test_half_precision_distances_equal_the_evaluators_bit_for_bit():
    _, tensors = golden("fid-a")
    reference, generated = (
        tensors[f"in/features_{name}"].numpy() for name in ("reference", "generated")
    )
    found = half_squared_distances(reference, generated)
    assert (found == tensors["out/pairwise_squared_distances_fp16"].numpy()).all()


def test_every_kind_is_recorded_or_known():
    kinds = {kind_of(name) for name in NAMES}
    assert all(map(runner_of, kinds))
    for kind in KINDS:
        if not kind.endswith("*"):
            assert kind in kinds, f"no case of {kind}"


def test_table_of_what_is_covered_is_up_to_date():
    verdicts = [Verdict(name) for name in NAMES if name.endswith("-a")]
    page = Path(__file__).resolve().parents[1] / "study" / "PARITY.md"
    assert page.read_text(encoding="utf-8") == coverage(GOLDEN, verdicts), (
        "run: study parity tests/golden --markdown study/PARITY.md"
    )


def test_tests_that_the_table_names_are_there():
    folder = Path(__file__).parent
    assert all((folder / name).is_file() for system in SYSTEMS for name in system.tests.split(", "))


# --- cases of our own --------------------------------------------------------------------------


def double(case, tensors):
    """Runner of the kind "double": out/y = 2 x, and what the case lists under ``more``."""
    out = {"out/y": 2 * tensors["in/x"]}
    return out | {key: torch.tensor(value) for key, value in case.get("more", {}).items()}


def copy(case, tensors):
    """Runner that returns the stored outputs it is given."""
    return {key: value for key, value in tensors.items() if key.startswith("out/")}


def broken(case, tensors):
    raise RuntimeError("cannot\nbe run")


OURS = {"double": double, "copy": copy, "broken": broken, "family-*": double}


def write(folder, name="double-a", tolerance=None, case=None, **changes):
    """A case with in/x and out/y = 2 x; ``changes`` are further tensors, or None to leave out."""
    x = torch.linspace(-1, 1, 6).reshape(3, 2)
    tensors = {"in/x": x, "out/y": 2 * x}
    tensors |= {key.replace("__", "/"): value for key, value in changes.items()}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    content = {"case": name, "tolerance": tolerance or {"rtol": 1e-3, "atol": 1e-4}, **(case or {})}
    (folder / f"{name}.json").write_text(json.dumps(content))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.st")
    (folder / f"{name}.st").rename(folder / f"{name}.safetensors")
    return run_case(folder, name, OURS)


def test_equal_outputs_pass_with_error_zero(tmp_path):
    verdict = write(tmp_path)
    assert verdict.passed
    assert (verdict.outputs, verdict.absolute, verdict.relative, verdict.share) == (1, 0, 0, 0)


def test_error_is_judged_by_atol_and_rtol_together(tmp_path):
    x = torch.tensor([[0.0, 1.0, 100.0]])
    near = 2 * x + torch.tensor([[0.9e-4, 2.0e-3, 0.19]])
    assert write(tmp_path, in__x=x, out__y=near).passed
    for index in range(3):
        far = near.clone()
        far[0, index] += 0.15 * (near - 2 * x)[0, index]
        verdict = write(tmp_path, in__x=x, out__y=far)
        assert not verdict.passed
        assert verdict.worst == "out/y" and verdict.share > 1


def test_errors_are_the_largest(tmp_path):
    wrong = 2 * torch.linspace(-1, 1, 6).reshape(3, 2)
    wrong[1, 0] += 0.5
    verdict = write(tmp_path, out__y=wrong)
    assert verdict.absolute == pytest.approx(0.5)
    assert verdict.relative == pytest.approx(0.25)
    assert "out/y differs by 0.5" in verdict.problems[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_must_match(tmp_path, value):
    x = torch.tensor([[1.0, value]])
    assert write(tmp_path, in__x=x, out__y=2 * x).passed
    verdict = write(tmp_path, in__x=x, out__y=torch.tensor([[2.0, 0.0]]))
    assert not verdict.passed and verdict.absolute == float("inf")
    verdict = write(tmp_path, in__x=torch.tensor([[1.0, 3.0]]), out__y=2 * x)
    assert not verdict.passed and "non-finite" in verdict.problems[0]


def test_infinities_of_either_sign_differ(tmp_path):
    x = torch.tensor([[torch.inf]])
    assert not write(tmp_path, in__x=x, out__y=-2 * x).passed


def test_shapes_must_match(tmp_path):
    verdict = write(tmp_path, out__y=torch.zeros(1, 2))
    assert "[3, 2] instead of [1, 2]" in verdict.problems[0]


def test_every_stored_output_must_be_made(tmp_path):
    verdict = write(tmp_path, out__z=torch.ones(2))
    assert verdict.problems == ["out/z is not produced"]


def test_runner_never_sees_the_stored_outputs(tmp_path):
    verdict = write(tmp_path, name="copy-a")
    assert not verdict.passed


def test_kind_is_the_name_without_its_letter():
    assert kind_of("sampler-edm-heun-b") == "sampler-edm-heun"
    assert kind_of("uvit-t2i-a") == "uvit-t2i"
    assert kind_of("uvit-t2i") == "uvit-t2i"


def test_unknown_kind_fails(tmp_path):
    assert write(tmp_path, name="triple-a").problems == ["unknown kind 'triple'"]
    assert write(tmp_path, name="family-x-b").passed


def test_exception_in_a_case_is_its_failure(tmp_path):
    assert write(tmp_path, name="broken-a").problems == ["RuntimeError: cannot be run"]


def test_damaged_files_fail(tmp_path):
    write(tmp_path)
    tensors, case = tmp_path / "double-a.safetensors", tmp_path / "double-a.json"
    whole = tensors.read_bytes()
    for content in (b"", whole[:20], whole[:-1]):
        tensors.write_bytes(content)
        assert "cannot be read" in run_case(tmp_path, "double-a", OURS).problems[0]
    tensors.unlink()
    verdict = run_case(tmp_path, "double-a", OURS)
    assert verdict.problems == ["double-a.safetensors is missing"]
    tensors.write_bytes(whole)
    case.write_text("{")
    assert "cannot be read" in run_case(tmp_path, "double-a", OURS).problems[0]
    case.unlink()
    verdict = run_case(tmp_path, "double-a", OURS)
    assert verdict.problems == ["double-a.json is missing"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"inputs": {"in/noise": {}}}, "lacks in/noise"),
        ({"outputs": {"out/z": {}}}, "lacks out/z"),
        ({"outputs": {"out/y": {"shape": [6]}}}, "its JSON says"),
        ({"tolerance": {"rtol": 1e-3}}, "no tolerance"),
    ],
)
def test_json_and_tensors_must_agree(tmp_path, case, message):
    assert message in write(tmp_path, case=case).problems[0]


def test_case_without_outputs_fails(tmp_path):
    assert "holds no outputs" in write(tmp_path, out__y=None).problems[0]


def test_facts_are_no_cases(tmp_path):
    write(tmp_path)
    (tmp_path / "published_configs.json").write_text('{"uvit": 1}')
    assert names(tmp_path) == (["double-a"], ["published_configs"])
    (tmp_path / "half-a.json").write_text('{"tolerance": {}}')
    assert "half-a" in names(tmp_path)[0]


def test_folder_without_cases_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no cases here"):
        names(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        names(tmp_path / "absent")


# --- the tolerance of single outputs -----------------------------------------------------------


def allowed(rules, **tensors):
    tensors = {key.replace("__", "/"): value for key, value in tensors.items()}
    tolerance = {"rtol": 1e-3, "atol": 1e-4, "outputs": rules}
    found = tolerances({"tolerance": tolerance}, tensors)
    return {key: value.limit(tensors[key].double()) for key, value in found.items()}


ONES = torch.ones(4)


def test_numbers_for_outputs_of_a_name():
    limits = allowed(
        {"out/distances_fp16": {"rtol": 2e-3}, "out/radii_*": {"rtol": 2e-3, "atol": 0}},
        out__distances_fp16=ONES,
        out__radii_reference=ONES,
        out__mean=ONES,
    )
    assert limits["out/distances_fp16"][0] == pytest.approx(2.1e-3)
    assert limits["out/radii_reference"][0] == pytest.approx(2e-3)
    assert limits["out/mean"][0] == pytest.approx(1.1e-3)


def test_counts():
    """A share of n points may change by one point, whatever rtol and atol are."""
    limits = allowed(
        {"out/precision_*": {"counts": 1}, "out/recall_*": {"counts": 2}},
        in__features_generated=torch.zeros(50, 2),
        in__features_reference=torch.zeros(80, 2),
        out__precision_k3=torch.tensor(0.5),
        out__recall_k3=torch.tensor(0.5),
        out__fid=torch.tensor(0.5),
    )
    assert limits["out/precision_k3"].item() == pytest.approx(1 / 50, abs=2e-6)
    assert limits["out/recall_k3"].item() == pytest.approx(2 / 80, abs=2e-6)
    assert limits["out/fid"].item() == pytest.approx(6e-4)


def test_an_outputs_own_size():
    """By sample: one of sigma 80 beside one of sigma 0.01."""
    value = torch.tensor([[80.0, 0.0], [0.01, 0.0]])
    limits = allowed({"out/D*": {"own_size": True}}, out__D=value, out__D_raw=value, out__x=value)
    own = torch.tensor([[8.01e-2, 8.01e-2], [1.1e-4, 1.1e-4]])
    torch.testing.assert_close(limits["out/D"].float(), own)
    torch.testing.assert_close(limits["out/D_raw"].float(), own)
    assert limits["out/x"][0, 1].item() == pytest.approx(1e-4)


def test_some_entries():
    limits = allowed(
        {"out/grid/*": {"rtol": 5e-2, "where": {"input": "in/t_grid", "below": 1e-3}}},
        in__t_grid=torch.tensor([1e-5, 1e-2, 0.5, 1.0]),
        out__grid__snr=ONES,
        out__loss=ONES,
    )
    assert limits["out/grid/snr"].tolist() == pytest.approx([5.01e-2, 1.1e-3, 1.1e-3, 1.1e-3])
    assert limits["out/loss"].tolist() == pytest.approx([1.1e-3] * 4)


@pytest.mark.parametrize(
    "change",
    [
        {"rtoll": 1},
        {"outputs": {"out/z": {"rtol": 1}}},
        {"outputs": {"out/y": {"rtoll": 1}}},
        {"outputs": {"out/y": {"rtol": "1"}}},
        {"outputs": {"out/y": 1}},
        {"outputs": {"out/y": {"where": {"input": "in/z", "below": 1}}}},
        {"outputs": {"out/y": {"where": {"input": "in/x", "above": 1}}}},
    ],
)
def test_a_rule_that_cannot_be_followed_fails(tmp_path, change):
    verdict = write(tmp_path, tolerance={"rtol": 1e-3, "atol": 1e-4, **change})
    assert len(verdict.problems) == 1 and "tolerance" in verdict.problems[0]


def test_a_remark_decides_nothing(tmp_path):
    tolerance = {"rtol": 1e-3, "atol": 1e-4, "remark": "use rtol 1 for out/y"}
    assert write(tmp_path, tolerance=tolerance).passed
    assert not write(tmp_path, tolerance=tolerance, out__y=torch.zeros(3, 2)).passed


# --- settings ----------------------------------------------------------------------------------


def test_a_setting_that_is_not_used_fails(tmp_path):
    verdict = write(tmp_path, case={"betas": "linear", "notes": ["of the authors"], "seed": 3})
    assert verdict.problems == ["setting betas was not used"]
    verdict = write(tmp_path, case={"constructor": {"factor": 2, "bias": 0, "inner": {"a": 1}}})
    assert verdict.problems == ["setting constructor was not used"]
    assert not write(tmp_path, case={"mode": "train"}).passed


def test_a_setting_inside_another_one_that_is_not_used_fails():
    case = Settings({"constructor": {"factor": 2, "inner": {"a": 1, "b": 2}}})
    assert "factor" in case["constructor"] and case["constructor"]["inner"].get("a") == 1
    assert list(case.unused()) == ["constructor.factor", "constructor.inner.b"]


GROUPS = ("runs", "loss_runs", "sample_runs")

WITHOUT_EFFECT = {
    "dropout": "inactive in evaluation",
    "label_dropout": "inactive in evaluation",
    "use_checkpoint": "saves memory and changes no number",
    "qk_scale": "the official attention ignores it where it is fused",
    "rescale_learned_sigmas": "a factor of 1 with 1000 steps",
    "rescale_timesteps": "a factor of 1 with 1000 steps",
    "loss_runs.sigma_small": "of variances that are not learned",
    "diffusion.use_kl": "of losses, not of samples",
    **dict.fromkeys(("M", "C_1", "C_2"), "of the iddpm discretisation, which no run has"),
    **dict.fromkeys(("S_min", "S_max", "S_noise"), "of churn, which no run has"),
    "translate_int_max": "of a stage that is off",
    **dict.fromkeys(("brightness_std", "contrast_std"), "of a stage that is off"),
    **dict.fromkeys(("hue_max", "saturation_std"), "of a stage that is off"),
}
"""Settings that, in the recorded cases, change no output of the official codes either."""


def settings_of(content, path=()):
    for key, value in content.items():
        if key in DESCRIPTIONS or key == "param_names":
            continue
        if isinstance(value, dict):
            yield from settings_of(value, (*path, key))
        else:
            yield (*path, key)


def alterations(key, value):
    if key == "mode":
        yield "train"
    elif value is None:
        yield 7
    elif value == "inf":
        yield 0.3
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (0 if value else 3, value * 1.5 + 0.01, value + 2, value + 4)
    elif isinstance(value, str):
        yield re.sub(r"\d+", lambda found: str(int(found[0]) + 1), value, count=3)
        yield f"{value} no more"
        yield 0.3
    else:
        yield [*value[:-1], next(alterations(key, value[-1]))]


def placed(case, path, value):
    """The case with one setting changed."""
    if not path:
        return value
    return {**case, path[0]: placed(case[path[0]], path[1:], value)}


def one_run(case, tensors, run):
    """The case with one of its runs only, which is quicker."""
    runs = {group: case[group] for group in GROUPS if group in case}
    others = {name for group in runs.values() for name in group} - {run}
    kept = {k: v for k, v in tensors.items() if k.split("/")[1] not in others}
    changed = {group: {k: v for k, v in runs[group].items() if k == run} for group in runs}
    outputs = {k: v for k, v in case["outputs"].items() if k in kept}
    tolerance = {key: case["tolerance"][key] for key in ("rtol", "atol")}
    return {**case, **changed, "outputs": outputs, "tolerance": tolerance}, kept


def test_every_setting_of_every_case_matters():
    """Altered, it fails its case or is refused, in one of the cases of a kind at least."""
    proven, seen = set(), set()
    for name in NAMES:
        runner = runner_of(kind_of(name))
        whole, stored = read(GOLDEN, name)
        for path in settings_of(whole):
            grouped = path[0] in GROUPS
            generic = ".".join((path[0], *path[2:]) if grouped else path)
            if (runner, generic) in proven or any(
                f".{generic}".endswith(f".{setting}") for setting in WITHOUT_EFFECT
            ):
                continue
            seen.add((runner, generic))
            case, tensors = one_run(whole, stored, path[1]) if grouped else (whole, stored)
            value = case
            for key in path:
                value = value[key]
            for other in alterations(path[-1], value):
                verdict = judge.judge(name, placed(case, path, other), tensors, runner)
                if not verdict.passed:
                    proven.add((runner, generic))
                    break
    missed = sorted(f"{runner}: {setting}" for runner, setting in seen - proven)
    assert not missed


def test_respacings_with_commas_are_run(tmp_path):
    case, tensors = read(GOLDEN, "ddpm-schedule-a")
    runner = KINDS["ddpm-schedule"]
    setting = {**case["settings"]["linear1000"], "respacings": {"20,30,10": 60}}
    made = runner({**case, "settings": {"linear1000": setting}}, tensors)
    tensors = {k: v for k, v in made.items() if k in tensors or "respaced_20,30,10" in k}
    assert len(tensors["out/linear1000/respaced_20,30,10/betas"]) == 60

    def judged(respacings):
        given = {"linear1000": {**setting, "respacings": respacings}}
        return judge.judge("a", {**case, "settings": given, "outputs": {}}, tensors, runner)

    assert judged({"20,30,10": 60}).passed
    assert "out/linear1000/respaced_20,30,10/betas is not produced" in judged({}).problems
    assert "not 61" in judged({"20,30,10": 61}).problems[0]


def test_stf_runner_with_augmentation_and_classes_augments_the_two_parts_separately():
    draw = torch.Generator().manual_seed(0)
    reference = torch.rand(9, 3, 4, 4, generator=draw) * 2 - 1
    case = {"constructor": {}, "sigma_data_of_net": 0.5, "batch": 3, "augmentation": "mirror_odd"}
    tensors = {
        "in/reference_batch": reference,
        "in/level_draw": torch.tensor([0.0, 1.0, 2.0]),
        "in/unit_noise": torch.randn(3, 3, 4, 4, generator=draw),
        "in/class_labels": torch.eye(3),
    }
    out = stable_target(case, tensors)
    expected = reference.clone()
    for index in (1, 4, 6, 8):  # 1 of the batch; 1, 3, 5 of the rest
        expected[index] = reference[index].flip(2)
    assert torch.equal(out["out/reference_batch_used"], expected)
    clear = {**tensors, "in/class_labels": torch.eye(3)[[0, 0, 0]]}
    difference = out["out/denoised"] - stable_target(case, clear)["out/denoised"]
    steps = torch.tensor([0.0, 0.05, 0.1])[:, None, None, None]
    torch.testing.assert_close(difference, steps.expand_as(difference), rtol=0, atol=1e-6)


# --- on the command line -----------------------------------------------------------------------


def called(*arguments):
    return CliRunner().invoke(app, ["parity", *map(str, arguments)], catch_exceptions=True)


def test_list_names_the_kinds():
    done = called("--list")
    assert done.exit_code == 0
    listed = [line.split()[0] for line in done.output.splitlines()]
    for kind in ("uvit", "scalelong-*", "udit-alt", "adm-*", "ncsnpp", "stf", "fid"):
        assert kind in listed
    assert listed == list(KINDS)


def small(name):
    return (GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors")


def test_command_passes_fails_and_writes_the_table(tmp_path):
    for path in (*small("edmloss-a"), *small("vploss-a")):
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "published_configs.json").write_text("{}")
    done = called(tmp_path, "--markdown", tmp_path / "table.md")
    assert done.exit_code == 0, done.output
    assert "2 cases, all passed" in done.output
    assert "not cases: published_configs" in done.output
    assert "edmloss-a" in (tmp_path / "table.md").read_text()

    path = tmp_path / "vploss-a.safetensors"
    tensors = load_file(path)
    tensors["out/loss"] = tensors["out/loss"] * 1.01
    save_file(tensors, path)
    done = called(tmp_path)
    assert done.exit_code == 1
    assert "2 cases, 1 failed" in done.output
    assert "vploss-a: out/loss differs by" in done.output


def test_changed_weight_is_noticed(tmp_path):
    for path in small("uvit-a"):
        shutil.copyfile(path, tmp_path / path.name)
    tensors = load_file(tmp_path / "uvit-a.safetensors")
    tensors["weights/in_blocks.0.norm1.bias"][3] += 0.01
    save_file(tensors, tmp_path / "uvit-a.safetensors")
    assert not run_case(tmp_path, "uvit-a").passed


def test_command_without_folder_or_with_unknown_kinds(tmp_path):
    assert isinstance(called().exception, UserError)
    write(tmp_path, name="triple-a")
    done = called(tmp_path)
    assert done.exit_code == 1
    assert "unknown kind 'triple'" in done.output
