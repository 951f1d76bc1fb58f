"""Token files in, the batch of a step out: token files, the blend, the sampler and the loader."""

from megamix.data.blend.blend import Blend

__all__ = ["Blend"]
