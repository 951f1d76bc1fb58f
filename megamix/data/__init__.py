"""Token files to the batch of a step: token files, blend, sampler and loader."""

from megamix.data.blend.blend import Blend

__all__ = ["Blend"]
