"""From text to the samples of every step: prepare, indexed files, the blend, the sampler and the loader."""

from megamix.data.blend import Blend

__all__ = ["Blend"]
