"""``megamix inspect PATH``: describes a data set, a run, a checkpoint or a token file.

With a position of a run it describes the sample there: domain, index, documents and text.

Legend: K domains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megamix.analysis.samples import SampleReader
from megamix.analysis.series import objective_losses
from megamix.analysis.summary import run_table
from megamix.core.errors import InputError
from megamix.core.files import parse_json, sha256_of
from megamix.core.text import Report, Table, gib, number, plural
from megamix.data.blend.blend import Blend
from megamix.data.reference_losses import is_cache
from megamix.data.tokens.indexed import IndexedTokens, bin_path, idx_path
from megamix.data.tokens.manifest import FILE_NAME, Manifest
from megamix.mixing.weight_files import SWARM_MIXTURE
from megamix.training.checkpoints import store
from megamix.training.checkpoints.state import read_state
from megamix.training.objective import objective_name
from megamix.training.records.recorded_run import CONFIG, WEIGHTS, RecordedRun
from megamix.training.reference.cache import describe_cache

EXCERPT = 240
"""Characters of text shown of a document."""
_EXCERPT_TOKENS = 400
_EXPECTED = (
    "Give a data set (manifest.json or its folder), a run (the folder with config.resolved.yaml), a checkpoint "
    "(RUN/checkpoints/step_N), a cache of reference losses, or a token file (PREFIX, PREFIX.bin or PREFIX.idx)."
)


def inspect_path(path: Path, *, text: bool = False, seq_length: int | None = None) -> Report:
    """Describes what is at ``path``.

    Args:
        text: also an excerpt of the first document (of every domain, for a data set).
        seq_length: for a data set or a token file, also how many samples of that many tokens it holds.

    Raises:
        InputError: nothing that megamix knows, or a damaged data set, run or token file. A damaged checkpoint is
            described as such.
    """
    path = Path(path)
    if not path.exists() and not idx_path(path).exists():
        raise InputError(f"there is nothing at {path}. {_EXPECTED}")
    if path.is_dir():
        if (path / CONFIG).is_file():
            return _run(path)
        if (path / store.LISTING).is_file() or path.name.startswith("step_"):
            return _checkpoint(path)
        if (path / FILE_NAME).is_file():
            return _data(path, text, seq_length)
        if is_cache(path):
            return describe_cache(path)
        if (path / SWARM_MIXTURE).is_file():
            raise InputError(f"{path} is a swarm with a proposed mixture. To see it: megamix swarm explain {path}")
    elif path.suffix == ".json":
        return _data(path, text, seq_length)
    elif path.suffix in (".bin", ".idx"):
        return _tokens(path.with_suffix(""), text, seq_length)
    if idx_path(path).is_file():
        return _tokens(path, text, seq_length)
    raise InputError(f"{path} is nothing that megamix makes. {_EXPECTED}")


def inspect_sample(run_dir: Path, position: int) -> Report:
    """Describes the sample at a global position of a run: domain, index, documents, bytes and text.

    Args:
        position: counted from 0.

    Raises:
        InputError: no such run or position, or its data set cannot be opened.
    """
    run = RecordedRun.open(run_dir)
    config = run.config
    batches, total = config.batches, config.total_samples
    if not 0 <= position < total:
        raise InputError(
            f"sample {position} of {run_dir} asked for; the run has samples 0 to {total - 1} "
            f"({config.train.steps} steps of {batches.describe()})."
        )
    step = batches.step(position)
    sample = SampleReader(run, step).sample(position)
    lines = [
        f"position    {position}: sample {position - batches.position(step)} of step {step}, counted from 0",
        f"domain      {sample.domain} (weight {sample.weight:.4f} there)",
        f"sample      {sample.index} of {sample.num_samples}, in epoch {sample.epoch} counted from 0",
        *(f"tokens      {start} to {end} of the domain's training tokens" for start, end in sample.pieces),
        *(f"bytes       {place}" for place in sample.bytes),
        *(f"documents   {documents}" for documents in sample.documents),
    ]
    if sample.index >= sample.num_samples:
        lines.append(
            "The epoch was begun with samples of another length; this is one of those that its rest was cut into."
        )
    if position >= run.position:
        lines.append(
            f"Not on record as trained yet ({run.steps} steps are): "
            "domain and sample hold if the weights do not change before it."
        )
    return Report(["\n".join(lines), sample.text])


def _data(path: Path, text: bool, seq_length: int | None) -> Report:
    manifest = Manifest.load(path)
    domains = [manifest.open_domain(name) for name in manifest.domain_names]
    for name in manifest.domain_names:
        manifest.open_domain(name, "validation")  # raises where it is damaged
    tokens = sum(domain.num_tokens for domain in domains)
    head = (
        f"{path} is a data set of {plural(len(domains), 'domain')} with {tokens:,} training tokens.\n"
        f"tokenizer   {manifest.tokenizer.file}, {manifest.tokenizer.vocab_size:,} entries, "
        f"SHA-256 {manifest.tokenizer.sha256[:12]}; documents end with token {manifest.tokenizer.eod_id}\n"
        f"tokens      stored as {manifest.dtype}; every index fits its data\n"
        f"fingerprint {manifest.fingerprint}"
    )
    columns = ["domain", "documents", "tokens", "share", "validation documents", "validation tokens", "unigram loss"]
    rows = []
    for entry, stream, share in zip(manifest.domains, domains, manifest.natural_weights(), strict=True):
        row = [entry.name, f"{stream.num_documents:,}", f"{stream.num_tokens:,}", number(float(share))]
        row += [f"{entry.validation.documents:,}", f"{entry.validation.tokens:,}"]
        row.append(number(entry.validation.unigram_nats, 3))
        rows.append(row + ([f"{stream.num_windows(seq_length):,}"] if seq_length else []))
    if seq_length:
        columns.append(f"samples of {seq_length}")
    parts: list[str | Table] = [head, Table(columns, rows)]
    if text:
        parts += [f"{stream.name}: {_first_text(stream.files[0], manifest)}" for stream in domains]
    return Report(parts)


def _first_text(file: IndexedTokens, manifest: Manifest) -> str:
    if not file.num_documents:
        return "(no document)"
    starts = file.document_starts
    stop = int(starts[1]) if len(starts) > 1 else file.num_tokens
    ids = file.tokens[int(starts[0]) : min(stop, int(starts[0]) + _EXCERPT_TOKENS)]
    text = " ".join(manifest.load_tokenizer().decode(ids.tolist()).split())
    return text if len(text) <= EXCERPT else text[:EXCERPT].rstrip() + "..."


def _tokens(prefix: Path, text: bool, seq_length: int | None) -> Report:
    file = IndexedTokens(prefix)
    lines = [
        f"{bin_path(prefix)} and {idx_path(prefix).name} are a token file in Megatron's format; index and data agree.",
        f"tokens      {file.num_tokens:,}, stored as {file.dtype.name} ({gib(file.num_tokens * file.dtype.itemsize)})",
        f"documents   {file.num_documents:,} in {plural(file.num_sequences, 'sequence')}",
    ]
    if file.num_documents:
        lengths = np.diff(np.append(file.document_starts, file.num_tokens))
        lines.append(f"lengths     {lengths.min():,} to {lengths.max():,} tokens, median {int(np.median(lengths)):,}")
    if file.num_tokens:
        lines.append(f"token ids   {int(file.tokens.min())} to {int(file.tokens.max())}")
    if seq_length:
        lines.append(f"samples     {max(0, (file.num_tokens - 1) // seq_length):,} of {seq_length} tokens")
    parts: list[str | Table] = ["\n".join(lines)]
    if text:
        folder = next((folder for folder in prefix.absolute().parents[:2] if (folder / FILE_NAME).is_file()), None)
        if folder is None:
            raise InputError(
                f"{prefix}: no {FILE_NAME} beside it or one folder up names its tokenizer. Leave --text out."
            )
        parts.append(_first_text(file, Manifest.load(folder)))
    return Report(parts)


def _run(path: Path) -> Report:
    if not (path / WEIGHTS).is_file():
        return Report([f"{path} is a run that has recorded nothing yet.\n{_checkpoints(path)}"])
    run = RecordedRun.open(path)
    done = run.steps >= run.config.train.steps
    weights = run.ledger.weights
    changes = int((weights[1:] != weights[:-1]).any(axis=1).sum())
    lines = [
        f"{path} is a run{', finished' if done else ', not finished'}.",
        f"steps       {run.steps:,} of {run.config.train.steps:,}",
        f"tokens      {run.tokens:,}",
        f"mixer       {run.config.mixer.name}, {plural(changes, 'change')} of weights",
        f"data        {run.config.data.manifest}",
    ]
    if run.train:
        last = run.train[-1]
        lines.append(
            f"last loss   {last['loss']:.4f} (training, step {last['step']}), {last['tokens_per_second']:,.0f} tokens/s"
        )
    if run.evaluations:
        last = run.evaluations[-1]
        lines.append(
            f"objective   {number(objective_losses(run)[-1])} ({objective_name(run.config.objective)}, step {last['step']})"
        )
        lines.append(
            f"validation  {number(last.get('macro_loss'))} (mean over domains, step {last['step']}), "
            f"worst {last.get('worst_domain')}"
        )
    lines.append(_checkpoints(path))
    return Report(["\n".join(lines), *run_table(run).report().parts])


def _checkpoints(path: Path) -> str:
    folder = path / "checkpoints"
    found = []
    for step in sorted(store.complete_steps(folder)) if folder.is_dir() else []:
        problem = store.damage(folder / f"step_{step}")
        found.append(f"step_{step}" + (f" (damaged: {problem})" if problem else ""))
    found += [f"{unfinished.name} (not finished)" for unfinished in sorted(folder.glob("step_*.partial"))]
    return f"checkpoints {', '.join(found) or 'none'}"


def _checkpoint(path: Path) -> Report:
    problem = _checkpoint_problem(path)
    if problem is not None:
        return Report([f"{path} is a checkpoint that cannot be used: {problem}."])
    state = read_state(path)
    blend = Blend.from_state_dict(state.sampler["blend"])
    prints = state.fingerprints
    model, mixer = prints["model"], prints["mixer"]["mixer"]
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    head = (
        f"{path} is a complete checkpoint of {gib(size)}; every file has the hash it was written with.\n"
        f"step        {state.step}, {blend.position:,} samples taken\n"
        f"model       {model['architecture']}, {model['num_layers']} layers of width {model['hidden_size']}: "
        f"{_parameters(path):,} parameters\n"
        f"mixer       {mixer['name']}; seed {state.seed}\n"
        f"data        {state.manifest}\n"
        f"tokenizer   SHA-256 {prints['tokenizer']['sha256']}"
    )
    columns = zip(prints["data"]["domains"], blend.counts, blend.weights, blend.epochs, strict=True)
    rows = [(name, f"{count:,}", f"{weight:.4f}", f"{epoch:.2f}") for name, count, weight, epoch in columns]
    return Report([head, Table(("domain", "samples taken", "weight", "epochs"), rows)])


def _checkpoint_problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, after reading all of it; None if it can."""
    if path.name.endswith(".partial"):
        return "it was not finished when its run ended"
    problem = store.damage(path)
    if problem is not None:
        return problem
    files: dict[str, Any] = parse_json((path / store.LISTING).read_bytes())["files"]
    for name, entry in files.items():
        seen = sha256_of(path / name)
        if seen != entry["sha256"]:
            return f"{name} has SHA-256 {seen[:12]}..., expected {entry['sha256'][:12]}...: its contents have changed"
    return None


def _parameters(path: Path) -> int:
    """Number of weights in the layer files, from their headers."""
    from safetensors import safe_open

    total = 0
    for file in sorted((path / "layers").glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            names = [name for name in tensors.keys() if name.startswith("weight/")]  # noqa: SIM118 - not a mapping
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in names)
    return total
