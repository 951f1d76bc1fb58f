"""Adapters for other trainers: Megatron-LM (`megatron_lm`) and Hugging Face (`hugging_face`), over `host`."""
