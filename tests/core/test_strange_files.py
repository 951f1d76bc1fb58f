"""Files that a crash or a stranger has left where megamix reads its own: one clear error, or the work is done again,
never a traceback."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from prepared import tree

from megamix.core.config import Config
from megamix.core.errors import InputError, ResumeRefused
from megamix.core.yaml_text import parse_yaml
from megamix.data.tokens.tokenizer import LoadedTokenizer
from megamix.prepare.corpus.domain import finished, note_path
from megamix.prepare.corpus.sources import SOURCES
from megamix.prepare.pipeline import prepare
from megamix.studies.swarm.fit.fitted import FORMAT, VERSION, Fitted
from megamix.studies.swarm.propose.proposal import Proposal, read_proposal, write_proposal
from megamix.studies.swarm.propose.reuse import Update
from megamix.studies.tasks import STAMPS, Stamp
from megamix.training.checkpoints import store
from megamix.training.checkpoints.state import RunState
from megamix.training.records.recorded_run import MIX, RecordedMix
from megamix.training.records.wholeness import missing_from_record

DEEP = b"[" * 100_000
STRANGE = {
    "deep": DEEP,
    "deep in an object": b'{"files": ' + DEEP,
    "not text": b"\xff\xfe\x00",
    "cut off": b'{"step": 3, "fi',
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "no bounds": b'{"step": 1e999, "steps": 1e999, "config": {}, "format": "megamix-checkpoint", "version": 1, "files": {}}',
    "long digits": b'{"step": ' + b"1" * 5000 + b"}",
    "other values": b'{"format": "megamix-checkpoint", "version": 1, "step": 3, "files": {"state.json": 3}, "config": 3}',
}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
    "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "<eos>": 1}, "unk_token": "?"},
}  # fmt: skip


class Settings(Config):
    seed: int = 1


@pytest.fixture(params=STRANGE)
def strange(request: pytest.FixtureRequest) -> bytes:
    return STRANGE[request.param]


def test_the_list_of_a_checkpoint(tmp_path: Path, strange: bytes) -> None:
    folder = tmp_path / "step_3"
    folder.mkdir()
    (folder / store.LISTING).write_bytes(strange)
    assert store.damage(folder) is not None
    with pytest.raises(ResumeRefused, match=r"every checkpoint in .* is damaged"):
        store.newest(tmp_path)


def test_the_state_in_a_checkpoint(tmp_path: Path, strange: bytes) -> None:
    """Whatever its hash says."""
    folder = tmp_path / "step_3"
    folder.mkdir()
    (folder / store.STATE).write_bytes(strange)
    store.write_listing(folder, store.Listing(3, store.LAYERS, {store.STATE: store.describe(folder / store.STATE)}))
    with pytest.raises(ResumeRefused, match=r"is damaged|holds no state"):
        RunState.from_json(store.read_state_json(folder), folder)


@pytest.mark.parametrize(
    "entry", [{"bytes": 2, "sha256": 3}, {"bytes": 2, "sha256": None}, {"bytes": [], "sha256": ""}]
)
def test_a_list_whose_entries_are_of_other_types(tmp_path: Path, entry: dict[str, object]) -> None:
    folder = tmp_path / "step_3"
    folder.mkdir()
    (folder / store.STATE).write_text("{}")
    store.write_listing(folder, store.Listing(3, store.LAYERS, {store.STATE: entry}))
    assert store.damage(folder) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": [3]}, r"step: Input should be"),
        ({"fingerprints": [1]}, r"fingerprints: Input should be"),
        ({"shadow": {"ado": {"config": 3}}}, r"shadow.ado.config: Input should be"),
        ({"guard": {"skips": "many"}}, r"guard.skips: Input should be"),
        ({"record": {"metrics.jsonl": "x"}}, r"record.metrics.jsonl: Input should be"),
    ],
)
def test_a_state_of_other_types(changes: dict[str, object], message: str) -> None:
    whole = {"step": 3, "fingerprints": {}, "sampler": {}, "shadow": {}, "guard": {}, "manifest": "m"}
    assert RunState.from_json(whole, Path("there")).step == 3
    with pytest.raises(ResumeRefused, match=rf"there holds no state of a run \({message}"):
        RunState.from_json({**whole, **changes}, Path("there"))


def test_the_record_of_another_trainer(tmp_path: Path, strange: bytes) -> None:
    (tmp_path / MIX).write_bytes(strange)
    with pytest.raises(InputError, match=f"{MIX} cannot be read"):
        RecordedMix.open(tmp_path)


def test_what_a_record_has_lost(tmp_path: Path, strange: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(strange + b"\n")
    assert "metrics.jsonl has" in (missing_from_record(tmp_path, {"metrics.jsonl": 10**6}, 5) or "")


def test_the_stamps_of_a_study(tmp_path: Path, strange: bytes) -> None:
    (tmp_path / "out").write_text("made")
    stamp = Stamp(tmp_path, ("out",), Settings(), ())
    (tmp_path / STAMPS).write_bytes(strange)
    assert not stamp.holds()
    stamp.set()
    assert stamp.holds()


@pytest.mark.parametrize(
    "text",
    ["a: !!timestamp foo", "a: !!bool foo", 'a: !!int ""', 'a: !!float ""', "a: !!int foo", "a: !!timestamp 2001-99-99",
     "a: !foo bar", "a: !!map [1]", "- \0", "<<: 3", "a: " + "9" * 5000],
)  # fmt: skip
def test_yaml_of_any_content(text: str) -> None:
    with pytest.raises(InputError, match=r"^here.* is not valid YAML"):
        parse_yaml(text, "here")


def test_a_number_that_cannot_be_printed_is_text() -> None:
    """A message about it would fail in its turn."""
    assert parse_yaml("a: 0x" + "f" * 64, "here") == {"a": 16**64 - 1}
    assert parse_yaml("a: 0x" + "f" * 5000, "here") == {"a": "0x" + "f" * 5000}


def test_the_notes_of_a_corpus(tmp_path: Path, strange: bytes) -> None:
    source = next(iter(SOURCES.values()))
    path = note_path(tmp_path, source.domain)
    path.parent.mkdir(parents=True)
    path.write_bytes(strange)
    assert finished(tmp_path, source) is None


@pytest.mark.parametrize("content", [{"runs": 3}, {"families": [1]}, {"metrics": None}])
def test_a_fit(tmp_path: Path, content: dict[str, object]) -> None:
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "runs": ["r"],
        "domains": ["a"],
        "metrics": ["m"],
        "dropped_runs": [],
    }
    more = {"families": {}, "regression": "log_linear", "cross_validation": {}, "family_cross_validation": {}}
    (tmp_path / "fit.json").write_text(json.dumps({**whole, **more, **content}))
    np.savez(tmp_path / "fit.npz", ratios_RK=np.ones((1, 1)), values_RJ=np.ones((1, 1)))
    with pytest.raises(InputError, match="Fit the swarm again"):
        Fitted.open(tmp_path)


@pytest.mark.parametrize("changes", [{"predicted": None}, {"predicted": {"m": "x"}}, {"history": 3}, {"history": [3]}])
def test_a_proposal(tmp_path: Path, changes: dict[str, object]) -> None:
    path = write_proposal(tmp_path, Proposal({"a": 0.5, "b": 0.5}, {"m": 1.0}, {"prior": 3}, ({"runs": 4},)))
    assert read_proposal(tmp_path).details == {"prior": 3}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=rf"mixture.json is damaged: {next(iter(changes))}"):
        read_proposal(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"domains": 3}, {"domains": "ab"}, {"inner": 3}, {"prior": None}, {"history": [3]}]
)
def test_an_update_of_a_mixture(tmp_path: Path, changes: dict[str, object]) -> None:
    whole = Update(
        ("a", "b"), ("b", "existing"), {"a": 1.0}, {"b": 0.5, "existing": 0.5}, "old", {"a": 1.0}, {}, "full", ()
    )
    whole.save(tmp_path)
    assert Update.open(tmp_path) == whole
    path = tmp_path / "update.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=rf"is not what .* writes \({next(iter(changes))}"):
        Update.open(tmp_path)


def test_a_tokenizer_that_makes_its_library_panic(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bad = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps({**TOKENIZER, "normalizer": bad}))
    with pytest.raises(InputError, match=r"tokenizer.json is not a tokenizer.json: "):
        LoadedTokenizer(path)


def test_a_tokenizer_of_few_tokens_with_large_ids(tmp_path: Path) -> None:
    """Counts by id would take 64 GB."""
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps({**TOKENIZER, "model": {**TOKENIZER["model"], "vocab": {"a": 0, "<eos>": 4_000_000_000}}})
    )
    with pytest.raises(InputError, match=r"has 2 tokens with ids up to 4,000,000,000, expected ids below 10,000,000"):
        LoadedTokenizer(path)


def test_a_tokenizer_without_tokens_for_a_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER))
    tokenizer = LoadedTokenizer(path)
    assert tokenizer.encode_batch(["a"]) == [[0]]
    with pytest.raises(InputError, match=r"cannot cut the text into tokens: .*Use a tokenizer that has tokens for any"):
        tokenizer.encode_batch(["b"])


def test_a_tokenizer_that_cuts_by_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**TOKENIZER, "pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}))
    assert LoadedTokenizer(path).word_encoder("uint16") is None


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x80\x04.", DEEP])
def test_notes_of_prepare(tmp_path: Path, content: bytes) -> None:
    """Notes and counts that are damaged are made again, with their part."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "web.jsonl").write_text('{"text": "one two"}\n{"text": "two one"}\n' * 9)
    out = tmp_path / "out"

    def made() -> dict[str, bytes]:
        prepare([str(tmp_path / "text")], out, tokenizer="train:300", workers=1, progress=False)
        return tree(out)

    whole = made()
    for name in ("counts.npy", "prepare.json"):
        (out / "web" / name).write_bytes(content)
        assert made().keys() == whole.keys()
        assert np.load(out / "web" / "counts.npy").tolist() == np.load(io.BytesIO(whole["web/counts.npy"])).tolist()
