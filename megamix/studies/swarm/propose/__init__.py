"""Proposals of a mixture by a fitted law, and updates of an earlier proposal."""
