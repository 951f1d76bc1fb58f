"""Several runs that find a mixture: DoReMi, swarms; here or on Slurm."""
