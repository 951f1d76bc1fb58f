"""Other forms of a tokenizer, as the contents of a tokenizer.json: SentencePiece models, and GPT-2's two files."""

from __future__ import annotations

from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.files import MOST_TEXT, read_json, read_regular
from megamix.data.tokens.sentencepiece_form import tokenizer_of_sentencepiece

JSON = "tokenizer.json"
_PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Files of the vocabulary, and those of the merges beside them."""


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer of a folder: its tokenizer.json if it has one, else another form."""
    names = (JSON, "tokenizer.model", "spiece.model", *_PAIRS)
    return next((folder / name for name in names if (folder / name).is_file()), folder / JSON)


def tokenizer_json(path: Path) -> bytes:
    """The contents of the tokenizer.json that a tokenizer comes to.

    Args:
        path: A tokenizer.json; a SentencePiece model (``.model``); or vocab.json (encoder.json) with merges.txt
            (vocab.bpe) beside it, of a byte-level BPE that divides text into words as GPT-2's.

    Raises:
        InputError: It is unreadable or none of these, a package is missing, or the same text would get other tokens.
    """
    if path.suffix.lower() == ".model":
        return tokenizer_of_sentencepiece(path)
    if path.name in _PAIRS and (merges := path.with_name(_PAIRS[path.name])).is_file():
        return _of_vocabulary(path, merges)
    try:
        return read_regular(path, MOST_TEXT)
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror or error}. Check the path.") from error


def _of_vocabulary(path: Path, merges: Path) -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = read_json(path)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not isinstance(vocabulary, dict) or not all(isinstance(each, int) for each in vocabulary.values()):
        raise InputError(f"{path} is no vocabulary: expected an object of tokens and their ids.")
    if missing := sorted(set(alphabet) - vocabulary.keys()):
        raise InputError(
            f"{path} lacks {len(missing)} of the 256 bytes ({missing[0]}): its tokens are not those of a byte-level BPE. Give"
            " the tokenizer.json."
        )
    try:
        model = models.BPE.from_file(str(path), str(merges))
    except Exception as error:  # a bare one
        raise InputError(f"{path} and {merges.name} are no byte-level BPE: {error}. Check both.") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [each for each in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>") if each in vocabulary]
    tokenizer.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    return tokenizer.to_str(pretty=True).encode()
