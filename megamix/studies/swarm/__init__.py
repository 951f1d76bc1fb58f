"""Mixtures from a swarm of proxy runs: sample mixtures, train a small model on each, fit a law, propose the best.

    priors -> generate -> run -> collect -> fit -> propose -> mixture: {from_swarm: DIR}

Source: Olmix, Chen et al., arXiv 2602.12237.
"""
