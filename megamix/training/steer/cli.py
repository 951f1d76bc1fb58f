"""The command ``megamix steer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def steer(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory; of another trainer its megamix folder.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="DOMAIN=W", help="This weight now; the others keep their ratios. Repeatable."),
    ] = None,
    mixture: Annotated[
        str | None,
        typer.Option(
            metavar="MIXTURE",
            help="These weights now: natural, uniform, {DOMAIN: W} or {documents: ...} as in a config, or a file.",
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=W", help="This weight until unpinned; the rule divides the rest. Repeatable."),
    ] = None,
    unpin: Annotated[list[str] | None, typer.Option(metavar="DOMAIN", help="No longer pin it. Repeatable.")] = None,
    bounds: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=LOW..HIGH", help="Keep its weight within these; 0..1 lifts them. Repeatable."),
    ] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Weights stay as they are, whatever the rule asks for.")] = False,
    release: Annotated[bool, typer.Option("--release", help="End --hold.")] = False,
    mixer: Annotated[str | None, typer.Option(metavar="CONFIG", help="Another rule, as in a config.")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last command back.")] = False,
    at_step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Steps before the effect; default: as soon as can be.")
    ] = None,
    ramp: Annotated[
        float | None, typer.Option(metavar="TOKENS", min=1, help="Tokens over which the weights approach it.")
    ] = None,
    note: Annotated[str, typer.Option(help="Why; kept with the command.")] = "",
    wait: Annotated[bool, typer.Option(help="Wait for the run's answer.")] = True,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="How long.")] = 600.0,
) -> None:
    """Change the mixture of a run while it trains, from any machine that sees its directory. A run that nobody trains
    heeds the command when it is started again.

    Example: megamix steer runs/demo --pin code=0.3 --ramp 1e6 --note 'too little code'
    """
    from megamix.core.errors import InputError
    from megamix.training.steer.steer import Wishes
    from megamix.training.steer.steer import steer as run_steer

    if hold and release:
        raise InputError("--hold and --release are opposites. Give one of them.")
    wishes = Wishes(
        set=set_ or [],
        mixture=mixture,
        pin=pin or [],
        unpin=unpin or [],
        bounds=bounds or [],
        hold=True if hold else False if release else None,
        mixer=mixer,
        undo=undo,
        at_step=at_step,
        ramp=ramp,
        note=note,
    )
    for line in run_steer(run, wishes, timeout if wait else None):
        typer.echo(line)
