"""Training engines: pipeline schedule, backward pass and optimizer over the ranks of a job."""
