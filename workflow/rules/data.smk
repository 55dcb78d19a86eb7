# From a source to a data set's archive, and once per archive and extractor its reference features.


rule convert:
    output:
        archive=ensure(ARCHIVE, non_empty=True),
        described=contents.described(ARCHIVE),
    log:
        f"{ARCHIVE}.log",
    conda:
        "../../envs/compute.yaml"
    resources:
        source=lambda wildcards: DATA[wildcards.dataset].path or "",
        on_error=lambda wildcards: DATA[wildcards.dataset].on_error,
    params:
        spec=lambda wildcards: as_parameter(DATA[wildcards.dataset], exclude=arms.NOT_SETTINGS),
        code=conversion_code,
        source=lambda wildcards: SOURCES.get(archive_of(wildcards.dataset), ""),
    shell:
        "python -m study convert --spec {params.spec:q} --source-path={resources.source:q} --on-error {resources.on_error} --code {params.code} --out {output.archive} > {log} 2>&1"


rule extractor:
    input:
        data=ancient(ARCHIVE),
        described=contents.described(ARCHIVE),
    output:
        weights=CLASSIFIER,
    log:
        f"{CLASSIFIER}.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads
    params:
        seed=lambda wildcards: STUDY.extractors["digits"].seed,
        code=digest.stage("extractor"),
    shell:
        "python -m study extractor --data {input.data} --out {output.weights} --seed {params.seed} --threads {threads} > {log} 2>&1"


rule reference:
    input:
        data=lambda wildcards: ancient(archive_of(of_reference(wildcards)[0])),
        described=lambda wildcards: str(contents.described(archive_of(of_reference(wildcards)[0]))),
        weights=lambda wildcards: extractor_weights(*of_reference(wildcards)[1:]),
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
        weights=lambda wildcards: given_weights(of_reference(wildcards)[1]),
    params:
        out=subpath(output.reference, parent=True),
        extractor=lambda wildcards: of_reference(wildcards)[1],
        weights=lambda wildcards: WEIGHTS_HELD[of_reference(wildcards)[1]],
        code=digest.stage("reference"),
    shell:
        "python -m study reference --data {input.data} --extractor {params.extractor} --weights={input.weights:q}{resources.weights:q} --out {params.out} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"


rule points:
    input:
        data=lambda wildcards: ancient(archive_of(of_reference(wildcards)[0])),
        reference=f"{REFERENCE}/reference.json",
        features=f"{REFERENCE}/features.safetensors",
    output:
        points=f"{RESULTS}/points/{{reference}}-{{images}}.json",
    log:
        f"{RESULTS}/logs/points-{{reference}}-{{images}}.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=min(1, GPUS),
    params:
        reference=subpath(input.reference, parent=True),
        metrics=lambda wildcards: POINTED[f"{wildcards.reference}-{wildcards.images}"],
        images=lambda wildcards: "" if wildcards.images == "all" else f"--images {wildcards.images}",
        code=digest.stage("points"),
    shell:
        "python -m study points --data {input.data} --reference {params.reference} {params.images} --metrics {params.metrics} --code {params.code} --out {output.points} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"
