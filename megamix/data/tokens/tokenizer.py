"""Tokenizers: trained on the corpus, a local tokenizer.json, or from the Hugging Face hub.

Every tokenizer is stored as ``tokenizer.json`` beside the tokens, and opened from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamix.core.errors import InputError
from megamix.core.files import MOST_TEXT, read_regular
from megamix.core.paths import expand
from megamix.data.tokens.tokenizer_forms import find_tokenizer, tokenizer_json
from megamix.data.tokens.word_encoder import WordEncoder

END_OF_DOCUMENT = "<|endoftext|>"
_EOD_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "<|end|>")
_MAX_VOCAB = 10_000_000
_MIN_VOCAB = 256 + 1  # every byte, and the end of a document


@dataclass(frozen=True)
class TokenizerSpec:
    """Parsed ``tokenizer`` option."""

    kind: Literal["train", "file", "hub"]
    path: str = ""
    """The file, or the name on the hub."""
    vocab_size: int = 0
    """Entries to train, including the 256 bytes and the end-of-document token."""

    @classmethod
    def parse(cls, text: str) -> TokenizerSpec:
        """Reads ``train:SIZE``, ``hf:NAME``, or the path of a tokenizer: see `tokenizer_json`; or of its folder.

        Raises:
            InputError: none of these, a vocabulary below 257 or above ten million entries, or a
                file that does not exist.
        """
        kind, _, rest = text.partition(":")
        if kind == "train":
            if not rest.isdecimal():
                raise InputError(f"tokenizer '{text}': expected train:SIZE with a number, for example train:4096.")
            if len(rest) < 8 and int(rest) < _MIN_VOCAB:
                raise InputError(
                    f"tokenizer '{text}': a vocabulary of {rest} is too small for the 256 bytes and {END_OF_DOCUMENT}."
                    f" Use at least {_MIN_VOCAB}."
                )
            if len(rest) > 8 or int(rest) > _MAX_VOCAB:
                raise InputError(f"tokenizer '{text}': expected a vocabulary of at most {_MAX_VOCAB:,} entries.")
            return cls("train", vocab_size=int(rest))
        if kind == "hf":
            if not rest:
                raise InputError(f"tokenizer '{text}': expected hf:NAME, for example hf:EleutherAI/gpt-neox-20b.")
            return cls("hub", rest)
        given = Path(expand(text))
        path = find_tokenizer(given) if os.path.isdir(given) else given
        if not os.path.isfile(path):  # also where the text is too long for a path
            raise InputError(
                f"tokenizer '{text}': no such file. Give a path to a tokenizer.json, train:SIZE, or hf:NAME."
            )
        return cls("file", str(path))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a byte-level BPE; the same texts give the same bytes.

    Args:
        vocab_size: entries; a small text may yield fewer. `END_OF_DOCUMENT` has id 0.

    Returns:
        The contents of a tokenizer.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode("utf-8")


def fetch_tokenizer(name: str) -> tuple[bytes, str | None]:
    """Fetches a tokenizer from the Hugging Face hub, or from its local cache.

    Returns:
        The contents of its tokenizer.json, and its end-of-sequence token if it has one.

    Raises:
        InputError: the hub cannot be reached, has no such tokenizer, or the tokenizer has no tokenizer.json form.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub's client raises a dozen kinds, some of them not documented
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"tokenizer 'hf:{name}' cannot be fetched: {reason.rstrip('.')}. Check the name and the network, or give"
            " the path of a local tokenizer.json instead."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"tokenizer 'hf:{name}' has no tokenizer.json form. Choose one that has one.")
    return backend.to_str(pretty=True).encode("utf-8"), tokenizer.eos_token


@contextlib.contextmanager
def refusing_bad_tokenizers(path: Path, remedy: str) -> Iterator[None]:
    """Makes what the library `tokenizers` says of a file that it cannot read an InputError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises a bare Exception, or panics, which is none
        raise InputError(f"{path} is not a tokenizer.json: {error}. {remedy}") from error


class LoadedTokenizer:
    """A tokenizer.json, ready to encode documents.

    A document that contains ``<|endoftext|>`` does not produce that token. Nothing is added, truncated or padded.

    Args:
        eod: the end-of-document token, by name or id; None looks for the usual names.
        data: contents, where ``path`` is only a name for messages.

    Attributes:
        vocab_size: largest token id + 1.
        eod_id: the end-of-document token.
        sha256: hash of the file, hexadecimal.
        random: what of the file cuts the same text now so, now so, and is switched off here; None: nothing.

    Raises:
        InputError: the file is missing or damaged, or has no end-of-document token.
    """

    def __init__(self, path: str | Path, eod: str | int | None = None, *, data: bytes | None = None) -> None:
        from tokenizers import Tokenizer

        self.path = Path(path)
        try:
            data = read_regular(self.path, MOST_TEXT) if data is None else data
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {path}: {error.strerror or error}. Check the path.") from error
        with refusing_bad_tokenizers(self.path, "Give one that `tokenizers` can read."):
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self.random = switch_off_sampling(self._tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.sha256 = hashlib.sha256(data).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise InputError(f"{path} has an empty vocabulary. Give a trained tokenizer.")
        self.vocab_size = max(ids.values()) + 1
        if self.vocab_size > _MAX_VOCAB:  # a model has a row for each, and tokens are counted by id
            raise InputError(
                f"{path} has {len(ids):,} tokens with ids up to {self.vocab_size - 1:,}, expected ids below {_MAX_VOCAB:,}."
                " Number its tokens from 0."
            )
        self.eod_id = _find_eod(self.path, ids, eod)

    def expect(self, sha256: str) -> None:
        """Checks the tokenizer against the hash that the tokens were made with.

        Raises:
            InputError: the hashes differ.
        """
        if self.sha256 != sha256:
            raise InputError(
                f"{self.path} has the hash {self.sha256[:12]}, but the tokens were made with {sha256[:12]}. Put the old"
                " file back, or run `megamix prepare` again."
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text; no end-of-document tokens.

        Raises:
            InputError: the tokenizer has no tokens for a text.
        """
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # a bare one
            raise InputError(
                f"{self.path} cannot cut the text into tokens: {error}. Use a tokenizer that has tokens for any text, such "
                "as a byte-level one."
            ) from error
        return [encoding.ids for encoding in found]

    def word_encoder(self, dtype: Any) -> WordEncoder | None:
        """A faster encoder with the same ids; None for a tokenizer without one."""
        return WordEncoder.of(self._tokenizer, dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def given_tokenizer(given: str | TokenizerSpec, eod: str | None) -> tuple[bytes, LoadedTokenizer]:
    """An existing tokenizer: contents of its tokenizer.json, and opened.

    Args:
        given: see `TokenizerSpec.parse`; not ``train:SIZE``.
        eod: its end-of-document token; None for its own end of a sequence, or the usual names.

    Raises:
        InputError: see `TokenizerSpec.parse`, `fetch_tokenizer`, `tokenizer_json` and `LoadedTokenizer`.
    """
    spec = given if isinstance(given, TokenizerSpec) else TokenizerSpec.parse(given)
    if spec.kind == "train":
        raise InputError(
            f"tokenizer '{given}': expected the one that the tokens were made with: a path to a tokenizer.json, or hf:NAME."
        )
    data, name = (tokenizer_json(Path(spec.path)), None) if spec.kind == "file" else fetch_tokenizer(spec.path)
    return data, LoadedTokenizer(spec.path, eod if eod is not None else name, data=data)


def switch_off_sampling(tokenizer: Any) -> str | None:
    """Makes the tokens of a text a function of the text; says what was switched off."""
    model, found = tokenizer.model, []
    for key in ("dropout", "alpha"):  # of BPE; of Unigram, beside nbest_size
        value = getattr(model, key, None)
        if value:
            setattr(model, key, None)
            found.append(f"{key} {value:g}")
    return ", ".join(found) or None


def _find_eod(path: Path, ids: dict[str, int], eod: str | int | None) -> int:
    if isinstance(eod, int):
        if eod not in ids.values():
            raise InputError(f"{path} has no token with the id {eod} to end documents with. Name another with --eod.")
        return eod
    names = _EOD_NAMES if eod is None else (eod,)
    for name in names:
        if name in ids:
            return ids[name]
    raise InputError(
        f"{path} has no end-of-document token (looked for {', '.join(names)}). Name one of its tokens with --eod, or"
        " use another tokenizer."
    )
