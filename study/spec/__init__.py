"""The ground floor: what a study may say and what a run is, as data. Nothing here imports torch.

Each thing that has kinds has one file with the options and one row of every kind.
"""
