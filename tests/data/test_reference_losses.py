"""The cache of reference losses: rows and their order, what is refused, and going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_megamix
from numpy.typing import NDArray
from small_config import small

from megamix.analysis.inspect import inspect_path
from megamix.core.errors import DataChanged, InputError, MegamixError
from megamix.data.blend.blend import Blend
from megamix.data.loader import WindowReader
from megamix.data.reference_losses import (
    PROGRESS,
    CachedDomain,
    CacheInfo,
    ReferenceLosses,
    ReferenceWriter,
    Selection,
    finish,
    losses_path,
    open_progress,
    save_progress,
)
from megamix.data.tokens.block_files import Verified
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter
from megamix.data.verify_losses import hash_losses, verify_losses
from megamix.training.plan import DataPlan, make_plan
from megamix.training.reference.cache import cache_key, open_reference, samples_read, whole_domains

SEQ = 8
WINDOWS = {"web": 30, "a/b": 7}


def make_info(**changes: Any) -> CacheInfo:
    domains = {name: CachedDomain(digest=f"of {name}", windows=n, computed=n) for name, n in WINDOWS.items()}
    fields: dict[str, Any] = {
        "seq_length": SEQ,
        "reset_position_ids": False,
        "tokenizer": "t" * 64,
        "domains": domains,
        "checkpoint": "runs/reference/checkpoints/step_9",
        "checkpoint_sha256": "c" * 64,
    }
    return CacheInfo(**{**fields, **changes})


def losses_of(domain: int, sample: int) -> NDArray[np.float32]:
    """Of one window: different everywhere, and exact in float16."""
    return (1 + np.arange(SEQ) + SEQ * (sample + 30 * domain)).astype(np.float32)


def write(folder: Path, info: CacheInfo, selection: Selection, start: int, end: int) -> None:
    """Rows [start, end) of the selection, in pieces of 3."""
    writer = ReferenceWriter(folder, info)
    for first in range(start, end, 3):
        domain_n, sample_n = selection.at(np.arange(first, min(first + 3, end)))
        rows = [losses_of(*pair) for pair in zip(domain_n.tolist(), sample_n.tolist(), strict=True)]
        writer.write(domain_n, sample_n, np.stack(rows))
    writer.sync()
    writer.close()


def whole() -> Selection:
    return Selection(list(WINDOWS.values()))


def end(folder: Path, info: CacheInfo) -> None:
    finish(folder, info, {name: hash_losses(folder, name) for name in info.domains})


def make_cache(folder: Path) -> CacheInfo:
    info = make_info()
    assert open_progress(folder, info) == 0
    write(folder, info, whole(), 0, whole().total)
    end(folder, info)
    return info


def test_rows_are_the_windows(tmp_path: Path) -> None:
    """Read in another order of domains than they were written in, and some only."""
    info = make_cache(tmp_path)
    assert not (tmp_path / PROGRESS).exists()
    for names in (["a/b", "web"], ["a/b"]):
        key = info.model_copy(update={"domains": {name: info.domains[name] for name in names}})
        cache, row = ReferenceLosses(tmp_path, key), np.empty(SEQ, np.float32)
        for domain, name in enumerate(names):
            for sample in range(WINDOWS[name]):
                cache.read_window(domain, sample, row)
                np.testing.assert_array_equal(row, losses_of(list(WINDOWS).index(name), sample))


def test_batches_carry_the_losses_of_their_labels(tmp_path: Path) -> None:
    """Every row of a rank's share, against its own window."""
    make_cache(tmp_path / "cache")
    rng = np.random.default_rng(0)
    domains = []
    for number, windows in enumerate(WINDOWS.values()):
        with IndexedWriter(tmp_path / str(number), "uint16") as writer:
            writer.add_document(rng.integers(0, 50, windows * SEQ + 1))
        domains.append(DomainTokens(str(number), [tmp_path / str(number)]))
    reader = WindowReader(domains, SEQ, 50, reference=ReferenceLosses(tmp_path / "cache", make_info()))
    domain_n, sample_n = np.array([1, 0, 0, 1, 0, 1]), np.array([6, 29, 0, 2, 13, 0])
    mine = np.array([4, 0, 3, 1])
    batch = reader.batch(domain_n, sample_n, mine, (2, 2))
    assert batch.reference is not None
    assert batch.reference.shape == batch.labels.shape == (2, 2, SEQ)
    wanted = [losses_of(int(domain_n[row]), int(sample_n[row])) for row in mine]
    np.testing.assert_array_equal(batch.reference.flatten(0, 1).numpy(), wanted)
    assert len(batch.targets) == 3


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    """Losses stay within 0.05 %, zero and what is too large are clamped; what is not finite is refused by name."""
    info = make_info()
    open_progress(tmp_path, info)
    writer = ReferenceWriter(tmp_path, info)
    given = np.array([0.0, 1e-9, 1 / 3, 11.123, 65503.0, 65504.0, 7e4, 1e30], np.float32)
    writer.write(np.array([0]), np.array([5]), given[None])
    end(tmp_path, info)
    row = np.empty(SEQ, np.float32)
    ReferenceLosses(tmp_path, info).read_window(0, 5, row)
    np.testing.assert_allclose(row[2:5], given[2:5], rtol=2**-11)
    assert row[[0, 1, 5, 6, 7]].tolist() == [2.0**-24, 2.0**-24, 65504.0, 65504.0, 65504.0]
    for bad in (np.nan, np.inf):
        rows = np.ones((2, SEQ), np.float32)
        rows[1, 3] = bad
        with pytest.raises(MegamixError, match="not finite in domain 'a/b', sample 4"):
            writer.write(np.array([0, 1]), np.array([3, 4]), rows)
    writer.close()


def test_a_row_that_was_not_computed(tmp_path: Path) -> None:
    """One that is zero, or zero in part, as a hole in a copied file would be."""
    info = make_cache(tmp_path)
    path = losses_path(tmp_path, "web")
    for column in (0, SEQ - 1):
        rows = np.fromfile(path, "<f2").reshape(-1, SEQ)
        rows[11, column] = 0
        rows.tofile(path)
        with pytest.raises(InputError, match=r"no losses of sample 11 of domain 'web' \(it holds those of 30 of 30"):
            ReferenceLosses(tmp_path, info).read_window(0, 11, np.empty(SEQ, np.float32))
        np.stack([losses_of(0, sample) for sample in range(30)]).astype("<f2").tofile(path)


def changed_domain(**changes: Any) -> dict[str, Any]:
    info = make_info()
    return {"domains": {**info.domains, "web": info.domains["web"].model_copy(update=changes)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 16}, "made with data.seq_length 8, this run has 16"),
        ({"reset_position_ids": True}, "made with data.reset_position_ids False, this run has True"),
        ({"tokenizer": "u" * 64}, "made with the tokenizer's SHA-256 ttt.*, this run has uuu"),
        (changed_domain(digest="new"), "of domain 'web' with the data of web, this run has new"),
        (changed_domain(windows=31), "of domain 'web' with the number of samples 30, this run has 31"),
        ({"domains": {"wob": make_info().domains["web"]}}, "none of domain 'wob'. Did you mean 'web'"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_cache(tmp_path)
    with pytest.raises(InputError, match=f"{message}.*Run `megamix reference`"):
        ReferenceLosses(tmp_path, make_info(**changes))
    with pytest.raises(InputError, match=f"{message}.*Choose another --out"):
        open_progress(tmp_path, make_info(**changes))


def test_damaged_caches_are_named(tmp_path: Path) -> None:
    info = make_cache(tmp_path)
    path = losses_path(tmp_path, "a/b")
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(
        InputError, match=rf"{path} of domain 'a/b' have {len(content) - 2} bytes, expected {len(content)}"
    ):
        ReferenceLosses(tmp_path, info)
    path.unlink()
    with pytest.raises(InputError, match=f"cannot read the reference losses {path} of domain 'a/b'"):
        ReferenceLosses(tmp_path, info)
    (tmp_path / "reference.json").write_text("{")
    with pytest.raises(InputError, match=r"reference.json is not valid JSON.*Run `megamix reference` again"):
        ReferenceLosses(tmp_path, info)
    (tmp_path / "reference.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"reference.json is not text"):
        ReferenceLosses(tmp_path, info)
    (tmp_path / "reference.json").write_text(json.dumps({**info.model_dump(), "version": 2}))
    with pytest.raises(InputError, match="version"):
        ReferenceLosses(tmp_path, info)
    with pytest.raises(
        InputError, match=r"cannot read .*nowhere/reference.json: .*Give the folder that `megamix reference` wrote"
    ):
        ReferenceLosses(tmp_path / "nowhere", info)


def test_going_on(tmp_path: Path) -> None:
    """After 14 rows that are safe and some that are not, twice: the rest is written and the bytes are those of a cache
    written at once. An unfinished one is not read, and not taken for another."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    info = make_cache(once)
    open_progress(twice, info)
    write(twice, info, whole(), 0, 14)
    save_progress(twice, info, 14)
    write(twice, info, whole(), 14, 20)
    with pytest.raises(InputError, match=r"not finished\. Run the same `megamix reference` command again"):
        ReferenceLosses(twice, info)
    with pytest.raises(InputError, match=r"of the checkpoint runs/reference.*asked for is other"):
        open_progress(twice, make_info(checkpoint="other", checkpoint_sha256="d" * 64))
    done = open_progress(twice, info)
    assert done == 14
    write(twice, info, whole(), done, whole().total)
    end(twice, info)
    assert open_progress(twice, info) is None
    for path in once.iterdir():
        assert (twice / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match=r"are of the domains web, a/b, asked for are a/b, web"):
        open_progress(twice, make_info(domains=dict(reversed(info.domains.items()))))


def test_an_unfinished_cache_that_is_damaged(tmp_path: Path) -> None:
    open_progress(tmp_path, make_info())
    whole = (tmp_path / PROGRESS).read_text()
    assert '"done": 0' in whole
    (tmp_path / PROGRESS).write_text(whole.replace('"done": 0', '"done": 1e999'))
    with pytest.raises(InputError, match=r"progress.json is damaged"):
        open_progress(tmp_path, make_info())
    (tmp_path / PROGRESS).write_text(whole)
    losses_path(tmp_path, "web").write_bytes(b"")
    with pytest.raises(InputError, match=r"web.f16 of domain 'web' have 0 bytes, expected 480 \(30 samples"):
        open_progress(tmp_path, make_info())
    (tmp_path / PROGRESS).write_text('{"done": 3}')
    with pytest.raises(InputError, match=r"progress.json is damaged .*Choose another --out"):
        open_progress(tmp_path, make_info())


def test_inspect_says_what_a_cache_holds(tmp_path: Path) -> None:
    """Finished, half-way (domains are computed one after the other), and damaged."""
    info = make_info()
    folder = tmp_path / "cache"
    assert open_progress(folder, info) == 0
    write(folder, info, whole(), 0, 33)
    save_progress(folder, info, 33)
    table = ["web 30 30 30", "a/b 3 7 7"]
    for state, counts in (("not finished (the same", "33 of 37"), ("finished.", "37 of 37")):
        head, *rows = inspect_path(folder).text().split("\n---")
        assert f"cache is a cache of reference losses, {state}" in head
        assert f"samples     {counts} computed, {SEQ} losses each" in head
        assert info.checkpoint in head
        assert info.checkpoint_sha256 in head
        assert [" ".join(line.split()) for line in rows[0].splitlines()[1:]] == table
        write(folder, info, whole(), 33, 37)
        end(folder, info)
        table = ["web 30 30 30", "a/b 7 7 7"]
    losses_path(folder, "web").write_bytes(b"")
    with pytest.raises(InputError, match=r"web.f16 of domain 'web' have 0 bytes, expected 480"):
        inspect_path(folder)
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(InputError, match="is nothing that megamix makes"):
        inspect_path(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is imitated by /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    info = make_info()
    open_progress(tmp_path, info)
    losses_path(tmp_path, "web").unlink()
    losses_path(tmp_path, "web").symlink_to("/dev/full")
    writer = ReferenceWriter(tmp_path, info)
    with pytest.raises(MegamixError, match=r"cannot write .*web.f16: No space left on device. Make room"):
        writer.write(np.array([0]), np.array([0]), losses_of(0, 0)[None])
    writer.close()


def test_the_order_of_a_selection() -> None:
    """Two chosen windows, all of 3, none, and again some: walked through by hand; and told apart by what was chosen."""
    chosen = [np.array([2, 5]), 3, np.empty(0, np.int64), np.array([0, 7, 8])]
    selection = Selection(chosen)
    domain_n, sample_n = selection.at(np.arange(selection.total))
    wanted = [(0, 2), (0, 5), (1, 0), (1, 1), (1, 2), (3, 0), (3, 7), (3, 8)]
    assert list(zip(domain_n.tolist(), sample_n.tolist(), strict=True)) == wanted
    assert [part.tolist() for part in selection.at(np.array([7, 0]))] == [[3, 0], [8, 2]]
    key = make_info(domains={name: CachedDomain(digest="", windows=9, computed=0) for name in "abcd"})
    described = selection.describe(key)
    assert [entry.computed for entry in described.values()] == [2, 3, 0, 3]
    other = Selection([*chosen[:3], np.array([0, 6, 8])]).describe(key)
    assert [name for name in described if described[name] != other[name]] == ["d"]


@pytest.fixture
def data_plan(data_dir: Path) -> Any:
    def make(*overrides: str, verify: bool = False) -> DataPlan:
        return make_plan(small(f"data.manifest={data_dir}", "train.global_batch=8", *overrides), verify=verify)

    return make


@pytest.mark.parametrize("sampling", ["low_discrepancy", "iid"])
@pytest.mark.parametrize("steps", [20, 4000])
def test_what_a_run_reads(data_plan: Any, sampling: str, steps: int) -> None:
    """Of a run with fixed weights: all samples that the blend deals and, where a domain is not read whole, at most as
    many more as there are domains."""
    mixture = "mixture={code: 0.5, tables: 0.3, topics: 0.2, packages: 0}"
    plan = data_plan(f"data.sampling={sampling}", f"train.steps={steps}", mixture, "mixer={name: doremi}")
    selection = samples_read(plan)
    domain_n, sample_n = plan.blend().take(steps * 8)
    computed = set(zip(*(part.tolist() for part in selection.at(np.arange(selection.total))), strict=True))
    read = set(zip(domain_n.tolist(), sample_n.tolist(), strict=True))
    assert read <= computed
    for domain, count in enumerate(selection.counts.tolist()):
        distinct = sum(pair[0] == domain for pair in read)
        assert count in (distinct + 4, plan.num_samples[domain])
    assert (selection.counts == plan.num_samples).any() == (steps == 4000)
    assert len(computed) == selection.total < whole_domains(plan).total


def test_what_a_run_may_read_when_weights_move(data_plan: Any) -> None:
    """With weights of its own choice within the bounds, at any step."""
    plan = data_plan("mixer={name: doremi, apply: sampling}", "train.steps=40", "data.max_weight=0.6")
    selection = samples_read(plan)
    assert selection.counts.tolist() == [0.6 * 40 * 8 + 4] * 4
    computed = set(zip(*(part.tolist() for part in selection.at(np.arange(selection.total))), strict=True))
    blend = Blend(plan.num_samples, [0.6, 0.1, 0.2, 0.1], plan.config.train.seed, domain_keys=plan.domain_keys)
    dealt = [blend.take(160)]
    blend.set_weights([0.0, 0.6, 0.2, 0.2])
    dealt.append(blend.take(160))
    for domain_n, sample_n in dealt:
        assert set(zip(domain_n.tolist(), sample_n.tolist(), strict=True)) <= computed


def test_a_plan_opens_its_cache(data_plan: Any, data_dir: Path, tmp_path: Path) -> None:
    plan = data_plan("mixer={name: doremi}")
    assert open_reference(plan) is None
    assert open_reference(data_plan("mixer={name: static}")) is None
    key = cache_key(plan)
    manifest = Manifest.load(data_dir)
    assert key.tokenizer == manifest.tokenizer.sha256
    windows = {name: (manifest.domain(name).train.tokens - 1) // 32 for name in manifest.domain_names}
    assert {name: domain.windows for name, domain in key.domains.items()} == windows
    info = CacheInfo(**key.model_dump(), checkpoint="", checkpoint_sha256="")
    open_progress(tmp_path, info)
    end(tmp_path, info)
    assert open_reference(data_plan(f"mixer={{name: doremi, reference: {tmp_path}}}")) is not None
    with pytest.raises(InputError, match=r"made with data.seq_length 32, this run has 16"):
        open_reference(data_plan(f"mixer={{name: doremi, reference: {tmp_path}}}", "data.seq_length=16"))


def test_a_cache_may_move(data_plan: Any, tmp_path: Path) -> None:
    """A mixer is told apart by whose losses it reads, wherever they lie; and by everything else, as before."""

    def identity(folder: str, sha256: str, *, eta: float = 1.0) -> dict[str, Any]:
        plan = data_plan(f"mixer={{name: doremi, eta: {eta}, reference: {tmp_path / folder}}}")
        if not (tmp_path / folder).is_dir():
            info = CacheInfo(**cache_key(plan).model_dump(), checkpoint=folder, checkpoint_sha256=sha256)
            open_progress(tmp_path / folder, info)
            end(tmp_path / folder, info)
        return plan.mixer_identity(plan.config.mixer)

    first = identity("here", "a" * 64)
    assert identity("there", "a" * 64) == first
    assert identity("another", "b" * 64) != first
    assert identity("here", "a" * 64, eta=0.5) != first
    plan = data_plan("mixer={name: doremi}")
    assert plan.mixer_identity(plan.config.mixer) == plan.config.mixer.model_dump(mode="json")


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize(("name", "at"), [("web", 0), ("web", 479), ("a/b", 50)])
def test_a_changed_byte_is_found(tmp_path: Path, sample: bool, name: str, at: int) -> None:
    make_cache(tmp_path)
    total = 2 * SEQ * sum(WINDOWS.values())
    assert verify_losses(tmp_path, sample=sample) == Verified(total, total)
    path = losses_path(tmp_path, name)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataChanged, match=rf"domain '{name}': {path}: bytes 0 to 4194304 have changed"):
        verify_losses(tmp_path, sample=sample)
    other = next(other for other in WINDOWS if other != name)
    verify_losses(tmp_path, [other], sample=sample)
    for size in (len(data) - 1, len(data) + 1):
        path.write_bytes(bytes(data[:size]).ljust(size, b"\0"))
        with pytest.raises(DataChanged, match=rf"it has {size} bytes, reference.json says {len(data)}"):
            verify_losses(tmp_path, sample=sample)
    path.unlink()
    with pytest.raises(DataChanged, match=r"it is missing"):
        verify_losses(tmp_path, sample=sample)


def test_a_run_verifies_its_losses(data_plan: Any, tmp_path: Path) -> None:
    """At every start, and all of them where that is asked for, each rank its share."""
    mixer = f"mixer={{name: doremi, reference: {tmp_path}}}"
    key = cache_key(data_plan("mixer={name: static}"))
    domains = {name: domain.model_copy(update={"computed": domain.windows}) for name, domain in key.domains.items()}
    info = make_info(
        seq_length=key.seq_length, tokenizer=key.tokenizer, reset_position_ids=key.reset_position_ids, domains=domains
    )
    open_progress(tmp_path, info)
    end(tmp_path, info)
    found = data_plan(mixer, verify=True).verified_losses
    assert found is not None
    assert found.num_bytes == found.total_bytes > 0
    name = list(domains)[-1]
    path = losses_path(tmp_path, name)
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    for more in ("data.verify=sample", "data.verify=all"):
        with pytest.raises(DataChanged, match=f"domain '{name}'"):
            data_plan(mixer, more, verify=True)


def test_the_command_for_a_cache(tmp_path: Path) -> None:
    """Hashes are added to a cache of before they were kept."""
    make_cache(tmp_path)
    path = tmp_path / "reference.json"
    data = json.loads(path.read_text())
    for domain in data["domains"].values():
        del domain["blocks"]
    path.write_text(json.dumps(data))
    assert "has no hashes of blocks" in run_megamix("verify", tmp_path).stderr
    run_megamix("verify", tmp_path, "--write-hashes")
    assert run_megamix("verify", tmp_path).stdout.startswith(f"{tmp_path}: all 592 bytes of the files and all sizes")
    losses_path(tmp_path, "web").write_bytes(b"\1" * 480)
    assert "web.f16" in run_megamix("verify", tmp_path, code=3).stderr
