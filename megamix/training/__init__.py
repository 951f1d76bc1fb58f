"""Training: one run, from its config to its record.

run          `megamix train`: checks the plan, starts the ranks or is one (job/)
trainer      the loop of one rank: batch, engine, sums, record, checkpoints
data_loop    batches out, loss sums in, new weights to the sampler
guard        ends the run, or leaves a step out, where a loss goes wrong
evaluate     per-domain validation loss; domain_losses: its standard error by documents
reference/   reference losses for DoReMi
checkpoints/ state of a run on disk, and resume
plan         a config with its data and ranks, checked; mix_plan: its mixture
records/     what a run writes
config       every key of a run; mixture: the kinds of its mixture; objective: what the model is to be good at
"""
