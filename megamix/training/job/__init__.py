"""The processes of a run: its ranks on this machine, their lock, signals and watchdog."""
