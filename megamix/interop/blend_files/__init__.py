"""``megamix blend``: token files and blends of Megatron and DoReMi, adopted and exported."""
