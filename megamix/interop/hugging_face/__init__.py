"""Models in Hugging Face's form, written."""
