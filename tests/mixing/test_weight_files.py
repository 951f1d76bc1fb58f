"""Weights from files of every format, and Megatron's blends as text: values, names, and every error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megamix.core.errors import InputError
from megamix.mixing.megatron_blend import data_path, domain_name, domains_of, parse_blend, per_split_json, split_bounds
from megamix.mixing.weight_files import doremi_config, read_weights

DOMAINS = ("web", "code", "books")
WEB, CODE, BOOKS = "/a/web_text_document", "/b/code", "/c/books_text_sentence"


def write(folder: Path, content: Any) -> Path:
    path = folder / "weights"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"code": 1, "web": 2.0, "books": 5},
        {"train_domain_weights": {"web": 0.25, "code": 0.125, "books": 0.625}, "eval_domain_weights": {"web": 1}},
        {"domain_names": ["books", "web", "code"], "domain_weights": [10, 4, 2], "step": 7},
        [
            {"domain_names": ["web", "code", "books"], "domain_weights": [1, 0, 0]},
            {"domain_names": ["books", "web", "code"], "domain_weights": [10, 4, 2]},
        ],
        f"2 {WEB} 1 {CODE}\n5 {BOOKS}\n",
        {"train": ["2", WEB, 1, CODE, "5", BOOKS], "valid": [WEB], "test": None},
        {"train": f"2 {WEB} 1.0 {CODE} 5e0 {BOOKS}", "valid": None, "test": None},
        f"2 {WEB} 1 {CODE} 2 /c/books-00000-of-00002_text_document 3 /c/books-00001-of-00002_text_document",
        f" 2 {WEB} 1 /x/code/train 5 /x/books/train-00001-of-00009",
    ],
)
def test_every_format(tmp_path: Path, content: Any) -> None:
    weights = read_weights(write(tmp_path, content), DOMAINS)
    assert list(weights.items()) == [("web", 0.25), ("code", 0.125), ("books", 0.625)]


def test_a_blend_cannot_say_0_other_formats_must(tmp_path: Path) -> None:
    assert read_weights(write(tmp_path, f"3 {WEB} 1 {BOOKS}"), DOMAINS) == {"web": 0.75, "code": 0.0, "books": 0.25}
    weights = {"web": 0.75, "code": 0, "books": 0.25}
    assert read_weights(write(tmp_path, doremi_config(weights, {})), DOMAINS) == weights


def test_a_domain_may_be_called_train(tmp_path: Path) -> None:
    assert read_weights(write(tmp_path, {"train": 3, "valid": 1}), ("train", "valid")) == {"train": 0.75, "valid": 0.25}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty, expected weights"),
        ({"web": 1, "code": 1, "boks": 1}, "there is no domain 'boks'. Did you mean 'books'?"),
        ({"web": 1, "code": 1}, "no weight for books"),
        ('{"web": NaN, "code": 1, "books": 1}', "the weight of domain 'web' is nan, expected a finite number"),
        ('{"web": 1e999, "code": 1, "books": 1}', "the weight of domain 'web' is inf"),
        ({"web": -1, "code": 1, "books": 1}, "the weight of domain 'web' is -1"),
        ({"web": True, "code": 1, "books": 1}, "the weight of domain 'web' is True"),
        ({"web": "0.5", "code": 1, "books": 1}, "something else than numbers (keys web, code, books)"),
        ({"web": 0, "code": 0, "books": 0}, "the weights of all 3 domains"),
        ('{"web": 1, "web": 2, "code": 1, "books": 1}', "names 'web' twice"),
        ("{", "is not valid JSON"),
        ("[]", "is an empty list"),
        ("[1, 2]", "entry 1 is 1, expected an object"),
        ([{"train_domain_weights": {}}], "entry 1 has the keys train_domain_weights. Give one format"),
        ([{"domain_names": ["web"]}], "entry 1: domain_names is ['web'] and domain_weights None"),
        ({"domain_names": ["web", "web"], "domain_weights": [1, 2]}, "names the domain 'web' twice"),
        ({"domain_names": ["web"], "domain_weights": [1, 2]}, "expected two lists of one length"),
        ({"eval_domain_weights": {"web": 1}}, "train_domain_weights is None, expected an object"),
        ({"train_domain_weights": {"web": 1}, "web": 2}, "DoReMi's domain config and also a weight for 'web'"),
        (
            {"train_domain_weights": {"web": 1}, "domain_names": ["web"], "domain_weights": [1]},
            "DoReMi's domain config and a record of weights",
        ),
        ({"train": None, "valid": None, "test": None}, "train is null"),
        ({"train": ["1", WEB], "valid": None}, "has no 'test', which Megatron needs too"),
        ({"train": ["1", WEB], "valid": None, "test": None, "extra": None}, "unknown split 'extra'"),
        ({"train": {"a": 1}, "valid": None, "test": None}, "'train' is {'a': 1}, expected a list"),
        ({"train": ["1", None], "valid": None, "test": None}, "None is neither a weight nor a prefix"),
        ({"train": [], "valid": None, "test": None}, "train names no token files"),
        (f"{WEB} {CODE}", "2 token files without weights, which Megatron blends by their length"),
        (f"1 {WEB} 2", "3 words, of which '1' is a number, are not weights and prefixes in turn"),
        (f"0.5 {WEB} {CODE}", "3 words, of which '0.5' is a number, are not weights and prefixes in turn"),
        (f"0.5 {WEB} {CODE} 0.5", f"first words of each two are 0.5, {CODE}"),
        (f"0 {WEB} 1 {CODE}", "the weight of /a/web_text_document is 0.0, expected a finite number above 0"),
        (f"nan {WEB} 1 {CODE}", "is nan, expected a finite"),
        (f"-1 {WEB} 1 {CODE}", "is -1.0, expected a finite"),
        (f"1 {WEB} 1 {WEB}", "names /a/web_text_document 2 times. Name it once, with the sum"),
        (f"1 {WEB} 1 /other/web", "/a/web_text_document and /other/web would both be the domain 'web'"),
        (f"1 {WEB} 1 /b/prose", "there is no domain 'prose'"),
    ],
)
def test_errors(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_weights(path, DOMAINS)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*absent: No such file"):
        read_weights(tmp_path / "absent", DOMAINS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary is not text"):
        read_weights(tmp_path / "binary", DOMAINS)


def test_blends_are_read_as_megatron_reads_them() -> None:
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="megatron-core is in the dev extra")
    for words in (["0.3", WEB, "70", CODE], [WEB], [WEB, CODE], [WEB, CODE, BOOKS], ["1e-9", "2024", "1", CODE]):
        prefixes, weights = utils.get_blend_from_list(words)
        ours = parse_blend(words, "test")
        assert list(ours.prefixes) == list(prefixes)
        assert (None if ours.weights is None else list(ours.weights)) == weights


def test_written_blends_keep_every_digit() -> None:
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="megatron-core is in the dev extra")
    files = [(0.1 + 0.2, WEB), (1e-9, CODE), (2 / 3, BOOKS)]
    assert utils.get_blend_from_list(data_path(files).split()) == ([WEB, CODE, BOOKS], [0.1 + 0.2, 1e-9, 2 / 3])
    spaced = [(0.5, "/my data/web"), (0.5, CODE)]
    written = json.loads(json.dumps(per_split_json(spaced, files)))
    assert utils.get_blend_from_list(written["train"]) == (["/my data/web", CODE], [0.5, 0.5])
    assert utils.get_blend_from_list(written["valid"])[1] == [0.1 + 0.2, 1e-9, 2 / 3]
    assert utils.get_blend_from_list(written["test"]) is None
    with pytest.raises(InputError, match="'/my data/web' holds white space, at which Megatron cuts"):
        data_path(spaced)


@pytest.mark.parametrize("split", ["98,2", "969,30,1", "100,1,0", "1,1,1", "0.5,0.25,0.25", "7, 2, 1"])
def test_splits_are_cut_where_megatron_cuts_them(split: str) -> None:
    module = pytest.importorskip(
        "megatron.core.datasets.blended_megatron_dataset_config", reason="megatron-core is in the dev extra"
    )
    matrix = module.convert_split_vector_to_split_matrix(module.parse_and_normalize_split(split))
    for number in (*range(60), 999, 1000, 1001, 123_457, 3_000_000_019):
        edges = [(0, 0) if ends is None else tuple(round(end * float(number)) for end in ends) for ends in matrix]
        train, valid, test = split_bounds(split, number)
        assert ((0, train), (train, valid)) == (edges[0], edges[1])
        assert (valid, test) == edges[2] if matrix[2] is not None else test == valid


@pytest.mark.parametrize("split", ["98", "98,x", "1,2,3,4", "", "98,-2", "inf,1", "nan,1"])
def test_bad_splits(split: str) -> None:
    with pytest.raises(InputError, match=f"--split {split}: expected the shares of train, valid"):
        split_bounds(split, 10)


def test_splits_without_train_or_valid() -> None:
    with pytest.raises(InputError, match="--split 1,0 leaves nothing for valid"):
        split_bounds("1,0", 10)
    with pytest.raises(InputError, match="--split 0,1,1 leaves nothing for train"):
        split_bounds("0,1,1", 10)


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        (WEB, "web"),
        (BOOKS, "books"),
        ("plain", "plain"),
        ("/data/web.v2/train", "web.v2"),
        ("/data/web/validation_text_document", "web"),
        ("/data/web/train-00003-of-00008", "web"),
        ("/data/web-00003-of-00008_text_document", "web"),
        ("/data/web_text_document-00003-of-00008", "web"),
        ("/data/training_manuals", "training_manuals"),
        ("train", "train"),
    ],
)
def test_names_of_files(prefix: str, name: str) -> None:
    assert domain_name(prefix) == name


def test_named_files_and_clashes() -> None:
    prefixes = ["/a/part1", "/b/part1", "/c/other"]
    with pytest.raises(InputError, match="/a/part1 and /b/part1 would both be the domain 'part1'"):
        domains_of(prefixes, "test")
    assert domains_of(prefixes, "test", {"web": ["/a/part1", "/b/part1"]}) == {"web": [0, 1], "other": [2]}
    with pytest.raises(InputError, match="/a/part1 and /c/other would both be the domain 'other'"):
        domains_of(prefixes, "test", {"other": ["/a/part1"], "code": ["/b/part1"]})
