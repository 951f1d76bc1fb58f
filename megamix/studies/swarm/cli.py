"""``megamix swarm``: from token counts to a proposed mixture, each task alone or all in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megamix.core.command_help import WholeSentences, keys_option
from megamix.studies.slurm.resources import DryRun, Limit, Resources, Slurm, slurm_options

if TYPE_CHECKING:
    from megamix.core.config import Config

app = typer.Typer(
    cls=WholeSentences,
    help="Mixtures from a swarm of proxy runs: sample, train, fit, propose; and keep them as the domains change.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def swarm() -> None:
    """Without a command of its own: help."""


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, for example configs/swarm/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE | FILE.yaml]...", help="Keys of the config to change, or files of them."),
]
AtOnce = Annotated[int | None, typer.Option(min=1, help="Members at a time; default: swarm.run.at_once.")]


def _swarm_keys() -> type[Config]:
    from megamix.studies.swarm.config import SwarmStudyConfig

    return SwarmStudyConfig


@app.command()
def priors(
    data: Annotated[Path, typer.Argument(metavar="MANIFEST | DATA_DIR", help="What `megamix prepare` wrote.")],
    domains: Annotated[str | None, typer.Option(help="Some of its domains, with commas between; default: all.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write them to this file, as JSON.")] = None,
) -> None:
    """Count tokens: how many each domain of a data set has, and its share.

    Example: megamix swarm priors data/mini-pile --out priors.json
    """
    from megamix.core.text import Report
    from megamix.studies.swarm.priors import priors_of

    found = priors_of(data, domains.split(",") if domains else None)
    Report([found.table()]).show()
    if out is not None:
        found.write(out)


@app.command()
def generate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Draw the mixtures of a swarm and write a run's config for each, to RUN_DIR/members.

    Example: megamix swarm generate configs/swarm/demo.yaml swarm.generate.members=32
    """
    from megamix.studies.swarm.tasks import swarm as take

    raise typer.Exit(take(config, overrides or [], "generate"))


@app.command()
@slurm_options
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    at_once: AtOnce = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit those that are not done, as one array.")] = False,
    limit: Limit = 0,
    dry_run: DryRun = False,
    *,
    resources: Resources,
) -> None:
    """Run the members of a swarm that are not done: on this machine, or as a Slurm array (the same as `megamix launch
    --chain swarm RUN_DIR/members`).

    Example: megamix swarm run configs/swarm/demo.yaml --at-once 2
    """
    from megamix.studies.swarm.collect import FOLDER
    from megamix.studies.swarm.study import read_study
    from megamix.studies.swarm.tasks import submit_members
    from megamix.studies.swarm.tasks import swarm as take

    resources.refuse_without_slurm(dry_run=dry_run, slurm=slurm)
    if not slurm:
        raise typer.Exit(take(config, overrides or [], "run", at_once=at_once))
    folder = read_study(config, overrides or []).run_dir / FOLDER
    typer.echo(submit_members(folder, [], resources, limit, dry_run=dry_run), nl=False)


@app.command()
def collect(
    config: ConfigFile,
    overrides: Overrides = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Of the members that are done, if others are not.")
    ] = False,
) -> None:
    """Write what the members were trained on and their results: RUN_DIR/ratios.csv and metrics.csv.

    Example: megamix swarm collect configs/swarm/demo.yaml
    """
    from megamix.studies.swarm.collect import FOLDER
    from megamix.studies.swarm.collect import collect as take
    from megamix.studies.swarm.study import read_study

    study = read_study(config, overrides or [])
    typer.echo(take(study.run_dir / FOLDER, [], study.config.metrics, partial=partial))


@app.command("all")
@slurm_options
def all_tasks(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        Literal["priors", "generate", "run", "collect", "fit", "propose", "target"] | None,
        typer.Option(help="Run this task alone."),
    ] = None,
    at_once: AtOnce = None,
    slurm: Slurm = False,
    target_nodes: Annotated[int | None, typer.Option(min=1, help="Of the target run; default: --nodes.")] = None,
    target_gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Of the target run; default: --gpus-per-node.")
    ] = None,
    limit: Limit = 0,
    dry_run: DryRun = False,
    help_config: Annotated[bool, keys_option("swarm", _swarm_keys)] = False,
    *,
    resources: Resources,
) -> None:
    """A proposed mixture in one command: priors, generate, run, collect, fit, propose and, if asked for, a target run.
    What is done is passed over; what was interrupted goes on. The config is a run's, with the rest under the key swarm.

    Example: megamix swarm all configs/swarm/demo.yaml run_dir=runs/swarm
    """
    from dataclasses import replace

    from megamix.studies.swarm.tasks import submit_swarm
    from megamix.studies.swarm.tasks import swarm as take

    nodes, gpus = target_nodes or resources.nodes, target_gpus_per_node or resources.gpus_per_node
    target = replace(resources, nodes=nodes, gpus_per_node=gpus)
    target.refuse_without_slurm(only, dry_run=dry_run, slurm=slurm)
    if not slurm:
        raise typer.Exit(take(config, overrides or [], only, at_once=at_once))
    typer.echo(submit_swarm(config, overrides or [], resources, target, limit, dry_run=dry_run), nl=False)


def _fit_options(asked: bool) -> None:
    if asked:
        from megamix.core.config_help import config_help
        from megamix.studies.swarm.fit.config import FitConfig

        typer.echo(config_help(FitConfig))
        raise typer.Exit


@app.command()
def fit(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="For fit.json, fit.npz and plots.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options, for example regression=gp; --help-options lists them."),
    ] = None,
    ratios: Annotated[Path | None, typer.Option(help="ratios.csv: a run's name and its weight of each domain.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="metrics.csv: a run's name and its metrics.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A fit config of Olmix, which also names the files; or a YAML file of options.")
    ] = None,
    help_options: Annotated[
        bool,
        typer.Option(
            "--help-options", is_eager=True, callback=_fit_options, help="Print every option and its meaning."
        ),
    ] = False,
) -> None:
    """Fit a law to a swarm: how each metric follows from the mixture. Lower metrics are better.

    Example: megamix swarm fit --ratios ratios.csv --metrics metrics.csv --out runs/swarm regression=gp
    """
    from megamix.studies.swarm.fit.fit import report
    from megamix.studies.swarm.olmix import fit_from

    report(fit_from(out, ratios, metrics, config, options or []), out).show()


@app.command()
def propose(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="With the fit of `megamix swarm fit --out DIR`.")],
    kl: Annotated[float | None, typer.Option(help="How strongly the mixture is held near the prior [0.05].")] = None,
    priors: Annotated[
        Path | None, typer.Option(help="The prior: a file of `swarm priors`, or {domain: share}.")
    ] = None,
    use_natural_kl: Annotated[
        bool | None, typer.Option("--use-natural-kl", help="Hold it near the shares of the token counts instead.")
    ] = None,
    target_tokens: Annotated[float | None, typer.Option(help="Tokens of the run that the mixture is for.")] = None,
    repetition: Annotated[float | None, typer.Option(help="How often that run may read a domain [4].")] = None,
    token_counts: Annotated[Path | None, typer.Option(help="{domain: tokens}; default: those of the priors.")] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="METRIC=WEIGHT, of a metric or family, repeated; or a file of them.")
    ] = None,
    fixed_weight: Annotated[list[str] | None, typer.Option(help="DOMAIN=WEIGHT that is settled, repeated.")] = None,
    worst: Annotated[
        bool | None, typer.Option("--worst", help="The worst mixture within the bounds, in DIR/worst.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn at random [0].")] = None,
    resamples: Annotated[int | None, typer.Option(help="Resampled fits to find the mixture for again [20].")] = None,
) -> None:
    """Find the best mixture by a fit, near the prior and within bounds, and say how sure that is. What is not given
    comes from DIR/propose.json, where there is one. Writes DIR/mixture.json: `mixture: {from_swarm: DIR}`.

    Example: megamix swarm propose runs/swarm --target-tokens 1e9 --repetition 4
    """
    from megamix.studies.swarm.propose.propose import propose_in, read_options
    from megamix.studies.swarm.propose.question import read_pairs
    from megamix.studies.swarm.propose.report import report

    given = {
        "kl": kl, "priors": priors, "use_natural_kl": use_natural_kl, "target_tokens": target_tokens,
        "repetition": repetition, "token_counts": token_counts, "worst": worst, "seed": seed, "resamples": resamples,
        "objective": read_pairs("--objective", objective, or_file=True),
        "fixed_weight": read_pairs("--fixed-weight", fixed_weight),
    }  # fmt: skip
    options = read_options(directory, {key: value for key, value in given.items() if value is not None})
    report(*propose_in(directory, options)).show()


@app.command()
def update(
    config: Annotated[Path, typer.Argument(metavar="UPDATE.yaml", help="For example {previous: DIR, add: [law]}.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="The data set with the new domains, or its priors.json.")
    ],
    domains: Annotated[str | None, typer.Option(help="Some of its domains, with commas between; default: all.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write DIR/update.json.")] = None,
    tokens_per_run: Annotated[float | None, typer.Option(help="Tokens of a proxy run, for the cost.")] = None,
) -> None:
    """Show an update of the domains and its cost: what is frozen, what is free, and the proxy runs against finding all
    weights anew. Where nothing is free (a removal), DIR/mixture.json is written, too.

    Example: megamix swarm update add_law.yaml data/new --out runs/swarm2
    """
    from megamix.studies.swarm.update import read_update, report, start_update

    plan = read_update(config, data, domains.split(",") if domains else None)
    report(plan, tokens_per_run).show()
    if out is not None and (path := start_update(plan, out)) is not None:
        typer.echo(f"\nNothing is to be found: the mixture is in {path}.")


@app.command()
def explain(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="With a mixture.json.")],
    domain: Annotated[
        str | None, typer.Argument(help="Origin of one domain's weight in each mixture, in words.")
    ] = None,
) -> None:
    """Show where the weights of a mixture came from, through the updates before it.

    Example: megamix swarm explain runs/swarm2 law
    """
    from megamix.studies.swarm.propose.proposal import read_proposal
    from megamix.studies.swarm.propose.report import explain as explained

    explained(read_proposal(directory), domain).show()
