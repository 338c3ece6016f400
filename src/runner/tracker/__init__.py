"""Where a run's numbers go: always a local JSON-lines file, and Weights & Biases where it is wanted.

Both are projections of the store, which is the truth: trouble in here costs the run a line in its log, nothing else.

`tracking` is how a run does it; `local` and `wandb_tracker` take it down, `presentation` says what W&B shows of it.
"""

from runner.tracker.opening import FAILED, group_of, identity_of, open_tracker, tracking
from runner.tracker.presentation import TABLE_TEXT, flat
from runner.tracker.records import Ending, Table, Tracker
from runner.tracker.wandb_tracker import PENDING_POINTS, Identity

__all__ = [
    "FAILED",
    "PENDING_POINTS",
    "TABLE_TEXT",
    "Ending",
    "Identity",
    "Table",
    "Tracker",
    "flat",
    "group_of",
    "identity_of",
    "open_tracker",
    "tracking",
]
