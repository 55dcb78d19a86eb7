"""What does the log of a training say, whichever shorter training it went on from?

A row stands for ``every`` steps. Its means come from sums that are added pairwise over aligned
blocks of steps, so the sums of two rows make, bit for bit, those of one row over twice as many
steps: the log of a shorter training, whose rows are closer together, becomes that of a longer one.
"""

import math
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from study.training.dynamics import BINS, LossByNoise, Table


def spacing(steps: int) -> int:
    """Steps per row unless the machine says otherwise: a power of two with 100 to 200 rows."""
    return 2 ** int(math.log2(max(1.0, steps / 100)))


class PairwiseSum:
    """A running sum whose parts are added pairwise.

    ``parts`` are blocks (steps, sums), the largest first; two of the same size become one. Below
    ``unit`` steps, the odd factor of the spacing, steps are added one after another.
    """

    def __init__(self, spacing: int) -> None:
        self.unit = spacing // (spacing & -spacing)
        self.parts: list[tuple[int, Tensor]] = []

    def add(self, values: Tensor, steps: int = 1) -> None:
        """Add the sums over the next ``steps`` steps."""
        if self.parts and self.parts[-1][0] % self.unit:
            before, total = self.parts.pop()
            steps, values = before + steps, total + values
        while self.parts and self.parts[-1][0] == steps and steps % self.unit == 0:
            _, total = self.parts.pop()
            steps, values = 2 * steps, total + values
        self.parts.append((steps, values))

    def total(self) -> Tensor:
        """The sums over all steps so far."""
        parts = [values for _, values in reversed(self.parts)]
        return sum(parts[1:], start=parts[0])


class Log:
    """Rows for every ``every``-th step, and means of the losses over the steps since the last row.

    The last step of a training has a row too. Where it is not on the grid, its means are those of
    the steps that no row has yet; they stay in the sum, so that a longer training goes on with it.
    """

    def __init__(self, every: int) -> None:
        self.every, self.rows = every, Table()
        self.means: list[tuple[int, Tensor]] = []
        self.window = PairwiseSum(every)

    def add(self, step: int, loss: float, sigma: Tensor, losses: Tensor) -> None:
        """Note the loss of a step, and per-sample noise levels and losses [B] on the CPU."""
        noted = LossByNoise()
        noted.add(sigma, losses)
        first = torch.tensor([1.0, loss], dtype=torch.float64)
        self._extend(step, torch.cat([first, noted.sums, noted.counts]), 1)

    def _extend(self, step: int, values: Tensor, steps: int) -> None:
        self.window.add(values, steps)
        if step % self.every == 0:
            self.means.append((step, self.window.total()))
            self.window = PairwiseSum(self.every)

    def table(self) -> Table:
        """All rows, in the order of the steps."""
        columns, means, rows = self.rows.columns, list(self.means), []
        last = columns["step"][-1] if columns["step"] else 0
        if last % self.every and self.window.parts:
            means.append((last, self.window.total()))
        for step, sums in means:
            count, total, *by_noise = sums.tolist()
            rows.append((step, "loss", total / count, ""))
            pairs = zip(BINS, by_noise[: len(BINS)], by_noise[len(BINS) :], strict=True)
            rows += [(step, "loss_by_noise", x / n, name) for name, x, n in pairs if n]
        rows += zip(*(columns[key] for key in ("step", "quantity", "value", "where")), strict=True)
        table = Table()
        for row in sorted(rows, key=lambda row: row[0]):  # those of one step stay in their order
            table.add(*row)
        return table

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "every": self.every,
            "rows": self.rows.columns,
            "steps": [step for step, _ in self.means],
            "sums": torch.stack([sums for _, sums in self.means]) if self.means else None,
            "window": list(self.window.parts),
        }

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Log":
        """The log of a checkpoint, with its spacing."""
        log = cls(state["every"])
        log.rows.columns = state["rows"]
        sums = () if state["sums"] is None else state["sums"].unbind()
        log.means = list(zip(state["steps"], sums, strict=True))
        log.window.parts = [(steps, values) for steps, values in state["window"]]
        return log

    def coarser(self, every: int, last: int) -> "Log | None":
        """The log with one row for ``every`` so many steps; ``None`` where rows do not fit.

        They do where the new spacing is the present one times a power of two. A row that is not on
        the grid is left out, unless it is that of step ``last``.
        """
        ratio, rest = divmod(every, self.every)
        if rest or ratio & (ratio - 1):
            return None
        log, columns = Log(every), self.rows.columns
        for step, sums in self.means:
            log._extend(step, sums, self.every)
        for steps, values in self.window.parts:
            log.window.add(values, steps)
        kept = [step % every == 0 or step == last for step in columns["step"]]
        log.rows.columns = {key: list(compress(one, kept)) for key, one in columns.items()}
        return log
