"""Runs looked at: checks of a plan, live views, comparisons, replays, plots and reports.

Nothing here writes the state of a run.
"""
