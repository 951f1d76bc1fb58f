"""Views of plans and recorded runs: checks, live view, comparisons, replays, plots and reports.

Nothing here writes the state of a run.
"""
