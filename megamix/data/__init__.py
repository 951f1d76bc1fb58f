"""Token files to the batch of a step: token files, blend, sampler and loader."""

from typing import TYPE_CHECKING

from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import Manifest

if TYPE_CHECKING:
    from megamix.data.loader import WindowReader

__all__ = ["Blend", "Manifest", "WindowReader"]


def __getattr__(name: str) -> object:
    # Not at once: the loader needs torch, which takes seconds to import and which most commands do without.
    if name == "WindowReader":
        from megamix.data.loader import WindowReader

        return WindowReader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
