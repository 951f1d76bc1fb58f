"""Logits that the gradient is written over: which may be, and who learns of it.

A storage that holds a gradient remembers the version of its tensors at that moment. A later call that reads it at the
same version, through whatever view, would take the gradient for logits.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

_VERSION = "_megamix_gradient_version"


def may_be_overwritten(logits_NV: Tensor) -> bool:
    """Returns whether each logit has its own memory, none of it a leaf's, which is a variable of the user.

    A part of another tensor is left alone too: autograd counts versions of whole tensors, so that a loss of each part
    would make the other's gradient an error. Autograd copies a part's gradient anyway.
    """
    owner = logits_NV if logits_NV._base is None else logits_NV._base
    return not owner.is_leaf and owner.numel() == logits_NV.numel() and logits_NV.stride(0) >= logits_NV.shape[1]


def announce_overwriting(logits_NV: Tensor) -> None:
    """Tells autograd, and the calls to come, that the logits become a gradient."""
    increment_version(logits_NV)
    setattr(logits_NV.untyped_storage(), _VERSION, logits_NV._version)


def refuse_overwritten(logits_NV: Tensor) -> None:
    """Raises RuntimeError if an earlier call has written a gradient over the logits, and nobody anything since."""
    version = getattr(logits_NV.untyped_storage(), _VERSION, None)
    if version is not None and not logits_NV.is_inference() and version == logits_NV._version:
        raise RuntimeError(
            "logits_NV hold the gradient that an earlier domain_cross_entropy wrote over them; pass keep_logits=True "
            "to that call, or take everything that reads the logits before it"
        )
