"""Export of models in Hugging Face's form."""
