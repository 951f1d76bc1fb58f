"""The ``megamix`` command. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from megamix import __version__
from megamix.analysis.cli import compare, init, inspect, plot, replay, report, why
from megamix.core.command_help import WholeSentences, keys_option
from megamix.core.errors import EXIT_BAD_INPUT, EXIT_FAILED, MegamixError
from megamix.core.packages import missing_package
from megamix.core.paths import paths_expanded
from megamix.core.text import shortened
from megamix.interop.blend_files.cli import app as blend
from megamix.prepare.cli import corpus, merge, prepare, verify
from megamix.studies.launch import Overrides, launch
from megamix.studies.slurm.resources import DryRun, Limit, PlanOnly, Resources, Slurm, slurm_options
from megamix.studies.swarm.cli import app as swarm
from megamix.training.steer.cli import steer

if TYPE_CHECKING:
    from megamix.core.config import Config


class _Commands(WholeSentences):
    groups: ClassVar = {
        "Data": ("corpus", "prepare", "merge", "verify", "blend"),
        "A run": ("init", "doctor", "train", "steer", "launch", "evaluate", "export"),
        "What happened in it": ("inspect", "plot", "report", "compare", "why", "replay"),
        "Several runs": ("arena", "swarm", "doremi", "reference"),
    }


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(blend, name="blend")
app.add_typer(swarm, name="swarm")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, for example configs/demo.yaml.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"megamix {__version__}")
        raise typer.Exit


def _key(key: str | None) -> None:
    if key is not None:
        from megamix.core.config_help import key_help
        from megamix.studies.config import AnyConfig

        typer.echo(key_help(AnyConfig, key))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
    help_config: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", is_eager=True, callback=_key, help="Print what a key of a config means: data.max_epochs, lr."
        ),
    ] = None,
) -> None:
    """Online data mixing for language-model pretraining."""


for _command in (corpus, prepare, merge, verify, init, inspect, plot, report, compare, why, replay):
    app.command()(_command)


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file, for example configs/demo.yaml.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="auto, never, or a checkpoint's folder; short for checkpoint.resume=.")
    ] = None,
    help_config: Annotated[
        bool, typer.Option("--help-config", help="Print every key of a config; with CONFIG, those of its mixer too.")
    ] = False,
) -> None:
    """Train a model on the blend; starts its own ranks, or is one where torchrun or srun has started it.

    Example: megamix train configs/demo.yaml train.steps=100 run_dir=runs/short
    """
    if help_config:
        from megamix.core.config_files import apply_overrides, read_yaml
        from megamix.core.config_help import config_help
        from megamix.training.config import KINDS, RunConfig

        data = apply_overrides(read_yaml(config, KINDS), overrides or [], KINDS) if config else None
        typer.echo(config_help(RunConfig, data=data))
        return
    if config is None:
        raise typer.BadParameter("it is missing; name a YAML file, for example configs/demo.yaml.", param_hint="CONFIG")
    from megamix.training.run import train as run

    overrides = [*(overrides or []), *([f"checkpoint.resume={json.dumps(resume)}"] if resume else [])]
    raise typer.Exit(run(config, overrides))


for _command in (steer, launch):
    app.command()(_command)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run (its newest checkpoint), or one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model, new or empty.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Write the model of a run in Hugging Face's form: safetensors, config and tokenizer.

    Example: megamix export runs/demo --out demo-hf
    """
    from megamix.interop.hugging_face.export import export as run

    typer.echo(run(path, out, dtype).line())


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, a checkpoint, or a causal model of transformers.")
    ],
    data: Annotated[
        Path | None, typer.Option(metavar="DATA", help="manifest.json or its folder; default: the run's data set.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(metavar="N|all", help="Samples per domain; default: as the run evaluates, or 64.")
    ] = None,
    split: Annotated[Literal["validation", "train"], typer.Option(help="Which text.")] = "validation",
    objective: Annotated[
        str | None, typer.Option(help="natural, uniform or {domain: weight}; default: the run's, or natural.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Also write the numbers here.")] = None,
) -> None:
    """Evaluate a model on every domain: loss, perplexity and bits per byte, with standard errors by documents.

    Example: megamix evaluate runs/demo --samples all --json demo.json
    """
    from megamix.core.yaml_text import parse_yaml
    from megamix.interop.evaluation.evaluate import evaluate as run

    if samples is not None and samples != "all" and not (samples.isdecimal() and int(samples) > 0):
        raise typer.BadParameter(f"it is '{samples}', expected a number above 0, or all.", param_hint="--samples")
    number = "all" if samples == "all" else None if samples is None else int(samples)
    aim = None if objective is None else parse_yaml(objective, "--objective")
    run(model, data, number, split, aim, out).report().show()


@app.command()
def reference(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A trained run, or one of its checkpoints.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the losses.")],
    overrides: Overrides = None,
    proxy: Annotated[
        Path | None, typer.Option("--for", metavar="CONFIG", help="Only the samples that the run of this config reads.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Tokens a rank computes between safe points; default: a million.", min=1)
    ] = None,
) -> None:
    """Write a reference model's loss of every training token, for DoReMi's proxy. Killed and started again, it goes on.

    Example: megamix reference runs/reference --out runs/cache engine.pipeline=1
    """
    from megamix.training.reference.run import reference as run

    raise typer.Exit(run(source, out, overrides or [], proxy, save_every))


def _doremi_keys() -> type[Config]:
    from megamix.studies.doremi.config import DoremiStudyConfig

    return DoremiStudyConfig


@app.command()
@slurm_options
def doremi(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        Literal["configs", "reference", "cache", "proxy", "weights", "target"] | None,
        typer.Option(help="Run this task alone; configs writes the configs of the runs."),
    ] = None,
    slurm: Slurm = False,
    dry_run: DryRun = False,
    plan_only: PlanOnly = False,
    help_config: Annotated[bool, keys_option("doremi", _doremi_keys)] = False,
    *,
    resources: Resources,
) -> None:
    """DoReMi in one command: reference run, its losses, proxy run, weights and, if asked for, the target run. What is
    done is passed over; what was interrupted goes on. The config is a run's, with the changes for each run under the
    key doremi: reference, proxy, target (keys of a run), rounds, tolerance.

    Example: megamix doremi configs/doremi/demo.yaml run_dir=runs/doremi doremi.target.train.steps=400
    """
    from megamix.studies.doremi.tasks import doremi as run
    from megamix.studies.doremi.tasks import submit_doremi

    dry_run = dry_run or plan_only
    resources.refuse_without_slurm(only, dry_run=dry_run, slurm=slurm)
    if not slurm:
        raise typer.Exit(run(config, overrides or [], only))
    said = submit_doremi(config, overrides or [], resources, dry_run=dry_run, check_data=not plan_only)
    typer.echo(said, nl=False)


def _arena_keys() -> type[Config]:
    from megamix.studies.arena.config import ArenaConfig

    return ArenaConfig


@app.command()
@slurm_options
def arena(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[
        Literal["data", "run", "collect"] | None,
        typer.Option(help="data: traps and configs; run: also the members; collect: the results of those done so far."),
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Members at a time; default: arena.at_once.")] = None,
    slurm: Slurm = False,
    limit: Limit = 0,
    dry_run: DryRun = False,
    help_config: Annotated[bool, keys_option("arena", _arena_keys)] = False,
    *,
    resources: Resources,
) -> None:
    """Compare mixing rules on your data: every arm with every seed, with and without traps, as ordinary runs; then
    differences to natural weights and to the best static mixture, seed by seed, with intervals and a verdict. What is
    done is passed over; what was interrupted goes on. The config is a run's, with the comparison under the key arena.

    Example: megamix arena configs/arena/demo.yaml run_dir=runs/arena
    """
    from megamix.studies.arena.tasks import arena as run
    from megamix.studies.arena.tasks import submit_arena

    resources.refuse_without_slurm(only, dry_run=dry_run, slurm=slurm)
    if not slurm:
        raise typer.Exit(run(config, overrides or [], only, at_once=at_once))
    typer.echo(submit_arena(config, overrides or [], resources, limit, dry_run=dry_run), nl=False)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Without it, only the machine.")] = None,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks of the job; default: the fewest needed.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Check the plan without its data or GPUs.")] = False,
    verify_data: Annotated[
        bool, typer.Option("--verify", help="Compare all of the data with the manifest: short for data.verify=all.")
    ] = False,
) -> None:
    """Check a run's plan and this machine before a job starts.

    Example: megamix doctor configs/demo.yaml engine.data=4 --ranks 8
    """
    from megamix.analysis.doctor import doctor as run
    from megamix.core.config import load_config
    from megamix.training.config import RunConfig

    overrides = [*(overrides or []), *(["data.verify=all"] if verify_data else [])]
    loaded = load_config(RunConfig, config, overrides) if config is not None else None
    run(loaded, world_size=ranks, plan_only=plan_only).show()


for _group in (app, blend, swarm):
    for _registered in _group.registered_commands:
        if _registered.callback is not None:
            _registered.callback = paths_expanded(_registered.callback)


def main() -> None:
    """Entry point: a `MegamixError` becomes one line and its exit code; anything else keeps its traceback."""
    from megamix.core.streams import open_streams
    from megamix.training.job.local_ranks import report_failure

    try:
        open_streams()
        try:
            app()
        except SystemExit:  # how a command ends well
            sys.stdout.flush()
            raise
    except MegamixError as error:
        report_failure(str(error))
        code = error.exit_code
    except ModuleNotFoundError as error:
        told = missing_package(error)
        report_failure(traceback.format_exc() if told is None else str(told))
        code = EXIT_FAILED if told is None else told.exit_code
    except (KeyboardInterrupt, BrokenPipeError):
        code = EXIT_FAILED
    except OSError as error:
        # Looking whether a path is there raises this, too, so it would have to be caught wherever a path is given.
        is_too_long = error.errno == errno.ENAMETOOLONG
        report_failure(f"{_in_short(error)}. Give a shorter path." if is_too_long else traceback.format_exc())
        code = EXIT_BAD_INPUT if is_too_long else EXIT_FAILED
    except Exception:
        report_failure(traceback.format_exc())
        code = EXIT_FAILED
    else:
        return
    _leave(code)


def _leave(code: int) -> None:
    """Ends the process even if a background thread waits in a collective that a dead rank will never join."""
    import os

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, MegamixError):
            stream.flush()
    os._exit(code)


def _in_short(error: OSError) -> str:
    return f"{shortened(str(error.filename), 120)}: {error.strerror}"
