"""Megatron-LM arguments that the adapter refuses."""

from __future__ import annotations

from typing import Any

from megamix.core.errors import InputError
from megamix.interop.trainers.host import refuse_unlike
from megamix.training.plan import DataPlan

HOST = "Megatron-LM"


def check_args(args: Any) -> None:
    """Refuses arguments that the adapter does not support."""
    wanted = {
        "dataloader_type": ("external", "Give --dataloader-type external: the batches come from megamix."),
        "rampup_batch_size": (None, "Leave --rampup-batch-size out: a step is one global batch, always of one size."),
        "phase_transition_iterations": (None, "Leave --phase-transition-iterations out: use a mixture with stages."),
        "full_validation": (False, "Leave --full-validation out."),
        "multiple_validation_sets": (False, "Leave it out: the loss of every domain is reported as it is."),
        "mtp_num_layers": (None, "Multi-token prediction has losses of its own. Leave it out."),
        "step_batch_size_schedule": (None, "Leave it out: a step is one global batch, always of one size."),
        "reset_attention_mask": (False, "Attention is causal over whole samples here. Leave it out."),
        "dataloader_inter_document_masking": (False, "Attention is causal over whole samples here. Leave it out."),
        "sft": (False, "Samples are windows of token streams, without turns and packing. Leave it out."),
        "fim_data": (False, "Samples are read as they are. Leave it out."),
        "check_for_spiky_loss": (False, "The adapter's loss is not checked for spikes. Leave it out."),
        "hybrid_context_parallel": (False, "Samples are all of one length. Leave it out."),
        "perform_rl_step": (False, "The data are token files. Leave it out."),
        "logits_load_dir": (None, "The adapter has a loss of its own. Leave it out."),
        "export_kd_teacher_load": (None, "The adapter has a loss of its own. Leave it out."),
    }
    for option, (value, remedy) in wanted.items():
        refuse_unlike(HOST, f"--{option.replace('_', '-')}", getattr(args, option, value) or value, value, remedy)
    if getattr(args, "gtp_weight_remat_size", 1) != 1:
        raise InputError(f"{HOST}'s --tensor-parallel-num-weight-shards divides the data once more. Leave it out.")
    if getattr(args, "iterations_to_skip", None):
        raise InputError(f"{HOST}'s --iterations-to-skip skips steps without the mixer. Leave it out.")


def check_plan(args: Any, plan: DataPlan) -> None:
    """Refuses arguments that contradict the config about the data."""
    data = plan.config.data
    if data.within_documents:
        raise InputError(
            f"data.attention is document, but {HOST}'s attention is causal over whole samples here: the adapter makes no masks. "
            "Leave data.attention out, or train with megamix's own engines."
        )
    for option in ("seq_length", "eod_mask_loss", "reset_position_ids"):
        ours = getattr(data, option)
        refuse_unlike(
            HOST,
            f"--{option.replace('_', '-')}",
            getattr(args, option, ours),
            ours,
            f"Make it and data.{option} of the config the same.",
        )
    padded = getattr(args, "padded_vocab_size", None)
    if padded is not None and padded < plan.vocab_size:
        raise InputError(
            f"{HOST}'s padded vocabulary has {padded} entries, but the data's tokenizer knows {plan.vocab_size} token "
            f"ids. Give Megatron the data's tokenizer ({plan.manifest.folder}) or a larger --vocab-size."
        )
