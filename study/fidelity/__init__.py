"""Fidelity: how close generated images are to a dataset.

`classifier` trains the small classifier whose features the extractor ``digits`` uses,
`extractors` is the registry of feature extractors, `reference` computes a dataset's features once,
`evaluate` turns samples into metrics with torch-fidelity, `metrics` holds the definitions of every
implementation that the published numbers come from.

Nothing is imported here: torch-fidelity brings torchvision along, and takes seconds.
"""
