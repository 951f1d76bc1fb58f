"""``megamix evaluate``: loss, perplexity and bits per byte of a model on each domain, with standard errors.

    perplexity = exp(loss)        bits per byte = nats / (ln 2 x bytes of the text)

Samples are those of a run's evaluation, cut alike. Bytes are those of the labels' tokens; the end of a document has
none, and its loss counts. Standard errors are by documents (`megamix.training.domain_losses`).

Legend: K domains, D documents, n samples, B samples at once, S tokens in a sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.core.text import Report, Table, by_name, listed, number
from megamix.data.documents import label_documents
from megamix.data.loader import IGNORED_LABEL, WindowReader
from megamix.data.tokens.manifest import Manifest, Split
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.verify import verify_sample
from megamix.interop.evaluation.model import EvaluatedModel, open_model
from megamix.interop.evaluation.token_bytes import token_bytes
from megamix.training.domain_losses import NATS, TOKENS, DocumentSums, ratio
from megamix.training.evaluate import choose_samples
from megamix.training.objective import objective_name, objective_weights
from megamix_kernels.sums import MAX_TOKEN_NATS, UNITS_PER_NAT

Ints = NDArray[np.int64]
DEFAULT_SAMPLES = 64
LOGITS_AT_ONCE = 2**26
"""At most so many logits are computed at once: 256 MB."""
MOST_NATS = 700.0
"""A perplexity above exp of this has no float64."""


@dataclass(frozen=True)
class Evaluation:
    """Losses of a model.

    Attributes:
        line: an ``evaluate`` line of metrics.jsonl without step and tokens (`DomainLosses.line`).
        domains: {domain: {loss, loss_error, perplexity, perplexity_error, bits_per_byte, bits_per_byte_error, tokens,
            bytes, documents, samples}}; None where a number is not known.
        settings: what was evaluated: model, data, split, seq_length and objective.
    """

    line: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {**self.settings, **self.line, "domains": self.domains}

    def report(self) -> Report:
        """The objective loss, and a table of domains."""
        columns = (
            "domain", "loss", "± se", "perplexity", "± se", "bits/byte", "± se", "tokens", "documents", "samples",
        )  # fmt: skip
        rows = [
            (
                name, number(row["loss"]), number(row["loss_error"]), number(row["perplexity"], 2),
                number(row["perplexity_error"], 2), number(row["bits_per_byte"]), number(row["bits_per_byte_error"]),
                f"{row['tokens']:,}", f"{row['documents']:,}", f"{row['samples']:,}",
            )
            for name, row in self.domains.items()
        ]  # fmt: skip
        named, line = self.settings["objective_name"], self.line
        for name, loss, error in (
            (f"objective ({named})", line["objective_loss"], line["objective_error"]),
            ("mean over domains", line["macro_loss"], None),
        ):
            rows.append((name, number(loss), number(error), "", "", "", "", "", "", ""))
        head = f"{self.settings['model']} on {self.settings['data']}, {self.settings['split']}, samples of {self.settings['seq_length']} tokens"
        words = "losses in nats per token; se: standard error over documents."
        if single := [name for name, row in self.domains.items() if row["documents"] == 1]:
            words += f" Of one document, and so without one: {listed(single)}, and what they are part of."
        if self.settings["without"]:
            words += f" Without a sample, and so left out: {listed(self.settings['without'])}."
        return Report([head, Table(columns, rows, footer=2), words])


def evaluate(
    path: Path,
    data: Path | None = None,
    samples: int | Literal["all"] | None = None,
    split: Literal["train", "validation"] = "validation",
    objective: str | Mapping[str, float] | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Evaluates a model in this process, on its GPU where there is one.

    Args:
        path: a run, a checkpoint, or a folder of transformers.
        data: manifest.json or its folder; None: the run's data set.
        samples: per domain; None: those of the run's own evaluation, or `DEFAULT_SAMPLES`.
        objective: as in a config; None: the run's, or natural.
        out: a JSON file to write.

    Raises:
        InputError: no such model or data, another tokenizer, an objective that cannot be used, or a file that cannot be
            written.
        DataChanged: the data are not those of the manifest.
        ResumeRefused: the checkpoint is damaged.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_model(path, device)
    folder = data if data is not None else model.manifest
    if folder is None:
        raise InputError(f"{path} is no run, so which data it is to be evaluated on is not known. Give --data.")
    manifest = Manifest.load(folder)
    model.check_tokenizer(manifest)
    config = model.config
    wanted = samples or (DEFAULT_SAMPLES if config is None else config.evaluate.samples)
    names = tuple(manifest.domain_names)
    if config is not None and config.data.domains is not None and data is None:
        names = config.data.domains
    given = objective or ("natural" if config is None else config.objective)
    if not isinstance(given, Mapping) and given not in ("natural", "uniform"):
        raise InputError(f"the objective is {given!r}, expected natural, uniform or {{domain: weight}}.")
    weights = by_name(names, objective_weights(given, names, manifest.natural_weights(names)))
    verify_sample(manifest, [manifest.domain(name) for name in names])
    streams, without = _streams(manifest, names, split, model.seq_length)
    names = tuple(stream.name for stream in streams)
    if without:
        total = sum(weights[name] for name in names)
        if total == 0:
            raise InputError(
                f"no domain with a weight in the objective has a {split} sample of {model.seq_length} tokens: {listed(without)} "
                "have none. Evaluate on other data, or by another objective."
            )
        weights = {name: weights[name] / total for name in names}
    sums, bytes_D, domain_D, domain_n = _document_sums(model, manifest, streams, wanted, device)
    losses = sums.losses(domain_D, names)
    found = Evaluation(
        line=losses.line(weights, by_name(names, manifest.natural_weights(names))),
        domains={
            name: _row(sums.buffer.cpu().numpy()[domain_D == k], bytes_D, domain_D == k, int((domain_n == k).sum()))
            for k, name in enumerate(names)
        },
        settings={
            "model": str(model.source), "data": str(folder), "split": split, "seq_length": model.seq_length,
            "objective_name": objective_name(given), "without": without,
        },
    )  # fmt: skip
    if out is not None:
        try:
            replace_file(out, (json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise InputError(f"cannot write {out}: {error.strerror or error}. Choose another --json.") from error
    return found


def _streams(
    manifest: Manifest, names: Sequence[str], split: Split, seq_length: int
) -> tuple[list[DomainTokens], list[str]]:
    """The tokens of the domains with at least one sample, and the names of those without."""
    streams = [manifest.open_domain(name, split) for name in names]
    held = [stream for stream in streams if stream.num_windows(seq_length) > 0]
    return held, [stream.name for stream in streams if stream.num_windows(seq_length) < 1]


def _document_sums(
    model: EvaluatedModel,
    manifest: Manifest,
    streams: list[DomainTokens],
    wanted: int | Literal["all"],
    device: torch.device,
) -> tuple[DocumentSums, Ints | None, Ints, Ints]:
    """The sums of D documents, their bytes (None where those of the tokens are not known) and domains, int64 [D], and
    the domains of the n samples, int64 [n]."""
    length, vocabulary, config = model.seq_length, manifest.tokenizer.vocab_size, model.config
    token_ids = model.token_ids or vocabulary
    most = max(stream.num_windows(length) for stream in streams)
    domain_n, sample_n = choose_samples(streams, length, most if wanted == "all" else wanted)
    documents = label_documents(streams, domain_n, sample_n, length)
    reader = WindowReader(
        streams,
        length,
        vocabulary,
        eod_mask_loss=config is not None and config.data.eod_mask_loss,
        reset_position_ids=config is not None and config.data.positions_restart,
    )
    sums, size_V = DocumentSums(documents.number, device), token_bytes(manifest)
    bytes_D = None if size_V is None else np.zeros(documents.number, np.int64)
    at_once = max(1, LOGITS_AT_ONCE // (length * token_ids))
    for start in range(0, domain_n.size, at_once):
        row_B = np.arange(start, min(start + at_once, domain_n.size))
        batch = reader.batch(domain_n[row_B], sample_n[row_B], np.arange(row_B.size), (1, row_B.size))
        label_N, document_N = batch.labels.flatten(), torch.from_numpy(documents.of(row_B)).flatten()
        with torch.no_grad():
            positions = None if batch.positions is None else batch.positions[0].to(device)
            logits_BSV = model.logits(batch.tokens[0].to(device), positions)[..., :token_ids].float()
            loss_N = torch.nn.functional.cross_entropy(
                logits_BSV.flatten(0, 1), label_N.to(device), ignore_index=IGNORED_LABEL, reduction="none"
            )
        # A loss that the sums leave out takes its bytes with it.
        counted_N = (label_N != IGNORED_LABEL) & (loss_N <= MAX_TOKEN_NATS).cpu()
        sums.add(document_N.to(device), loss_N, counted_N.to(device))
        if bytes_D is not None and size_V is not None:
            size_N = np.where(counted_N.numpy(), size_V[np.maximum(label_N.numpy(), 0)], 0)
            np.add.at(bytes_D, document_N.numpy(), size_N)
    return sums, bytes_D, documents.domain, domain_n


def _row(sums_d2: Ints, bytes_D: Ints | None, mine_D: NDArray[np.bool_], num_samples: int) -> dict[str, Any]:
    """The numbers of one domain."""
    has_tokens = sums_d2[:, TOKENS] > 0
    nats_d, tokens_d = sums_d2[has_tokens, NATS] / UNITS_PER_NAT, sums_d2[has_tokens, TOKENS]
    loss, error = ratio(nats_d, tokens_d)
    bytes_d = None if bytes_D is None else bytes_D[mine_D][has_tokens]
    bits, bits_error = (None, None) if bytes_d is None else ratio(nats_d / math.log(2), bytes_d)
    perplexity = None if loss is None or loss > MOST_NATS else math.exp(loss)
    return {
        "loss": loss,
        "loss_error": error,
        "perplexity": perplexity,
        "perplexity_error": None if perplexity is None or error is None else perplexity * error,
        "bits_per_byte": bits,
        "bits_per_byte_error": bits_error,
        "tokens": int(tokens_d.sum()),
        "bytes": None if bytes_d is None else int(bytes_d.sum()),
        "documents": int(tokens_d.size),
        "samples": num_samples,
    }
