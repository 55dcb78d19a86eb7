# The page that people read first: one file, which opens without a network.


rule report:
    input:
        rules.aggregate.output,
        runs=f"{TABLES}/runs.csv",
        figures=rules.figures.output,
        grids=grids_of(CHOSEN),
        notebooks=collect(rules.notebook.output.html, notebook=STUDY.notebooks),
    output:
        page=report(
            REPORT,
            caption="../report/overview.rst",
            category="Overview",
            labels={"page": "report"},
        ),
    log:
        f"{RESULTS}/logs/report.log",
    conda:
        "../../envs/report.yaml"
    params:
        manifest=MANIFEST,
        results=subpath(input.runs, ancestor=2),
        out=subpath(output.page, parent=True),
        shown=SHOWN,
        code=digest.stage("report"),
    shell:
        "python -m study report --manifest {params.manifest} --results {params.results} --out {params.out} > {log} 2>&1"
