"""Engine on megatron.core."""
