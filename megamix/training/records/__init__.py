"""Records: what a run writes, and reading it back.

writing  run_record (metrics.jsonl, weights.jsonl), step_statistics, events, sinks
reading  recorded_run, ledger (weights by position), mean_weights
"""
