"""``megamix blend``: Megatron's token files in, Megatron's and DoReMi's blends out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megamix.core.command_help import WholeSentences
from megamix.core.errors import InputError
from megamix.interop.blend_files.export import export_blend, is_run, open_run, write_text
from megamix.interop.blend_files.stages import cuts_at, equal_cuts, export_phases

app = typer.Typer(
    cls=WholeSentences,
    help="Exchange token files and blends with Megatron and DoReMi.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def adopt(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for manifest.json, tokenizer.json, mixture.json.")],
    tokenizer: Annotated[
        str, typer.Option(help="The tokenizer of the files: a tokenizer.json, hf:NAME, or as for prepare.")
    ],
    named: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=PREFIX[,PREFIX]",
            help="The files of a domain: Megatron prefixes, .npy, .ds or .bin files of ids, tables of ids, globs, folders of these"
            " or of MDS shards. Beside a blend, names for its files; default names: the files' own.",
        ),
    ] = None,
    eod: Annotated[str | None, typer.Option(help="Its end-of-document token; default: the usual names.")] = None,
    data_path: Annotated[str | None, typer.Option(help='"WEIGHT PREFIX WEIGHT PREFIX ...", or prefixes alone.')] = None,
    data_args_path: Annotated[Path | None, typer.Option(help="A file with that string.")] = None,
    per_split_data_args_path: Annotated[Path | None, typer.Option(help="JSON with train, valid and test.")] = None,
    train_data_path: Annotated[str | None, typer.Option(help="The training files, where they are others ...")] = None,
    valid_data_path: Annotated[str | None, typer.Option(help="... than those for validation.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Shares of train, valid and test in every file, as in Megatron; default: 969,30,1."),
    ] = None,
    dtype: Annotated[
        Literal["uint8", "uint16", "uint32", "int32", "int64", "uint64"] | None,
        typer.Option(help="Type of the ids in files that do not say it; default: by the vocabulary."),
    ] = None,
    documents: Annotated[
        Literal["token", "row"],
        typer.Option(help="Where those of tables and MDS shards end: at the end-of-document token, or with each row."),
    ] = "token",
    workers: Annotated[int | None, typer.Option(min=1, help="Files read at a time; default: by cores.")] = None,
) -> None:
    """Make a data set of existing token files. Megatron's .bin/.idx and flat files of ids (OLMo's .npy, datatrove's
    .ds, nanoGPT's .bin) stay where they are; MDS shards and files with a header are converted in one pass.

    Example: megamix blend adopt --out data/mine --tokenizer tokenizer.json --data-path "0.3 /data/web_text_document
    0.7 /data/code_text_document" --split 98,2
    """
    from megamix.interop.blend_files.adopt import adopt as run
    from megamix.interop.token_files.sources import find_sources

    sources = find_sources(
        named or [],
        data_path=data_path,
        data_args_path=data_args_path,
        per_split=per_split_data_args_path,
        train_path=train_data_path,
        valid_path=valid_data_path,
    )
    options = {"eod": eod, "split": split, "dtype": dtype, "documents": documents, "workers": workers}
    run(sources, out, tokenizer=tokenizer, **options).report().show()


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_DATA", help="A run directory, or a data set.")],
    format: Annotated[
        str | None, typer.Option(help="megatron (default), per-split-json (default of stages), doremi or json.")
    ] = None,
    which: Annotated[
        str | None, typer.Option(help="Of a run: mean (default, over all samples), final, initial or realised.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Of a data set: a file of weights; default: natural.")] = None,
    stages: Annotated[int | None, typer.Option(help="Of a run: so many phases of equal length.")] = None,
    stages_at: Annotated[str | None, typer.Option(help="Of a run: phases cut at these tokens, as 1e9,2e9.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file, or the folder of the phases.")] = None,
) -> None:
    """Write the blend of a run or a data set for Megatron or DoReMi, as one mixture or in phases.

    Example: megamix blend export runs/demo --format per-split-json --out blend.json

    Example: megamix blend export runs/demo --stages 4 --out phases
    """
    if stages is None and stages_at is None:
        blend = export_blend(path, format or "megatron", which, weights)
        notes = blend.notes
        if out is None:
            lines = [blend.text.rstrip("\n")]
        else:
            write_text(out, blend.text)
            lines = [str(out)]
    else:
        _check_phase_options(path, which, weights, stages, stages_at)
        if out is None:
            raise InputError(f"{_option(stages)} writes several files. Give their folder with --out.")
        run = open_run(path)
        cuts = equal_cuts(run, stages) if stages is not None else cuts_at(run, stages_at or "")
        written, notes = export_phases(run, cuts, format or "per-split-json", out)
        lines = [str(file) for file in written]
    for line in lines:
        typer.echo(line)
    for note in notes:
        typer.echo(note, err=True)


def _option(stages: int | None) -> str:
    return "--stages" if stages is not None else "--stages-at"


def _check_phase_options(
    path: Path, which: str | None, weights: Path | None, stages: int | None, stages_at: str | None
) -> None:
    if stages is not None and stages_at is not None:
        raise InputError("--stages and --stages-at are both given. Give one of them.")
    option = _option(stages)
    if not is_run(path):
        raise InputError(f"{option} is for runs, but {path} is a data set, whose weights do not change. Leave it out.")
    if which is not None or weights is not None:
        other = f"--which {which}" if which is not None else "--weights"
        raise InputError(f"{option} exports the mean weights of each phase; {other} does not go with it. Leave it out.")
