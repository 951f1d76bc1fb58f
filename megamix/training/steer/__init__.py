"""``megamix steer``: checks a command, adds it to a run's journal, and waits for the run's answer."""
