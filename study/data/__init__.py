"""Datasets: archives to read (`Archive`), the order in which training sees them (`order`).

Converting a source into an archive is `study.data.convert.convert`.
"""

from study.data.archive import Archive
from study.data.order import order, reference_indices

__all__ = ["Archive", "order", "reference_indices"]
