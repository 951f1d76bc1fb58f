"""The mixtures of a swarm's members."""
