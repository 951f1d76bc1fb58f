"""Adapters for other trainers: Megatron-LM (`megatron_lm`), Hugging Face (`hugging_face`) and torchtitan, over
`host`."""
