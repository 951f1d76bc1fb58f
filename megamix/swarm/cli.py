"""``megamix swarm``: the steps from token counts to a proposed mixture, each alone or all in one."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Mixtures from a swarm of proxy runs: sample, train, fit, propose; and keep them as the domains change.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def swarm() -> None:
    """Without a command of its own: help."""
