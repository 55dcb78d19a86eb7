# From a run's weights to samples, once per measurement, and from samples to metrics, once per
# extractor. Samples that are not to be kept are deleted when they are measured.


# One function for several inputs: Snakemake looks at each function of each job anew.


def drawn_from(wildcards):
    """What samples are made from, beside status.json, which is written last.

    Of the weights, those that a training's outputs name; other snapshots lie beside them. Where
    the best snapshot is asked for, also the measurements that tell which one that is.
    """
    one = planned(wildcards)
    known = {"ema": AVERAGED, "raw": RAW}
    named = one.last and one.cell.weights in known
    at = one.cell.at
    return {
        "data": archive(wildcards),
        "described": described(wildcards),
        "weights": known[one.cell.weights](wildcards) if named else [],
        "curve": [
            f"{RESULTS}/runs/{wildcards.run}/measurements/{name}/{at.extractor}.json"
            for name in getattr(at, "best", ())
        ],
    }


def kept_as(keep):
    """The measurements whose samples are kept so; two of one name are kept alike."""
    return any_of({name for name, kept in KEPT.items() if kept == keep})


# Where runs want unlike things of a measurement, the most.
KEPT = {}
for one in PLANNED.values():
    KEPT[one.name] = max(KEPT.get(one.name, "none"), one.keep, key=KEEPING.index)
NOTHING = {"samples": (), "grid": ("samples",), "none": ("samples", "grid")}

# Snakemake's own report misses a picture that is deleted.
GRID = report(
    f"{MEASUREMENT}/grid.png",
    caption="../report/grid.rst",
    category="Samples",
    labels=labels,
)

for keep, dropped in NOTHING.items():

    rule:
        name:
            "generate" if keep == "samples" else f"generate_{keep}"
        input:
            unpack(drawn_from),
            status=f"{RUN}/train/status.json",
        output:
            facts=f"{MEASUREMENT}/generate.json",
            samples=maybe_temp(f"{MEASUREMENT}/samples.npz", "samples" in dropped),
            grid=maybe_temp(GRID, "grid" in dropped),
        log:
            f"{RUN}/logs/generate-{{measurement}}.log",
        wildcard_constraints:
            measurement=kept_as(keep),
        conda:
            "../../envs/compute.yaml"
        threads: STUDY.machine.threads
        resources:
            gpu=min(1, GPUS),
            batch=STUDY.machine.sampling_batch,
            decoder=decoder_path,
        params:
            run=subpath(input.status, ancestor=2),
            out=subpath(output.facts, parent=True),
            measurement=lambda wildcards: planned(wildcards).cell.key,
            decoder=decoder_held,
            code=generation_code,
        shell:
            "python -m study generate --run-dir {params.run} --measurement {params.measurement:q} --batch {resources.batch} --decoder={resources.decoder:q} --code {params.code} --data {input.data} --out {params.out} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"


def measured_with(kind):
    """Samples, and what they are measured against with an extractor."""
    folders = {
        name: REFERENCE.format(reference=reference_of(dataset, kind))
        for name, dataset in STUDY.data.items()
    }

    def look(wildcards):
        folder = folders[RUNS[wildcards.run].spec.dataset.name]
        return {
            "samples": SAMPLES(wildcards),
            "reference": f"{folder}/reference.json",
            "features": FEATURES({"reference": Path(folder).name}),
        }

    return look


def asked(kind):
    """What an extractor is to measure of a measurement."""

    def protocol(wildcards):
        metrics = planned(wildcards).extractors[kind]
        return canonical_json({"extractor": kind, "metrics": list(metrics)})

    return protocol


for kind in STUDY.extractors:

    rule:
        name:
            f"evaluate_{kind}"
        input:
            unpack(measured_with(kind)),
            facts=f"{MEASUREMENT}/generate.json",
        output:
            metrics=f"{MEASUREMENT}/{kind}.json",
        log:
            f"{RUN}/logs/evaluate-{kind}-{{measurement}}.log",
        conda:
            "../../envs/compute.yaml"
        threads: STUDY.machine.threads
        resources:
            gpu=min(1, GPUS),
        params:
            reference=subpath(input.reference, parent=True),
            protocol=asked(kind),
            code=digest.stage("evaluate"),
        shell:
            "python -m study evaluate --samples {input.samples} --reference {params.reference} --protocol {params.protocol:q} --code {params.code} --out {output.metrics} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"


def facts_of(runs):
    """What says how samples were made, of all measurements of these runs."""
    return [
        f"{RESULTS}/runs/{run}/measurements/{one.name}/generate.json"
        for run in runs
        for one in RUNS[run].measurements
    ]


def metrics_of(runs):
    """The metrics of all measurements of these runs."""
    return [
        f"{RESULTS}/runs/{run}/measurements/{one.name}/{kind}.json"
        for run in runs
        for one in RUNS[run].measurements
        for kind in one.extractors
    ]


def grids_of(runs):
    """The pictures of the main measurement of each of these runs, where they are kept."""
    return [
        f"{RESULTS}/runs/{run}/measurements/{one.name}/grid.png"
        for run in runs
        for one in RUNS[run].measurements[:1]
        if KEPT[one.name] != "none"
    ]
