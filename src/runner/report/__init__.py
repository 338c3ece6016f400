"""Reports: runs and sweeps as one HTML file that anybody can open, offline, on any screen.

`facts` reads what a run's folder holds, `charts` says what is shown of it, `plots` draws, `page` puts it on a page.
"""

from runner.report.charts import charts_of
from runner.report.facts import RunFacts, read_benchmarks, read_comparisons, read_runs
from runner.report.page import render

__all__ = ["RunFacts", "charts_of", "read_benchmarks", "read_comparisons", "read_runs", "render"]
