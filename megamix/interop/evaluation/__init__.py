"""``megamix evaluate``: the losses of any model on the domains of a data set."""
