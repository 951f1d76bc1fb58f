"""Text to token files: reading, dividing the work, tokenising, writing, resuming; begin with `pipeline`."""
