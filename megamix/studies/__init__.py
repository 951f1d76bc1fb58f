"""Several runs that find a mixture: DoReMi, swarms and the arena, here or on Slurm. Each study is a list of `tasks`."""
