"""What a run writes down, and reading it again.

writing   tracking (metrics.jsonl, weights.jsonl), step_statistics, events, sinks; append_file under all of them
reading   recorded_run, ledger (which weights were in force where), history, summary, live_run (while it goes on)
several   labels, variants (runs that differ in the seed only), paired (differences with intervals)
"""
