# Measurements that are not sample quality: a rule for each probe that the study names. What a probe
# looks at (runs, arms, the data set, the study) says what its rule waits for.

# None where Snakemake only looks (--report, --lint): workflow.cores would then refuse.
CORES = workflow.resource_settings.cores
PROBED = {probe.kind: probe for probe in STUDY.probes}


def probed_runs(kind):
    """The runs that a probe looks at; none for a probe of the data set or of the study."""
    return arms.probed(CHOSEN, PROBED[kind])


def probe_results(kind):
    """What a probe writes, for all of its subjects."""
    if PROBED[kind].subject in ("run", "arm"):
        return collect(f"{RUN}/probes/{kind}.json", run=probed_runs(kind))
    return [f"{RESULTS}/probes/{kind}.json"]


def weights(probe):
    """The weights that a probe of runs looks at."""
    return {"ema": AVERAGED, "raw": RAW}[getattr(probe, "weights", "ema")]


def alone(kind, share, whole):
    """What a probe asks for: its share, or all of this machine where it measures times."""
    return whole if kind == "cost" and workflow.nodes is None and whole else share


for kind, probe in PROBED.items():
    if probe.subject in ("run", "arm"):

        rule:
            name:
                f"probe_{kind}"
            input:
                data=archive,
                described=described,
                run=f"{RUN}/train/status.json" if probe.subject == "run" else [],
                weights=weights(probe) if probe.subject == "run" else [],
            output:
                facts=f"{RUN}/probes/{kind}.json",
                table=f"{RUN}/probes/{kind}.parquet",
            log:
                f"{RUN}/logs/probe-{kind}.log",
            conda:
                "../../envs/compute.yaml"
            threads: alone(kind, STUDY.machine.threads, CORES)
            resources:
                gpu=alone(kind, min(1, GPUS), GPUS * STUDY.machine.jobs_per_gpu),
                devices=min(1, GPUS),
                kernels=STUDY.machine.threads,
                machine=canonical_json(probe.speed_settings()),
            params:
                kind=kind,
                run=subpath(output.facts, ancestor=2),
                options=canonical_json(probe.settings()),
                spec=training_spec if probe.subject == "arm" else "{}",
                code=partial(probe_code, kind),
            shell:
                "python -m study probe {params.kind} --options {params.options:q} --machine {resources.machine:q} --run-dir {params.run} --spec {params.spec:q} --code {params.code} --data {input.data} --out {output.table} --threads {resources.kernels} --gpus {resources.devices} > {log} 2>&1"

    else:

        rule:
            name:
                f"probe_{kind}"
            input:
                data=ancient(archive_of(next(iter(STUDY.data)))),
                described=contents.described(archive_of(next(iter(STUDY.data)))),
            output:
                facts=f"{RESULTS}/probes/{kind}.json",
                table=f"{RESULTS}/probes/{kind}.parquet",
            log:
                f"{RESULTS}/logs/probe-{kind}.log",
            conda:
                "../../envs/compute.yaml"
            threads: STUDY.machine.threads
            resources:
                gpu=min(1, GPUS),
                machine=canonical_json(probe.speed_settings()),
            params:
                kind=kind,
                manifest=MANIFEST,
                networks=run_digest(NETWORKS) if probe.subject == "study" else "",
                options=canonical_json(probe.settings()),
                code=digest.probe(kind, SPECS if probe.subject == "study" else []),
            shell:
                "python -m study probe {params.kind} --options {params.options:q} --machine {resources.machine:q} --manifest {params.manifest} --code {params.code} --data {input.data} --out {output.table} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"
