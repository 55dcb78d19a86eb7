"""The smallest study that is whole."""


def base() -> dict:
    return {
        "study": "tiny",
        "dataset": {"name": "digits", "source": "digits"},
        "grid": {"backbone": ["uvit"], "skip_scaling": ["none", "ls"]},
        "backbones": {"uvit": {"preset": "tiny"}},
        "training": {"steps": 10, "batch": 8, "lr": 1e-3},
        "generation": {"sampler": {"kind": "edm_heun", "steps": 3}},
        "evaluation": {"extractor": "digits"},
    }
