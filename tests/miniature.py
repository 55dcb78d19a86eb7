"""The smallest study that is whole."""


def base() -> dict:
    return {
        "study": "tiny",
        "dataset": {"name": "digits", "source": "digits"},
        "grid": {"backbone": ["uvit"], "skip_scaling": ["none", "ls"]},
        "backbones": {"uvit": {"preset": "tiny"}},
        "training": {"steps": 10, "batch": 8, "lr": 1e-3},
        "protocols": {"final": protocol()},
    }


def protocol(**keys) -> dict:
    """Its only protocol, with these keys."""
    return {"sampler": {"kind": "edm_heun", "steps": 3}, "extractors": "digits", **keys}


def measured(**keys) -> dict:
    """The section of a study that has only that protocol."""
    return {"protocols": {"final": protocol(**keys)}}
