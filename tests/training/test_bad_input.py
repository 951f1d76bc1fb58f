"""Bad input ends in one clear message and the stated exit code, with nothing half-written; as a user sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from records import lines

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


@pytest.fixture
def data_copy(data_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_dir, tmp_path / "data"))


def message(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a failed command: no traceback, said once."""
    assert "Traceback" not in done.stderr, done.stderr
    found = [line for line in done.stderr.splitlines() if line.startswith("megamix: ")]
    assert len(found) == 1, done.stderr
    return done.stderr[done.stderr.index("megamix: ") :]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stpes=5", ["train.stpes", "steps"]),
        ("mixer={name: odm, alhpa: 0.5}", ["mixer.alhpa", "alpha"]),
        ("mixer={name: odn}", ["odn", "odm"]),
        ("mixture={code: 1, packages: 1, tables: 1, topics: -1}", ["topics", "-1"]),
        ("train.global_batch=9", ["global_batch", "9", "2"]),
        ("engine={tensor: 2}", ["tensor", "2"]),
        ("model.preset=neox-3m", ["neox-3m", "neox-2m"]),
        ("data.seq_length=1000000", ["domain", "1000000"]),
        ("train.lr=fast", ["train.lr", "fast"]),
        ("data.manifest=nowhere", ["nowhere", "prepare"]),
        ("steps", ["key.path=value"]),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(
    megamix: Run, tiny_config: Write, tmp_path: Path, override: str, parts: list[str]
) -> None:
    text = message(megamix("train", tiny_config(), override, code=2))
    for part in parts:
        assert part in text
    assert not (tmp_path / "run").exists()


def test_missing_and_truncated_files(megamix: Run, tiny_config: Write, data_copy: Path) -> None:
    config = tiny_config(data={"manifest": str(data_copy)})
    for name in ("topics/train.bin", "code/train.idx", "tables/validation.bin"):
        path = data_copy / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        text = message(megamix("train", config, code=3))
        assert str(path) in text
        assert "bytes" in text
        path.unlink()
        text = message(megamix("train", config, code=3))
        assert name.split("/")[0] in text
        path.write_bytes(whole)


def test_a_token_id_beyond_the_vocabulary_is_named(
    megamix: Run, tiny_config: Write, data_copy: Path, tmp_path: Path
) -> None:
    """Damage that neither a size nor a manifest of version 1 shows: met while loading, by one rank of several, and said
    once with its place."""
    manifest = json.loads((data_copy / "manifest.json").read_text())
    for domain in manifest["domains"]:
        for split in (domain["train"], domain["validation"]):
            del split["contents"]
    (data_copy / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    path = data_copy / "code" / "train.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[100:] = 60000
    tokens.tofile(path)
    config = tiny_config(data={"manifest": str(data_copy)}, engine={"pipeline": 2})
    text = message(megamix("train", config, code=2))
    assert "'code'" in text
    assert "60000" in text
    assert "512" in text
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_dir_that_cannot_be_made(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    text = message(megamix("train", tiny_config(run_dir=str(tmp_path / "file" / "run")), code=2))
    assert str(tmp_path / "file" / "run") in text


@pytest.fixture
def stopped_run(megamix: Run, tiny_config: Write, tmp_path: Path) -> Path:
    """A run stopped after 8 of its 12 steps, with checkpoints of steps 4 and 8."""
    megamix("train", tiny_config(), "train.stop_after=8")
    return tmp_path / "run"


def test_resumes_that_would_not_continue_the_run_are_refused(
    megamix: Run, tiny_config: Write, stopped_run: Path, text_dir: Path, tmp_path: Path
) -> None:
    """Other data, another tokenizer, model, batch or mixer, a damaged checkpoint: exit code 3 before a rank is
    started."""
    config = tiny_config()

    def times() -> list[tuple[Path, int]]:
        """When what is kept was changed; the lock says who was there last."""
        return sorted((path, path.stat().st_mtime_ns) for path in stopped_run.rglob("*") if path.name != "lock")

    before = times()
    megamix("prepare", text_dir, "--out", tmp_path / "other", "--tokenizer", "train:512", "--seed", 7)
    other_data = message(megamix("train", config, f"data.manifest={tmp_path / 'other'}", code=3))
    assert "data" in other_data
    assert "checkpoint.accept_changed=[data]" in other_data
    for override, part in [
        ("model.hidden_size=64", "hidden_size was 32, now 64"),
        ("train.global_batch=16", "global_batch was 8, now 16"),
        ("train.seed=5", "seed"),
        ("train.steps=20", "steps was 12, now 20"),
        ("mixture=uniform", "mixture"),
        ("engine.precision=bf16", "precision"),
    ]:
        assert part in message(megamix("train", config, override, code=3))
    assert "never" in message(megamix("train", config, "--resume", "never", code=3))
    assert "step_99" in message(megamix("train", config, "--resume", stopped_run / "checkpoints/step_99", code=2))
    assert times() == before
    decay = ("train.steps=10", "train.schedule=wsd", "train.decay_steps=2", "checkpoint.accept_changed=[train]")
    said = "changed since step 8: steps 12 -> 10, schedule cosine -> wsd, decay_steps default -> 2. Learning rate of step 9: 0.00165"
    assert said in megamix("doctor", config, *decay).stdout
    assert said in megamix("train", config, *decay).stderr
    resumed = [line["text"] for line in lines(stopped_run / "events.jsonl") if line["event"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0].startswith(said)
    trained = [line for line in lines(stopped_run / "metrics.jsonl") if line["event"] == "train"]
    assert [line["lr"] for line in trained[-2:]] == pytest.approx([1.65e-3, 3e-4], rel=1e-12)
    assert "changed since" not in megamix("doctor", config, *decay).stdout, "they are the run's own settings now"


def test_prepare_names_what_is_wrong(megamix: Run, tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "fine"}\n{"txt": "no text key"}\n')
    text = message(megamix("prepare", f"web={tmp_path / 'web.jsonl'}", "--out", tmp_path / "out", code=2))
    assert "line 2" in text
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert "nowhere" in message(megamix("prepare", "web=nowhere/*.txt", "--out", tmp_path / "out", code=2))


def test_metrics_never_hold_what_json_cannot(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """A learning rate that blows the loss up stops the run and names the domains instead of writing NaN."""
    config = tiny_config(train={"lr": 1e18, "warmup": 0.0, "clip": 0.0}, mixer={"name": "static"})
    done = megamix("train", config, code=1)
    assert "the loss is not finite in" in done.stderr
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
