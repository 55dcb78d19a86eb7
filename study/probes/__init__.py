"""Probes: measurements of a network or of targets that are not sample quality.

A probe is one file with ``measure(subject, options) -> Measured`` and its options, with its row, in
``study.spec.probes``, which also say what it looks at. Nothing here imports torch.
"""
