"""Tables and figures of finished runs, or of sweeps of them.

    python -m experiments.report DIR [DIR ...] [--out=DIR]

Every folder below DIR that holds a metrics.jsonl is a run. Writes report.md, report.csv
and accuracy.png into --out (default: the first DIR).
"""
