"""Other projects' files: Megatron's token files and blends, DoReMi's domain weights; read here, and written."""
