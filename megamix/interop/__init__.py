"""Exchange with other projects: their trainers, models in Hugging Face's form, blend files of Megatron and DoReMi."""
