"""``pretrain`` of Megatron-LM from core_v0.18 on, as far as its parameters (``megatron/training/training.py``)."""

from __future__ import annotations

from typing import Any


def pretrain_of_018(
    cfg_container: Any,
    train_valid_test_dataset_provider: Any,
    model_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    process_non_loss_data_func: Any = None,
    get_embedding_ranks: Any = None,
    get_position_embedding_ranks: Any = None,
    non_loss_data_func: Any = None,
    store: Any = None,
    inprocess_call_wrapper: Any = None,
) -> dict[str, Any]:
    """``pretrain`` of core_v0.18, as far as its parameters: what it was given."""
    return locals()


def pretrain_of_019(
    cfg_container: Any,
    train_valid_test_dataset_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    model_provider: Any = None,
    process_non_loss_data_func: Any = None,
    get_embedding_ranks: Any = None,
    get_position_embedding_ranks: Any = None,
    non_loss_data_func: Any = None,
    store: Any = None,
    inprocess_call_wrapper: Any = None,
    p2p_communicator: Any = None,
    pg_collection: Any = None,
    skip_model_parallel_init: Any = False,
) -> dict[str, Any]:
    """The same of core_v0.19 and main."""
    return locals()
