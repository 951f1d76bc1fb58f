"""Where the configs that ship with megamix lie: in the checkout's ``configs/``, or inside the installed package."""

from __future__ import annotations

from pathlib import Path


def configs_dir() -> Path:
    """The folder of the shipped configs."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
