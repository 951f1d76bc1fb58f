"""Watchdog: ends every rank of a job, with the reason, when one is gone, silent or failed, or when nothing advances.

rank.py is the part of each rank, judge.py decides whether and why the job ends, heartbeat.py has the messages.
"""

from megamix.training.job.watchdog.rank import Watchdog

__all__ = ["Watchdog"]
