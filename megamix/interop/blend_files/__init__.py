"""``megamix blend``: import and export of token files and blends of Megatron and DoReMi."""
