# From the files of all runs to tables, figures and executed notebooks. A run that diverged is a
# row like any other.


rule aggregate:
    input:
        status=collect(f"{RUN}/train/status.json", run=CHOSEN),
        samples=facts_of(CHOSEN),
        metrics=metrics_of(CHOSEN),
        points=collect(f"{RESULTS}/points/{{point}}.json", point=POINTED),
        probes=[path for kind in PROBED for path in probe_results(kind)],
    output:
        summary=report(
            f"{TABLES}/summary.csv",
            caption="../report/summary.rst",
            category="Tables",
            labels={"table": "summary"},
        ),
        comparisons=report(
            f"{TABLES}/comparisons.csv",
            caption="../report/comparisons.rst",
            category="Tables",
            labels={"table": "comparisons"},
        ),
        stability=report(
            f"{TABLES}/stability.csv",
            caption="../report/stability.rst",
            category="Tables",
            labels={"table": "stability"},
        ),
        measures=report(
            f"{TABLES}/measures.csv",
            caption="../report/measures.rst",
            category="Tables",
            labels={"table": "measures"},
        ),
        cost=report(
            f"{TABLES}/cost.csv",
            caption="../report/cost.rst",
            category="Tables",
            labels={"table": "cost"},
        ),
        qc=report(
            f"{TABLES}/qc.csv",
            caption="../report/qc.rst",
            category="Tables",
            labels={"table": "qc"},
        ),
        pairs=f"{TABLES}/stability_pairs.csv",
        runs=f"{TABLES}/runs.csv",
        metrics=f"{TABLES}/metrics.csv",
        measurements=f"{TABLES}/measurements.csv",
        curves=f"{TABLES}/curves.csv",
        points=f"{TABLES}/points.csv",
        identities=f"{TABLES}/identities.csv",
        dynamics=f"{TABLES}/dynamics.parquet",
        oscillation=f"{TABLES}/oscillation.csv",
        probes=[f"{TABLES}/probe_{kind}.parquet" for kind in PROBED],
    log:
        f"{RESULTS}/logs/aggregate.log",
    conda:
        "../../envs/report.yaml"
    params:
        manifest=MANIFEST,
        results=subpath(output.runs, ancestor=2),
        out=subpath(output.runs, parent=True),
        shown=SHOWN,
        code=digest.stage("aggregate"),
    shell:
        "python -m study aggregate --manifest {params.manifest} --results {params.results} --out {params.out} > {log} 2>&1"


rule figures:
    input:
        rules.aggregate.output,
        runs=f"{TABLES}/runs.csv",
    output:
        figures=report(
            directory(FIGURES),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        f"{RESULTS}/logs/figures.log",
    conda:
        "../../envs/report.yaml"
    params:
        tables=subpath(input.runs, parent=True),
        results=subpath(input.runs, ancestor=2),
        code=digest.stage("figures"),
    shell:
        "python -m study figures --tables {params.tables} --results {params.results} --out {output.figures} > {log} 2>&1"


rule notebook:
    input:
        rules.aggregate.output,
        notebook=f"{NOTEBOOKS}/{{notebook}}.ipynb",
    output:
        executed=f"{RESULTS}/notebooks/{{notebook}}.ipynb",
        html=report(
            f"reports/{STUDY.study}/notebooks/{{notebook}}.html",
            caption="../report/notebook.rst",
            category="Notebooks",
            labels={"notebook": "{notebook}"},
        ),
    log:
        f"{RESULTS}/logs/notebook-{{notebook}}.log",
    conda:
        "../../envs/report.yaml"
    params:
        parameters=NOTEBOOK,
        code=notebook_code,
    shell:
        "python -m study notebook --notebook {input.notebook} --out {output.executed} --html {output.html} --parameters {params.parameters:q} > {log} 2>&1"
