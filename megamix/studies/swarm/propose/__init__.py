"""The mixture that a fitted law proposes, and updates of an earlier one."""
