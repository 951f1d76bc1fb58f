"""Engine on DeepSpeed's pipeline."""
