"""Several runs that find a mixture: DoReMi and swarms, here or on Slurm. Each study is a list of `tasks`."""
