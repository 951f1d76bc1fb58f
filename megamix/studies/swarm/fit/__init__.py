"""The law of a swarm: tables of mixtures and metrics in, a cross-validated fit out."""
