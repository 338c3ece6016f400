"""Benchmarks: what a server does under load, which concurrency suits it, and whether the answer can be believed.

`load` keeps requests in flight, `records` keeps what came of each, `levels` turns that into figures and audits them,
`ladder` says which level is next, `verdict` what follows, `sweeps` gathers the cells of a multirun.
"""

from runner.bench.benchmark import run_bench

__all__ = ["run_bench"]
