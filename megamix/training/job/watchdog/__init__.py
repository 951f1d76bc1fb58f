"""Ends every rank of a job, with the reason, when one of them is gone, silent or failed, or when nothing advances.

rank.py is one rank's part, judge.py who is well and why the job ends, heartbeat.py what they say to each other.
"""

from megamix.training.job.watchdog.rank import Watchdog

__all__ = ["Watchdog"]
