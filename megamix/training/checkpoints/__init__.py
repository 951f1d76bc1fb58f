"""Checkpoints of a run.

store         the folder of one: whole or not at all, every file with its hash
saving        taking one while the run goes on, in any engine's layout; loading it into an engine
tensor_files  safetensors written piece by piece
keeping       which ones stay
resume        which one a run goes on from, and whether it may
"""
