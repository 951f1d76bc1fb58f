"""The training engines: what runs the pipeline schedule, the backward pass and the optimizer."""
