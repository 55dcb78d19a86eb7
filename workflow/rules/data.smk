# From a source to the data set's archive, and once per archive its reference features.


rule convert:
    output:
        archive=ensure(ARCHIVE, non_empty=True),
        described=DESCRIBED,
    log:
        f"{ARCHIVE}.log",
    conda:
        "../../envs/compute.yaml"
    resources:
        source=STUDY.dataset.path or "",
        on_error=STUDY.dataset.on_error,
    params:
        spec=DATASET,
        code=conversion_code(STUDY.dataset),
        source=SOURCES.get(ARCHIVE, ""),
    shell:
        "python -m study convert --spec {params.spec:q} --source-path={resources.source:q} --on-error {resources.on_error} --code {params.code} --out {output.archive} > {log} 2>&1"


if MEASURED_ARCHIVE != ARCHIVE:

    use rule convert as convert_reference with:
        output:
            archive=ensure(MEASURED_ARCHIVE, non_empty=True),
            described=MEASURED_DESCRIBED,
        log:
            f"{MEASURED_ARCHIVE}.log",
        resources:
            source=MEASURED.path or "",
            on_error=MEASURED.on_error,
        params:
            spec=as_parameter(MEASURED, exclude=arms.NOT_SETTINGS),
            code=conversion_code(MEASURED),
            source=SOURCES.get(MEASURED_ARCHIVE, ""),


rule extractor:
    input:
        data=ancient(ARCHIVE),
        described=DESCRIBED,
    output:
        weights=CLASSIFIER,
    log:
        f"{CLASSIFIER}.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads
    params:
        seed=STUDY.evaluation.seed,
        code=digest.stage("extractor"),
    shell:
        "python -m study extractor --data {input.data} --out {output.weights} --seed {params.seed} --threads {threads} > {log} 2>&1"


rule reference:
    input:
        data=ancient(MEASURED_ARCHIVE),
        described=MEASURED_DESCRIBED,
        weights=EXTRACTOR_WEIGHTS,
    output:
        reference=f"{REFERENCE}/reference.json",
        features=f"{REFERENCE}/features.safetensors",
    log:
        f"{REFERENCE}.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=min(1, GPUS),
        weights=GIVEN_WEIGHTS,
    params:
        out=subpath(output.reference, parent=True),
        extractor=STUDY.evaluation.extractor,
        weights=WEIGHTS_HELD,
        code=digest.stage("reference"),
    shell:
        "python -m study reference --data {input.data} --extractor {params.extractor} --weights={input.weights:q}{resources.weights:q} --out {params.out} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"
