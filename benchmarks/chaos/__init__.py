"""Chaos: what is left of a run whose processes are killed, one a trial, while they hold live work.

    python -m benchmarks.chaos --root DIR [--trials 50] [--most N]

`simulated` has engines that answer from a hash, `driver` runs the pipeline on them, `trial` kills and compares, `page` reports.
"""
