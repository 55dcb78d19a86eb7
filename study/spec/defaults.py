"""Every default of every setting, beside ``defaults.json``, which holds them as they were.

A run's name leaves defaults out, so an existing default never changes: it would give finished runs
another meaning under the same name. ``python -m study.spec.defaults`` adds those of new settings.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from study.files import canonical_json, read_json, write_text
from study.spec import data, guidance, measuring, scalings, study, targets, training
from study.spec.backbones import FAMILIES
from study.spec.extractors import EXTRACTORS
from study.spec.formulations import FORMULATIONS
from study.spec.probes import PROBES
from study.spec.run import Backbone, Seeds, Untrained
from study.spec.samplers import SAMPLERS

KNOWN = Path(__file__).with_suffix(".json")

SECTIONS: dict[str, type[BaseModel]] = {
    "dataset": data.Dataset,
    "skip_scaling": scalings.SkipScaling,
    "target": targets.Target,
    "training": training.Training,
    "training.ema": training.Ema,
    "training.snapshots": training.Snapshots,
    "untrained": Untrained,
    "training.models": training.SplitModel,
    "seeds": Seeds,
    "backbone": Backbone,
    "protocol": measuring.Protocol,
    "measurement": measuring.Measurement,
    "guidance": guidance.GuidanceOptions,
    "grid": study.Grid,
    "arm": study.Arm,
    "study": study.Study,
    **{f"backbone {name}": family.options for name, family in FAMILIES.items()},
    **{f"formulation {kind}": model for kind, model in FORMULATIONS.items()},
    **{f"sampler {kind}": model for kind, model in SAMPLERS.items()},
    **{f"extractor {kind}": model for kind, model in EXTRACTORS.items()},
    **{f"probe {kind}": model for kind, model in PROBES.items()},
}


@cache
def now() -> dict[str, dict[str, Any]]:
    """Today's defaults by section and key, in JSON form; required keys have none."""
    found = {}
    for name, model in SECTIONS.items():
        given = model.model_construct().model_dump(mode="json", warnings=False)
        optional = [
            key
            for key, field in model.model_fields.items()
            if not field.is_required() and not field.exclude
        ]
        found[name] = {key: given[key] for key in optional}
    return found


@cache
def changed(*sections: str) -> str:
    """Defaults of these sections that are not what the file says, as text; none should be."""
    known, today = read_json(KNOWN), now()
    found = {
        (name, key, canonical_json(today[name][key]))
        for name in sections
        for key, value in known.get(name, {}).items()
        if key in today[name] and _merged(today[name][key], value) != today[name][key]
    }
    return repr(sorted(found)) if found else ""


def add() -> None:
    """Add the defaults of new sections and keys to the file; what stands there stays."""
    known = read_json(KNOWN) if KNOWN.exists() else {}
    write_text(KNOWN, json.dumps(known | _merged(now(), known), indent=1) + "\n")


def _merged(today: Any, known: Any) -> Any:
    """What is known, with the keys that are new today, in mappings of any depth."""
    if not isinstance(today, dict) or not isinstance(known, dict):
        return known
    return known | {
        key: _merged(value, known[key]) if key in known else value for key, value in today.items()
    }


if __name__ == "__main__":
    add()
