"""Which sample of which domain stands at which position: the blend as a function of position and weights."""
