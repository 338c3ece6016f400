"""Reports: runs and sweeps as one HTML file that anybody can open, offline, on any screen.

`facts` reads what a run's folder holds, `plots` draws, `page` puts both on a page.
"""

from runner.report.facts import RunFacts, read_comparisons, read_runs
from runner.report.page import render

__all__ = ["RunFacts", "read_comparisons", "read_runs", "render"]
