"""Legs of a run that another leg continues with something changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.state import RunState
from megamix.training.data_loop import MixedData
from megamix.training.plan import Plan
from megamix.training.records.recorded_run import CONFIG
from megamix.training.records.run_record import RunRecord


def leave(data: MixedData, record: RunRecord, plan: Plan, folder: Path) -> RunState:
    """Ends a leg: what it took goes on record in ``folder``; returns its state, as a checkpoint would give it back."""
    state = replace(data.state(), fingerprints=fingerprints(plan))
    for report in data.take_reports():
        record.step(report)
    tokens = plan.config.batches.tokens(data.step)
    record.train({"step": data.step, "tokens": tokens, "loss": 5.0, "domain_loss": {}, "tokens_per_second": 1.0})
    record.close()
    data.close()
    (folder / CONFIG).write_text(yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False))
    return RunState.from_json(json.loads(json.dumps(state.to_json())), folder)
