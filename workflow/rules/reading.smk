# The study's file, read as strictly as everywhere else: Snakemake passes over a key that is given
# twice, and of a file that it cannot read it prints a stack.
import gc
import sys
from pathlib import Path

# All jobs of a large study are kept: to look for garbage among them takes a tenth of the time.
gc.set_threshold(1_000_000)
sys.path.insert(0, str(workflow.basedir))

from study.spec import study as declarations
from study.files import UserError


def stop_with(message):
    """End at once, one line per mistake; of an exception Snakemake would print the stack too."""
    for line in str(message).splitlines():
        print(f"study: {line}", file=sys.stderr)
    sys.exit(2)


if workflow.is_main_process:
    for path in map(Path, workflow.overwrite_configfiles or ["config.yaml"]):
        inside = path.is_absolute() and path.is_relative_to(Path.cwd())
        try:
            declarations.read(path.relative_to(Path.cwd()) if inside else path)
        except UserError as error:
            stop_with(error)
