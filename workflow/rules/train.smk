# One run of one arm. Its resumable state lies in a folder that is no declared output, so that it
# outlives a failed job; status.json is written last. The weights of an arm that names an official
# checkpoint are imported instead. (exec: a signal that reaches all processes of a job would end a
# shell at once, and with it the job, while the trainer still saves.)


rule train:
    input:
        data=archive,
        described=described,
    output:
        status=f"{RUN}/train/status.json",
        weights=f"{RUN}/train/weights.safetensors",
        raw=f"{RUN}/train/raw.safetensors",
        dynamics=f"{RUN}/train/dynamics.parquet",
        timing=f"{RUN}/train/timing.parquet",
    log:
        f"{RUN}/logs/train.log",
    conda:
        "../../envs/compute.yaml"
    threads: STUDY.machine.threads * STUDY.machine.processes
    resources:
        gpu=min(STUDY.machine.processes, GPUS),
        machine=SPEED,
        source=checkpoint_path,
    params:
        out=subpath(output.status, parent=True),
        state=f"{RUN}/state",
        spec=training_spec,
        checkpoint=checkpoint_held,
        code=training_code,
        stop_file=STOP_FILE,
    shell:
        "exec python -m study train --spec {params.spec:q} --code {params.code} --machine {resources.machine:q} --checkpoint={resources.source:q} --data {input.data} --out {params.out} --state {params.state} --stop-file {params.stop_file} --threads {threads} --gpus {resources.gpu} > {log} 2>&1"
