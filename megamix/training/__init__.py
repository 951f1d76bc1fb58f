"""One run, start to end: config, plan, trainer, data loop, guard, evaluation, checkpoints, records, job."""
