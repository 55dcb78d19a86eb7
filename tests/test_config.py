"""A study's configuration: what is accepted, and what a mistake is told."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from miniature import base, measured

from study import cli
from study.arms import runs
from study.files import UserError
from study.spec.study import load, schema

ROOT = Path(__file__).parents[1]
STUDIES = [ROOT / "config.yaml", *sorted((ROOT / "workflow/studies").rglob("*.yaml"))]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_load_and_agree_with_the_schema(path):
    content = yaml.safe_load(path.read_text())
    assert runs(load(content))
    Draft202012Validator(schema()).validate(content)


def test_schema_file_is_up_to_date():
    written = json.loads((ROOT / "workflow/schemas/study.schema.json").read_text())
    assert written == schema(), "run: study schema --write workflow/schemas/study.schema.json"


def test_every_key_of_the_schema_is_described():
    undescribed = []

    def walk(node, where):
        if isinstance(node, dict):
            for key, value in node.get("properties", {}).items():
                references = "$ref" in value or "const" in value or "anyOf" in value
                if "description" not in value and not references:
                    undescribed.append(f"{where}.{key}")
            for key, value in node.items():
                walk(value, f"{where}.{key}")
        elif isinstance(node, list):
            for item in node:
                walk(item, where)

    walk(schema(), "")
    assert undescribed == []


MISTAKES = [
    ({"traning": {}}, "traning: unknown key; did you mean 'training'?"),
    ({"training": {"steps": 10, "batch": 8, "lr": "1e-4"}}, "training.lr: '1e-4' is text"),
    ({"training": {"steps": 10, "batch": 8, "lr": "1e-4"}}, "write 1.0e-4"),
    ({"training": {"steps": "ten", "batch": 8, "lr": 1e-3}}, "training.steps:"),
    ({"training": {"steps": 10, "lr": 1e-3}}, "training.batch: missing"),
    ({"grid": {"backbone": ["vit"]}}, "'vit' is no backbone of this study; allowed: uvit"),
    (
        {"grid": {"backbone": ["uvit"], "skip_scaling": ["half"]}},
        "grid.skip_scaling[0].method: input should be 'none', 'inv_sqrt2', 'cs', 'ls'",
    ),
    ({"grid": {"backbone": ["uvit"], "skip_scaling": ["cs(x)"]}}, "'x' is not a number"),
    ({"grid": {"backbone": ["uvit"], "target": ["stf(4)"]}}, "fewer reference images than"),
    (measured(sampler={"kind": "heun"}), "kind 'heun' is unknown; allowed: edm_heun"),
    (
        measured(sampler={"kind": "edm_heun", "step": 3}),
        "step: unknown key; did you mean 'steps'?",
    ),
    ({"backbones": {"uvit": {"preset": "huge-ish"}}}, "backbones.uvit.preset: 'huge-ish'"),
    (
        {"backbones": {"uvit": {"options": {"dept": 4}}}},
        "backbones.uvit.options.dept: unknown key; did you mean 'depth'?",
    ),
    (
        {"arms": [{"backbone": "uvit", "training": {"lr": "1e-3"}}]},
        "arms[0].training.lr: '1e-3' is text",
    ),
    ({"dataset": {"name": "x", "source": "zip"}}, "source zip needs dataset.path"),
    ({"study": "a/b"}, "study: string should match pattern"),
    ({"grid": {"backbone": []}}, "grid.backbone:"),
    (measured(guidance=1.5), "protocols.final.guidance needs training.conditional"),
    (
        {"backbones": {"uvit": {"preset": "tiny", "options": {"patch_size": 3}}}},
        "patch_size 3 does not divide resolution 8",
    ),
    (
        {"backbones": {"uvit": {"preset": "tiny", "options": {"patch_size": 4}}}},
        "learned scaling needs 16 tokens",
    ),
]


@pytest.mark.parametrize(("change", "told"), MISTAKES, ids=[told[:30] for _, told in MISTAKES])
def test_a_mistake_is_one_line_that_names_key_and_remedy(change, told):
    with pytest.raises(UserError) as caught:
        runs(load({**base(), **change}))
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_several_mistakes_are_a_line_each():
    with pytest.raises(UserError) as caught:
        load({**base(), "sed": [0], "training": {"steps": 1, "batch": 1, "lr": "1e-3"}})
    assert len(str(caught.value).splitlines()) == 2


def test_unreadable_files_are_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("study: [")
    with pytest.raises(UserError, match=r"broken.yaml, line \d+: not valid YAML"):
        load(broken)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.yaml")


def test_text_is_never_read_as_a_number_by_the_schema_either():
    wrong = base()
    wrong["training"]["lr"] = "1e-3"
    assert not Draft202012Validator(schema()).is_valid(wrong)
    assert Draft202012Validator(schema()).is_valid(base())


def test_numbers_are_typed():
    whole = base()
    whole["training"]["lr"] = 1
    assert load(whole).training.lr == 1.0
    assert isinstance(load(whole).training.lr, float)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["plan", "--confg", "x"], "No such option: --confg"),
        (["probe"], "Missing argument 'kind'"),
        (["train", "--threads", "zero"], "'--threads'"),
        (["schema", "--probe", "costs"], "'costs' is unknown; allowed: dynamics, "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("study: ")
    assert told in line


def test_no_command_gives_the_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study"])
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr()
    assert "plan" in told.out + told.err
