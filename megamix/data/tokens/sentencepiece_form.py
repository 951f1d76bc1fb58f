"""SentencePiece models (BPE and unigram) as the contents of a tokenizer.json, by what a model says of itself.

    text -> its table of characters -> spaces cut -> U+2581 in front and for every space -> pieces

What comes out is compared with SentencePiece itself on some texts, because its settings are more than are read here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError
from megamix.core.files import MOST_TEXT, read_regular
from megamix.core.packages import need

_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED = 1, 4
"""Kinds of pieces that texts get. Of the others, such as the end of a document, they get none, whatever they say."""
_SPACE = "\u2581"
_NEVER = -1000.0
"""Logarithm of a probability; that of a piece of the vocabulary is far above it."""
_SAMPLES = ("Hello world", "  two  spaces\n\n\tand tabs 12345  ", "Grüße 你好 🙂 é", "a</s>b <s> <unk>", "x" * 50, " ",
            "for i in range(10):\n    print(i)  # \\u00e9", "\uff13\uff46ull, don't can't", "\u200bzero\u00a0width",
            "<0x41> <0x0A>", "\u2581 in the text")  # fmt: skip


def tokenizer_of_sentencepiece(path: Path) -> bytes:
    """Converts a model.

    Raises:
        InputError: It is unreadable or of another kind, a package is missing, or the same text would get other tokens.
    """
    purpose = f"reading {path.name}"
    sentencepiece, form = need("sentencepiece", purpose), need("sentencepiece.sentencepiece_model_pb2", purpose)
    model = form.ModelProto()
    try:
        model.ParseFromString(read_regular(path, MOST_TEXT))
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # of protobuf or of sentencepiece
        raise InputError(f"{path} is no SentencePiece model: {error}. Check the path.") from error
    tokenizer = _converted(path, model)
    _compare(path, tokenizer, processor, _user_defined(model))
    return tokenizer.to_str(pretty=True).encode()


def _user_defined(model: Any) -> list[str]:
    """Pieces that are cut out of a text whole, the longest first."""
    return sorted((piece.piece for piece in model.pieces if piece.type == _USER_DEFINED), key=len, reverse=True)


def _converted(path: Path, model: Any) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    kind, whole, spec = model.trainer_spec.model_type, _user_defined(model), model.normalizer_spec
    if kind not in (_UNIGRAM, _BPE):
        raise InputError(
            f"{path} is neither a BPE nor a unigram model (type {kind}). Give the model's own tokenizer.json."
        )
    tokenizer: Any = Tokenizer(_bpe(model, bool(whole)) if kind == _BPE else _unigram(model))
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:  # of spaces alone
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if whole:
        pattern = Regex("|".join(map(re.escape, whole)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else back)
    return tokenizer


def _unigram(model: Any) -> Any:
    """The likeliest pieces. One that is cut out whole, cut out before, is certain."""
    from tokenizers.models import Unigram

    scores = {_USER_DEFINED: lambda score: 0.0, _NORMAL: lambda score: score}
    pieces = [(each.piece, scores.get(each.type, lambda score: _NEVER)(each.score)) for each in model.pieces]
    return Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _bpe(model: Any, emits_whole: bool) -> Any:
    """Two neighbours are joined where that makes a piece, the piece of the highest score first."""
    from tokenizers.models import BPE

    spec = model.trainer_spec
    score_of = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    by_score = sorted(score_of, key=lambda piece: -score_of[piece])
    merges = [
        (piece[:at], piece[at:])
        for piece in by_score
        for at in range(1, len(piece))
        if piece[:at] in score_of and piece[at:] in score_of
    ]
    return BPE(
        {piece.piece: number for number, piece in enumerate(model.pieces)},
        merges,
        unk_token=spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=emits_whole,
    )


def _compare(path: Path, tokenizer: Any, processor: Any, whole: list[str]) -> None:
    for text in (*_SAMPLES, " a".join(["", *whole[:1000], ""])):
        wanted = processor.encode(text)
        seen = tokenizer.encode(text, add_special_tokens=False).ids
        if seen != wanted:
            raise InputError(
                f"{path} has no tokenizer.json that gives the same tokens: {text[:60]!r} is {wanted[:8]} by SentencePiece,"
                f" {seen[:8]} by the one made of it. Give the model's own tokenizer.json."
            )
