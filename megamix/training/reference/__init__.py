"""Reference losses: a reference model's loss of every training token, computed once for runs that need excess
losses."""
