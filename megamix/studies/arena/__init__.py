"""``megamix arena``: arms, seeds and traps in one config, and what their runs say about the arms."""
