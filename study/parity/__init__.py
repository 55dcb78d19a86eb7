"""Does this package compute what the official implementations compute?

A golden case is a recorded run of one of them: ``<case>.json`` (arguments, tolerance) and
``<case>.safetensors`` (``weights/...``, ``in/...``, ``out/...``). The package looks at the others
and none of them at it, so that it is part of no stage's code.

``case`` reads one, ``kinds`` knows who computes it, ``tolerance`` by how much an output may differ,
``judge`` compares and shows, ``coverage`` says which option is exercised where. The runners:
``networks``; ``edm``, ``vpsde`` and ``ddpm`` for the losses, targets and samplers of one published
code each; ``metrics``.
"""
