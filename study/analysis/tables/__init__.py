"""The tables of a study: one row per run, per run x metric, per arm, per pair.

``aggregate`` writes them, from what the runs left on disk (``found``); ``read`` gives them back.
Between the two, each module makes the rows of one question.
"""
