# From samples to metrics, against the data set's reference.


rule evaluate:
    input:
        samples=SAMPLES,
        facts=f"{RUN}/generate/generate.json",
        reference=f"{REFERENCE}/reference.json",
        features=FEATURES,
        weights=EXTRACTOR_WEIGHTS,
    output:
        metrics=f"{RUN}/evaluate/fidelity.json",
    log:
        f"{RUN}/logs/evaluate.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=min(1, GPUS),
        weights=GIVEN_WEIGHTS,
    params:
        reference=subpath(input.reference, parent=True),
        weights=WEIGHTS_HELD,
        protocol=EVALUATION,
        code=digest.stage("evaluate"),
    shell:
        "python -m study evaluate --samples {input.samples} --reference {params.reference} --protocol {params.protocol:q} --weights={input.weights:q}{resources.weights:q} --code {params.code} --out {output.metrics} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"
