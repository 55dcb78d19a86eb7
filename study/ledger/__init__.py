"""What Snakemake and people are told: digests, what there is, what is to do and what it costs.

Nothing here imports torch or pandas before it must.
"""
