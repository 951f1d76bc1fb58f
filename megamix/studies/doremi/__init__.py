"""``megamix doremi``: reference run, its losses, proxy runs, weights and the target run."""
