"""A reference model's loss of every training token: computed once, read by runs that need excess losses."""
