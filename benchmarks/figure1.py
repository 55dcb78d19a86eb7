"""ScaleLong's figure 1 from the runs of the study scalelong-figure1, beside the paper's curves.

    python benchmarks/figure1.py results/scalelong-figure1 reports/scalelong-figure1

Reads the study's tables (made here where the workflow has not come so far: runs that were stopped
on their way are drawn as far as they went), draws the norm of the decoder's last feature over the
whole batch, writes its values down, and prints the levels and oscillations of all decoder blocks
over the last 500 steps that all runs have in common.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from study import published
from study.analysis import statistics, style
from study.analysis.figures.skips import feature_norms
from study.analysis.tables.aggregate import aggregate
from study.analysis.tables.read import Tables
from study.files import write_text

WINDOW = 500
NORM = "decoder_frobenius_after"
PAPER = {"none": "Org", "inv_sqrt2": "1/sqrt2-CS", "cs(0.5)": "CS", "ls": "LS"}


def wobbles(results: Path, run: str, last: int) -> pd.DataFrame:
    """Level and oscillation (spread about a line, over the level) of a run's curves in the window;
    rows are (quantity, where)."""
    frame = pd.read_parquet(results / "runs" / run / "train" / "dynamics.parquet")
    frame = frame[frame["quantity"].isin([NORM, "grad_norm", "loss"])]
    wide = frame.pivot(index="step", columns=["quantity", "where"], values="value")
    late = wide[(wide.index > last - WINDOW) & (wide.index <= last)]
    level = late.mean()
    spread = statistics.wobble(late.index.to_numpy(), late.to_numpy())
    return pd.DataFrame({"level": level, "oscillation": spread / level.to_numpy()})


def curves(tables: Tables, results: Path) -> pd.DataFrame:
    """The norm of the outermost decoder block's output at every logged step, a column per run."""
    columns = {}
    for row in tables.runs.itertuples():
        frame = pd.read_parquet(results / "runs" / row.run / "train" / "dynamics.parquet")
        frame = frame[(frame["quantity"] == NORM) & (frame["where"] == "1")]
        columns[f"{row.line} {row.skip_scaling}"] = frame.set_index("step")["value"]
    return pd.DataFrame(columns)


def table(tables: Tables, results: Path) -> str:
    """Every arm against ``none`` of its depth, in Markdown, beside the paper's factors."""
    head = ["", "", "outermost block", "all decoder blocks", "oscillation: feature", "gradient"]
    head += ["loss", "paper, 5K", "paper, 28K"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    dynamics = tables.dynamics[tables.dynamics["quantity"] == NORM]
    for line, runs in tables.runs.groupby("line"):
        ends = dynamics[dynamics["run"].isin(runs["run"])].groupby("run")["step"].max()
        by_scaling = dict(zip(runs["skip_scaling"], runs["run"]))
        found = {s: wobbles(results, run, ends.min()) for s, run in by_scaling.items()}
        plain = found["none"]
        for scaling in style.order_scalings(found):
            one = found[scaling]
            level, spread = (one[c] / plain[c] for c in ("level", "oscillation"))
            blocks = np.exp(np.log(level[NORM]).mean())
            cells = [f"× {level[NORM, '1']:.2f}", f"× {blocks:.2f}", f"× {spread[NORM, '1']:.2f}"]
            cells += [f"× {spread[quantity, '']:.2f}" for quantity in ("grad_norm", "loss")]
            if scaling == "none":
                cells = [f"{plain.loc[(NORM, '1'), 'level']:.0f}", "1"]
                keys = [(NORM, "1"), ("grad_norm", ""), ("loss", "")]
                cells += [f"{plain.loc[key, 'oscillation']:.3f}" for key in keys]
            for setting in ("5K iters", "28K iters"):
                paper = {
                    number.method: number.number
                    for number in published.numbers(paper="ScaleLong", table_or_figure="Fig 1")
                    if number.setting == setting and number.model.endswith("=" + line[-2:])
                }
                known = paper.get(PAPER.get(scaling, ""))
                first = paper.get("Org")
                if scaling == "none":
                    cells.append(f"{first * 1e4:.0f}" if first else "")
                else:
                    cells.append(f"× {known / first:.2f}" if known and first else "")
            name = style.scaling_label(scaling)
            lines.append("| " + " | ".join([style.line_label(line), name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    aggregate(chosen.results / "study.json", chosen.results, chosen.results / "tables")
    tables = Tables.read(chosen.results / "tables", chosen.results)
    chosen.out.mkdir(parents=True, exist_ok=True)
    style.save(feature_norms(tables, NORM), chosen.out / "figure1", ("png",))
    csv = curves(tables, chosen.results).to_csv(float_format="%.6g", lineterminator="\n")
    write_text(chosen.out / "figure1.csv", csv)
    print(table(tables, chosen.results))


if __name__ == "__main__":
    main()
