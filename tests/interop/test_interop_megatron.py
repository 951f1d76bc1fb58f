"""Megatron builds what ``megamix blend export`` writes: real GPTDatasets of real files, and phases."""

from __future__ import annotations

import json
import subprocess
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interop_files import (
    BATCH,
    EOD,
    NAMES,
    SEQ,
    VOCAB,
    Line,
    as_dict,
    at_every_position,
    blend,
    error_of,
    write_data,
    write_documents,
    write_tokenizer,
)

from megamix.data.blend.blend import Blend
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.weight_files import read_weights

pytest_plugins = ["interop_fixtures"]


def gpt_config(**keys: Any) -> Any:
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is in the dev extra")
    tokenizer = types.SimpleNamespace(eod=EOD, pad=None, vocab_size=VOCAB, unique_identifiers={"class": "stand-in"})
    return gpt.GPTDatasetConfig(
        random_seed=3, sequence_length=SEQ, reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        tokenizer=tokenizer, mid_level_dataset_surplus=0.05, **keys,
    )  # fmt: skip


def build(samples: int, config: Any) -> list[Any]:
    """Megatron's own train, valid and test data sets."""
    builder = pytest.importorskip(
        "megatron.core.datasets.blended_megatron_dataset_builder", reason="megatron-core is in the dev extra"
    )
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    sizes = [samples, 30, None if config.blend_per_split else 0]
    return builder.BlendedMegatronDatasetBuilder(gpt.GPTDataset, sizes, lambda: True, config).build()


def shares_of(dataset: Any) -> dict[str, float]:
    """Which share of a blend's samples comes from each file."""
    counts = np.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
    paths = [part.dataset.path_prefix for part in dataset.datasets]
    return dict(zip(paths, (counts / counts.sum()).tolist(), strict=True))


def parsed(words: Sequence[str]) -> Any:
    utils = pytest.importorskip("megatron.core.datasets.utils", reason="megatron-core is in the dev extra")
    return utils.get_blend_from_list(words)


@pytest.mark.parametrize("which", ["mean", "final"])
def test_megatron_builds_the_exported_blend(run: tuple[Path, list[Line], Blend], tmp_path: Path, which: str) -> None:
    """Real GPTDatasets: as many samples of every file as its weight says; of a domain of weight 0, none."""
    samples = 4000
    out = tmp_path / "blend.json"
    blend("export", run[0], "--which", which, "--format", "per-split-json", "--out", out)
    written = json.loads(out.read_text())
    config = gpt_config(blend_per_split=[parsed(written[split]) for split in ("train", "valid", "test")])
    train, valid, test = build(samples, config)
    assert test is None
    shares = shares_of(train)
    words = written["train"]
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        assert abs(shares[prefix] - float(weight)) * samples <= len(shares)
    assert len(shares) == (4 if which == "mean" else 3)
    web = [share for prefix, share in shares.items() if "/web/" in prefix]
    assert web[0] == pytest.approx(2 * web[1], abs=len(shares) / samples)
    assert shares_of(valid)[written["valid"][1]] == pytest.approx(6 / 9, abs=0.1)
    sample = train[0]
    assert sample["tokens"].shape == (SEQ,)


def test_megatron_refuses_a_weight_of_0(data: Path) -> None:
    """Why such a domain is left out."""
    prefixes = [f"{data.parent}/raw/{name}/train" for name in ("code", "books")]
    with pytest.raises(AssertionError):
        build(100, gpt_config(blend_per_split=[(prefixes, [1.0, 0.0]), None, None]))


def test_megatron_splits_adopted_files_where_we_do(tmp_path: Path) -> None:
    for name, number in (("web", 37), ("code", 25)):
        write_documents(tmp_path / name, [12] * number, seed=number)
    split = "80,10,10"
    blend("adopt", f"web={tmp_path}/web", f"code={tmp_path}/code", "--out", tmp_path / "data", "--tokenizer",
          write_tokenizer(tmp_path), "--split", split)  # fmt: skip
    words = blend("export", tmp_path / "data").split()
    train, valid, _ = build(500, gpt_config(blend=parsed(words), split=split))
    manifest = Manifest.load(tmp_path / "data")
    for theirs, ours in ((train, "train"), (valid, "validation")):
        for part, entry in zip(theirs.datasets, manifest.domains, strict=True):
            (ends,) = getattr(entry, ours).ranges
            assert (part.indices[0], part.indices[-1] + 1) == ends
    assert "cannot say. Use --format megatron" in error_of("export", tmp_path / "data", "--format", "per-split-json")


def test_files_with_white_space(tmp_path: Path) -> None:
    data = write_data(tmp_path / "my files")
    assert "holds white space, at which Megatron cuts --data-path" in error_of("export", data)
    written = json.loads(blend("export", data, "--format", "per-split-json"))
    assert parsed(written["train"])[0][2] == f"{tmp_path}/my files/raw/code/train"


def test_phases(run: tuple[Path, list[Line], Blend], tmp_path: Path) -> None:
    run_dir, lines, _ = run
    out = tmp_path / "phases"
    shown = blend("export", run_dir, "--stages", 4, "--out", out)
    names = ["phase_1.json", "phase_2.json", "phase_3.json", "phase_4.json", "phases.json", "phases.sh"]
    assert shown.split() == [str(out / name) for name in names]
    phases = json.loads((out / "phases.json").read_text())
    assert phases["phase_transition_iterations"] == [12, 25, 38]  # 12.5 and 37.5, halves to the even one
    assert (phases["train_samples"], phases["global_batch_size"], phases["seq_length"]) == (300, BATCH, SEQ)
    total = dict.fromkeys(NAMES, 0.0)
    for number, (phase, (first, end)) in enumerate(
        zip(phases["phases"], ((0, 12), (12, 25), (25, 38), (38, 50)), strict=True), start=1
    ):
        assert phase["iterations"] == [first, end]
        assert (phase["samples"], phase["tokens"]) == ((end - first) * BATCH, (end - first) * BATCH * SEQ)
        expected = np.mean(at_every_position(lines, first * BATCH, end * BATCH), axis=0)
        np.testing.assert_allclose([phase["weights"][name] for name in NAMES], expected, rtol=1e-13)
        read = read_weights(out / f"phase_{number}.json", NAMES)
        np.testing.assert_allclose([read[name] for name in NAMES], expected, rtol=1e-13)
        for name in NAMES:
            total[name] += phase["weights"][name] * phase["samples"] / 300
    assert total == pytest.approx(as_dict(blend("export", run_dir, "--format", "json")), rel=1e-13)

    tokens = BATCH * SEQ
    blend(
        "export",
        run_dir,
        "--stages-at",
        f"{10.4 * tokens},{30 * tokens:.6e}",
        "--format",
        "megatron",
        "--out",
        tmp_path / "two",
    )
    again = json.loads((tmp_path / "two/phases.json").read_text())
    assert again["phase_transition_iterations"] == [10, 30]
    assert (tmp_path / "two/phase_1.txt").read_text().count("/train") == 4


@pytest.mark.parametrize(
    ("iteration", "file"), [(None, 1), (0, 1), (11, 1), (12, 2), (24, 2), (25, 3), (49, 4), (50, 4)]
)
def test_the_script_picks_the_phase_of_a_checkpoint(
    run: tuple[Path, list[Line], Blend], tmp_path: Path, iteration: int | None, file: int
) -> None:
    out, saved = tmp_path / "my phases", tmp_path / "checkpoints"
    blend("export", run[0], "--stages", 4, "--out", out)
    saved.mkdir()
    if iteration is not None:
        (saved / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    script = f'set -eu; source "{out}/phases.sh"; pick_phase "{saved}"; printf "%s\\n" "${{PHASE_ARGS[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "--global-batch-size", str(BATCH), "--seq-length", str(SEQ), "--train-samples", "300",
        "--phase-transition-iterations", "12,25,38", "--per-split-data-args-path", f"{out}/phase_{file}.json",
    ]  # fmt: skip


def test_one_phase_has_no_transitions(run: tuple[Path, list[Line], Blend], tmp_path: Path) -> None:
    blend("export", run[0], "--stages", 1, "--format", "megatron", "--out", tmp_path)
    script = (tmp_path / "phases.sh").read_text()
    assert "--phase-transition-iterations" not in script.split("PHASE_ARGS=(")[1]
    assert '--split 100,0,0 --data-args-path "$folder/$file"' in script
    assert (tmp_path / "phase_1.txt").read_text() == blend("export", run[0])
