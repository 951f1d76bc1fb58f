"""Weights, gradients and Adam's state that a DeepSpeed optimizer of any ZeRO stage holds on a rank.

| ZeRO | weights trained | Adam's state | gradients of a step |
|---|---|---|---|
| 0 | the parameters | of each parameter | `grad` of each parameter |
| 1, 2, the bf16 optimizer | this rank's fp32 share of each group | of the share | this rank's share |
| 3 | this rank's fp32 share of each parameter, in flat sub-groups | of each sub-group | this rank's share |
"""

from __future__ import annotations

from typing import Any

import torch

from megamix.engines.base import ParameterState

_MOMENTS = ("exp_avg", "exp_avg_sq")


def inner_adam(optimizer: Any) -> torch.optim.AdamW:
    """Returns the optimizer that DeepSpeed was given, without its wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def gradients(optimizer: Any, module: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the gradients that this rank's optimizer is about to apply."""
    if hasattr(optimizer, "averaged_gradients"):  # ZeRO: this rank's share of every group
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # the same in bf16
        return optimizer.fp32_groups_gradients_flat
    return [p.grad for p in module.parameters() if p.grad is not None]


def whole_state(optimizer: Any, parameter: torch.nn.Parameter) -> ParameterState:
    """Returns a parameter with its state; collective over the ranks that hold a share of it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _is_shared(parameter):
        weight: Any = safe_get_full_fp32_param(parameter)
        moments: Any = [safe_get_full_optimizer_state(parameter, moment) for moment in _MOMENTS]
        return ParameterState(weight, *moments)
    state = optimizer.state[parameter]
    return ParameterState(parameter.detach(), *(state[moment] for moment in _MOMENTS))


@torch.no_grad()
def set_whole_state(optimizer: Any, parameter: torch.nn.Parameter, whole: ParameterState) -> None:
    """Loads what `whole_state` returned; collective over the ranks that hold a share of the parameter."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        # All ranks hand over the same weight; rank 0's is taken.
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole.weight)
    else:
        parameter.copy_(whole.weight)
    if _is_shared(parameter):
        safe_set_full_fp32_param(parameter, whole.weight)
        for moment in _MOMENTS:
            safe_set_full_optimizer_state(parameter, getattr(whole, moment), moment)
        return
    for moment in _MOMENTS:
        optimizer.state[parameter][moment].copy_(getattr(whole, moment))


def reset_adam(optimizer: Any, steps: int) -> None:
    """Zeroes Adam's moments and sets its step count."""
    inner = inner_adam(optimizer)
    fused = inner.param_groups[0]["fused"]
    # ZeRO 3 shows a sub-group to Adam in its step alone.
    held = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    for parameter in held or [parameter for group in inner.param_groups for parameter in group["params"]]:
        inner.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device if fused else "cpu"),
            **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
        }
    if inner is not optimizer and held is None:
        # ZeRO links parameters to their fragments of Adam's state once, after the first parameter group's step,
        # when the other groups have no state yet; linking here, all groups have it, and a resumed run can fill it.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_shared(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
