"""megamix inside other people's trainers: Megatron-LM's (`megatron_lm`) and Hugging Face's (`hugging_face`)."""
