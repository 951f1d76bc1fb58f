"""Other forms of a tokenizer, as the contents of a tokenizer.json: SentencePiece models, and GPT-2's two files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamix.core.errors import InputError
from megamix.core.files import MOST_TEXT, read_json, read_regular
from megamix.core.packages import need

JSON = "tokenizer.json"
_PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Files of the vocabulary, and those of the merges beside them."""
_SAMPLES = ("Hello world", "  two  spaces\n\n\tand tabs 12345  ", "Grüße 你好 🙂 é", "a</s>b <s> <unk>", "x" * 50, " ",
            "for i in range(10):\n    print(i)  # \\u00e9", "\uff13\uff46ull, don't can't", "\u200bzero\u00a0width")  # fmt: skip
_BPE, _UNIGRAM, _CONTROL, _UNSEEN = 2, 1, (2, 3, 5), -1000.0


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
        return _of_sentencepiece(path)
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


def _of_sentencepiece(path: Path) -> bytes:
    """Converts a model with what transformers has for it, and compares the two on some texts."""
    purpose = f"reading {path.name}"
    sentencepiece = need("sentencepiece", purpose)
    convert = need("transformers.convert_slow_tokenizer", purpose)
    build = getattr(convert.SpmConverter, "build_tokenizer_from_spm_proto", None)
    if build is None:
        raise InputError(f"{purpose} needs a newer transformers (seen to work: 5.24). Or give a tokenizer.json.")
    try:
        model = convert.import_protobuf().ModelProto()
        model.ParseFromString(read_regular(path, MOST_TEXT))
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # of protobuf or of sentencepiece
        raise InputError(f"{path} is no SentencePiece model: {error}. Check the path.") from error
    kind, vocabulary = model.trainer_spec.model_type, None
    if kind == _BPE:
        vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    elif kind == _UNIGRAM:
        # Texts never get control pieces, such as the end of a document, whatever they say.
        vocabulary = [(piece.piece, _UNSEEN if piece.type in _CONTROL else piece.score) for piece in model.pieces]
    if vocabulary is None:
        raise InputError(
            f"{path} is neither a BPE nor a unigram model (type {kind}). Give the model's own tokenizer.json."
        )
    tokenizer: Any = build(model, vocabulary)
    _compare(path, tokenizer, processor)
    return tokenizer.to_str(pretty=True).encode()


def _compare(path: Path, tokenizer: Any, processor: Any) -> None:
    for text in _SAMPLES:
        wanted = processor.encode(text)
        seen = tokenizer.encode(text, add_special_tokens=False).ids
        if seen != wanted:
            raise InputError(
                f"{path} has no tokenizer.json that gives the same tokens: {text!r} is {wanted[:8]} by SentencePiece, {seen} by"
                " what transformers makes of it. Give the model's own tokenizer.json."
            )
