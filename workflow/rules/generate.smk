# From a run's weights to its samples.


rule generate:
    input:
        status=f"{RUN}/train/status.json",
        weights=AVERAGED,
        raw=RAW,
        data=ancient(ARCHIVE),
        described=DESCRIBED,
    output:
        samples=f"{RUN}/generate/samples.npz",
        facts=f"{RUN}/generate/generate.json",
        grid=report(
            f"{RUN}/generate/grid.png",
            caption="../report/grid.rst",
            category="Samples",
            labels=labels,
        ),
    log:
        f"{RUN}/logs/generate.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=min(1, GPUS),
        batch=STUDY.generation.batch,
        decoder=DECODER,
    params:
        run=subpath(input.status, ancestor=2),
        out=subpath(output.samples, parent=True),
        protocol=GENERATION,
        decoder=DECODER_HELD,
        code=generation_code,
    shell:
        "python -m study generate --run-dir {params.run} --protocol {params.protocol:q} --batch {resources.batch} --decoder={resources.decoder:q} --code {params.code} --data {input.data} --out {params.out} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"
