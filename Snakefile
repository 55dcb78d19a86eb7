# Reads config.yaml and says what the study consists of. The work is in workflow/rules/, the code
# that it calls in study/ (python -m study <verb>). What a run will cost: study plan.
include: "workflow/rules/reading.smk"


# A file that is given is the whole study: config.yaml is then not read, here or in any job.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/running.smk"
include: "workflow/rules/scheduling.smk"
include: "workflow/rules/hooks.smk"
include: "workflow/rules/starting.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/probe.smk"
include: "workflow/rules/analyse.smk"
include: "workflow/rules/report.smk"


# Every result by name, not the report alone: Snakemake makes no missing file that only leads to
# another one which is there. Large files (weights, samples) may go when a study is finished.
rule all:
    default_target: True
    input:
        collect(rules.train.output.status, run=CHOSEN),
        metrics_of(CHOSEN),
        [path for kind in PROBED for path in probe_results(kind)],
        collect(rules.notebook.output, notebook=STUDY.notebooks),
        rules.aggregate.output,
        rules.figures.output,
        rules.report.output,
