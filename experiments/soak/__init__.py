"""A soak: random runs are killed, damaged and starved, and come to the same results.

`python -m experiments.soak --help` says more.
"""
