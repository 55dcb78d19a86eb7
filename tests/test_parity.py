"""``study parity``: the golden cases, and what makes a case fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from study import parity
from study.cli import app
from study.files import UserError
from study.parity_table import SYSTEMS, coverage

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
NAMES = parity.names(PARITY)[0] if PARITY.is_dir() else []
ABSENT = "the recorded official outputs are not here (../shared/parity)"
golden = pytest.mark.skipif(not NAMES, reason=ABSENT)


# --- the recorded official outputs -------------------------------------------------------------


@golden
@pytest.mark.parametrize("name", NAMES)
def test_golden_case(name):
    verdict = parity.run_case(PARITY, name)
    assert verdict.passed, verdict.problems
    assert not verdict.notes
    stored = [key for key in load_file(PARITY / f"{name}.safetensors") if key.startswith("out/")]
    assert verdict.outputs == len(stored)


@golden
def test_every_kind_is_recorded_or_known():
    kinds = {parity.kind_of(name) for name in NAMES}
    known = parity.runners()
    assert all(parity._runner(kind, known) for kind in kinds)
    for kind in known:
        if not kind.endswith("*"):
            assert kind in kinds, f"no case of {kind}"


@golden
def test_table_of_what_is_covered_is_up_to_date():
    verdicts = [parity.Verdict(name) for name in NAMES if name.endswith("-a")]
    page = Path(__file__).resolve().parents[1] / "study" / "PARITY.md"
    assert page.read_text() == coverage(PARITY, verdicts), (
        "run: study parity ../shared/parity --markdown study/PARITY.md"
    )


@golden
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


KNOWN = {"double": double, "copy": copy, "broken": broken, "family-*": double}


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
    return parity.run_case(folder, name, KNOWN)


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
    assert parity.kind_of("sampler-edm-heun-b") == "sampler-edm-heun"
    assert parity.kind_of("uvit-t2i-a") == "uvit-t2i"
    assert parity.kind_of("uvit-t2i") == "uvit-t2i"


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
        assert "cannot be read" in parity.run_case(tmp_path, "double-a", KNOWN).problems[0]
    tensors.unlink()
    verdict = parity.run_case(tmp_path, "double-a", KNOWN)
    assert verdict.problems == ["double-a.safetensors is missing"]
    tensors.write_bytes(whole)
    case.write_text("{")
    assert "cannot be read" in parity.run_case(tmp_path, "double-a", KNOWN).problems[0]
    case.unlink()
    verdict = parity.run_case(tmp_path, "double-a", KNOWN)
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
    assert parity.names(tmp_path) == (["double-a"], ["published_configs"])
    (tmp_path / "half-a.json").write_text('{"tolerance": {}}')
    assert "half-a" in parity.names(tmp_path)[0]


def test_folder_without_cases_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="no cases here"):
        parity.names(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        parity.names(tmp_path / "absent")


# --- remarks -----------------------------------------------------------------------------------


def allowed(remark, case=None, **tensors):
    tensors = {key.replace("__", "/"): value for key, value in tensors.items()}
    tolerance = {"rtol": 1e-3, "atol": 1e-4, "remark": remark}
    found, unknown = parity.tolerances({"tolerance": tolerance, **(case or {})}, tensors)
    return {key: value.limit(tensors[key].double()) for key, value in found.items()}, unknown


ONES = torch.ones(4)


def test_remark_with_numbers_for_named_outputs():
    limits, unknown = allowed(
        "fp16 distances/radii: rtol 2e-3; nothing else",
        out__pairwise_distances_fp16=ONES,
        out__radii_reference=ONES,
        out__mean=ONES,
    )
    assert not unknown
    assert limits["out/pairwise_distances_fp16"][0] == pytest.approx(2.1e-3)
    assert limits["out/radii_reference"][0] == pytest.approx(2.1e-3)
    assert limits["out/mean"][0] == pytest.approx(1.1e-3)


def test_remark_on_counts():
    """A share of n points may change by one point, whatever rtol and atol are."""
    limits, _ = allowed(
        "precision/recall: exact up to +-1 count",
        in__features_generated=torch.zeros(50, 2),
        in__features_reference=torch.zeros(80, 2),
        out__precision_k3=torch.tensor(0.5),
        out__recall_k3=torch.tensor(0.5),
        out__fid=torch.tensor(0.5),
    )
    assert limits["out/precision_k3"].item() == pytest.approx(1 / 50, abs=2e-6)
    assert limits["out/recall_k3"].item() == pytest.approx(1 / 80, abs=2e-6)
    assert limits["out/fid"].item() == pytest.approx(6e-4)


def test_remark_on_an_outputs_own_size():
    """By sample: one of sigma 80 beside one of sigma 0.01."""
    value = torch.tensor([[80.0, 0.0], [0.01, 0.0]])
    limits, unknown = allowed(
        "out/D at large sigma scales with sigma; judge it relative to its own size",
        out__D=value,
        out__D_no_labels=value,
        out__sigma=value,
        out__Dx=value,
    )
    assert not unknown
    own = torch.tensor([[8.01e-2, 8.01e-2], [1.1e-4, 1.1e-4]])
    torch.testing.assert_close(limits["out/D"].float(), own)
    torch.testing.assert_close(limits["out/D_no_labels"].float(), own)
    for other in ("out/sigma", "out/Dx"):
        assert limits[other][0, 1].item() == pytest.approx(1e-4)


def test_remark_on_some_entries():
    grid = torch.tensor([1e-5, 1e-2, 0.5, 1.0])
    limits, unknown = allowed(
        "cancellation in cum_beta for t below 1e-3: compare these grid points with rtol 5e-2",
        in__t=torch.zeros(7),
        in__t_grid=grid,
        out__grid__cum_beta=ONES,
        out__grid__snr=ONES,
        out__loss=ONES,
    )
    assert not unknown
    for name in ("out/grid/cum_beta", "out/grid/snr"):
        assert limits[name].tolist() == pytest.approx([5.01e-2, 1.1e-3, 1.1e-3, 1.1e-3])
    assert limits["out/loss"].tolist() == pytest.approx([1.1e-3] * 4)


def test_remark_on_runs():
    limits, unknown = allowed(
        "use atol 5e-2 for the sampling runs",
        case={"sample_runs": {"ddim25": {}}, "loss_runs": {"published": {}}},
        out__ddim25__sample=ONES,
        out__published__loss=ONES,
    )
    assert not unknown
    assert limits["out/ddim25/sample"][0] == pytest.approx(5.1e-2)
    assert limits["out/published/loss"][0] == pytest.approx(1.1e-3)


@pytest.mark.parametrize(
    "remark",
    [
        None,
        "several terms are small (1e-5..1e-3); the variational term suffers cancellation",
        "weights: atol 1e-4 is meaningful because the exponent is divided by 2 sigma^2",
    ],
)
def test_remark_without_another_rule_changes_nothing(remark):
    limits, unknown = allowed(remark, out__weights=ONES, out__term=ONES)
    assert not unknown
    assert all(limit[0] == pytest.approx(1.1e-3) for limit in limits.values())


def test_remark_that_names_nothing_is_reported_and_not_applied(tmp_path):
    tolerance = {"rtol": 1e-3, "atol": 1e-4, "remark": "use rtol 1 for the velocities"}
    verdict = write(tmp_path, tolerance=tolerance, out__y=torch.zeros(3, 2))
    assert not verdict.passed
    assert "use rtol 1 for the velocities" in verdict.notes[0]


# --- on the command line -----------------------------------------------------------------------


def called(*arguments):
    return CliRunner().invoke(app, ["parity", *map(str, arguments)], catch_exceptions=True)


def test_list_names_the_kinds():
    done = called("--list")
    assert done.exit_code == 0
    listed = [line.split()[0] for line in done.output.splitlines()]
    for kind in ("uvit", "scalelong-*", "udit-alt", "adm-*", "ncsnpp", "stf", "fid"):
        assert kind in listed
    assert listed == list(parity.runners())


def small(name):
    return (PARITY / f"{name}.json", PARITY / f"{name}.safetensors")


@golden
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


@golden
def test_changed_weight_is_noticed(tmp_path):
    for path in small("uvit-a"):
        shutil.copyfile(path, tmp_path / path.name)
    tensors = load_file(tmp_path / "uvit-a.safetensors")
    tensors["weights/in_blocks.0.norm1.bias"][3] += 0.01
    save_file(tensors, tmp_path / "uvit-a.safetensors")
    assert not parity.run_case(tmp_path, "uvit-a").passed


def test_command_without_folder_or_with_unknown_kinds(tmp_path):
    assert isinstance(called().exception, UserError)
    write(tmp_path, name="triple-a")
    done = called(tmp_path)
    assert done.exit_code == 1
    assert "unknown kind 'triple'" in done.output
