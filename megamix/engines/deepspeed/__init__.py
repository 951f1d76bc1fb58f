"""The engine on DeepSpeed's pipeline."""
