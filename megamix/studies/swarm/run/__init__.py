"""The members of a swarm: their configs, their runs on this machine, their results."""
