"""Benchmarks that compare programs with each other within one run.

Every file whose name does not begin with an underscore holds one benchmark, and ends
with its `Bench` record. `_benches.BENCHES` lists the records.
"""
