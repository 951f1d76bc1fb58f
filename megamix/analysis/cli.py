"""``megamix init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="manifest.json, or its folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; default: NAME.yaml here, after the data's folder.")
    ] = None,
) -> None:
    """Write a first config for a data set, with comments: a model, steps and a rule that fit its tokens and domains. It
    asks nothing, and replaces nothing.

    Example: megamix init data/mine --out mine.yaml
    """
    from megamix.analysis.first_config import write_first_config

    path = write_first_config(data, out)
    typer.echo(f"{path}: read it, then: megamix doctor {path}; megamix train {path}")
