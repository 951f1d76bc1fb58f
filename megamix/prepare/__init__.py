"""From text to token files: reading, dividing the work, tokenising, writing and going on after a kill; see `run`."""
