"""Mixtures of a swarm's members."""
