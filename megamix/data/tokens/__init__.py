"""Token files: Megatron's .bin/.idx format, the manifest of a data set, and tokenizers."""
