"""The code that the README shows."""

from __future__ import annotations

import re

from commands import ROOT


def readme_code(containing: str) -> str:
    """The one Python block of the README that has ``containing`` in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block
