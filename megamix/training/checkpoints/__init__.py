"""Checkpoints of a run.

store    folder of a checkpoint: complete or absent, every file with its hash
state    what it keeps beside model and optimizer
saving   writing one beside training, in any engine's layout; loading it into an engine
keeping  which ones stay
resume   which one a run continues from, and whether it may
"""
