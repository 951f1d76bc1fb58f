"""Where the time of a step is said to go: waits of known length are put into its parts, on two real ranks."""

from __future__ import annotations

import _thread
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megamix.training.step_clock import StepClock, StepTimes, communicating_methods

CPU = torch.device("cpu")
LATE = 0.4  # seconds that rank 1 comes late, or that something takes


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    methods = dict(vars(dist.ProcessGroup)), dict(vars(dist.Work))
    found = {}
    for name, case in CASES.items():
        dist.barrier()
        clock = StepClock(CPU)
        case(clock, rank)
        times = clock.take()
        found[name] = {**times.record(), "steps": times.steps, "total": times.total}
        empty = clock.take()
        assert (empty.steps, empty.total) == (0, 0.0)
    assert methods == (dict(vars(dist.ProcessGroup)), dict(vars(dist.Work)))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def _late(rank: int) -> None:
    if rank == 1:
        time.sleep(LATE)


def _collective(clock: StepClock, rank: int) -> None:
    with clock.step(), clock.engine():
        _late(rank)
        dist.all_reduce(torch.ones(4))


def _sent(clock: StepClock, rank: int) -> None:
    with clock.step(), clock.engine():
        _late(rank)
        dist.recv(torch.ones(4), 1) if rank == 0 else dist.send(torch.ones(4), 0)


def _waited_for(clock: StepClock, rank: int) -> None:
    """Started in the step, and waited for later in it."""
    with clock.step(), clock.engine():
        _late(rank)
        work: Any = dist.all_reduce(torch.ones(4), async_op=True)
        work.wait()


def _kept_function(clock: StepClock, rank: int, all_reduce: Callable[..., Any] = dist.all_reduce) -> None:
    """Called through a reference that was kept from before."""
    with clock.step(), clock.engine():
        _late(rank)
        all_reduce(torch.ones(4))


def _failed(clock: StepClock, rank: int) -> None:
    """An error inside the engine leaves nothing behind (the methods are compared at the end)."""
    with pytest.raises(ZeroDivisionError), clock.step(), clock.engine():
        raise ZeroDivisionError
    clock.take()


def _mixing(clock: StepClock, rank: int) -> None:
    """What mixing communicates and waits for inside the engine's step, outside it, and after it."""

    def submit(seconds: float) -> None:
        _late(rank)
        dist.all_reduce(torch.ones(4))

    with clock.step():
        with clock.engine():
            clock.as_mixing(submit)(0.0)
        with clock.mixing():
            time.sleep(LATE)
    with clock.mixing():
        time.sleep(LATE)


def _parts(clock: StepClock, rank: int) -> None:
    for _ in range(2):
        with clock.step():
            with clock.data():
                time.sleep(LATE)
            time.sleep(LATE / 2)
    with clock.device():
        time.sleep(LATE)


def _background(clock: StepClock, rank: int) -> None:
    """Another thread communicates while this one computes."""
    with clock.step(), clock.engine():

        def work() -> None:
            _late(rank)
            dist.all_reduce(torch.ones(4))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()


CASES: dict[str, Callable[[StepClock, int], None]] = {
    "collective": _collective,
    "sent": _sent,
    "waited for": _waited_for,
    "kept function": _kept_function,
    "failed": _failed,
    "mixing": _mixing,
    "parts": _parts,
    "background": _background,
}


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("timed")
    mp.spawn(_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["collective", "sent", "waited for", "kept function"])
def test_waiting_for_a_late_rank_is_communication_of_the_other(timed: list[dict[str, Any]], case: str) -> None:
    """And what the late one did meanwhile is compute."""
    waiting, late = timed[0][case], timed[1][case]
    assert waiting["communication_seconds"] > 0.8 * LATE > waiting["compute_seconds"]
    assert late["compute_seconds"] >= LATE > late["communication_seconds"]


def test_whatever_mixing_needs_is_mixing(timed: list[dict[str, Any]]) -> None:
    """On either rank, also what it communicates."""
    for rank in (0, 1):
        assert timed[rank]["mixing"]["mixing_seconds"] > 2.8 * LATE
        assert timed[rank]["mixing"]["communication_seconds"] == 0


def test_background_threads_are_not_timed(timed: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert timed[rank]["background"]["communication_seconds"] == 0


def test_parts_add_up_to_means_per_step(timed: list[dict[str, Any]]) -> None:
    """Two steps; a wait for the device after them belongs to their compute."""
    for rank in (0, 1):
        parts = timed[rank]["parts"]
        assert parts["steps"] == 2
        assert parts["data_wait_seconds"] >= LATE
        assert parts["compute_seconds"] >= LATE
        assert parts["step_seconds"] == pytest.approx(parts["total"] / 2)
        names = ("compute", "data_wait", "communication", "mixing")
        assert sum(parts[f"{name}_seconds"] for name in names) == pytest.approx(parts["step_seconds"])


class Event:
    """Stands in for a GPU's event: the stream's clock moves by what a test says."""

    now = 0.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


def test_on_a_gpu_the_stream_is_timed_and_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host time of a call is compute; what its stream took, also on threads of autograd's, is communication. Events
    are used again, and other threads of Python's are left out."""

    def reduce(self: Any, seconds: float) -> float:
        """allreduce(self: ProcessGroup) -> c10d::Work"""
        Event.now += seconds
        return seconds

    class Group:
        allreduce = reduce

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(dist, "ProcessGroup", Group)
    clock = StepClock(torch.device("cuda"))
    for _ in range(2):
        with clock.step(), clock.engine():
            assert Group().allreduce(0.001) == 0.001
            done = threading.Event()
            # As autograd's threads: not known to `threading`.
            _thread.start_new_thread(lambda done=done: (Group().allreduce(0.002), done.set()), ())
            done.wait()
            other = threading.Thread(target=lambda: Group().allreduce(100.0))
            other.start()
            other.join()
            with clock.mixing():
                Group().allreduce(100.0)
            time.sleep(0.05)
        times = clock.take()
        assert times.communication == pytest.approx(0.003)
        assert times.compute > 0.04
        assert Event.made == 4
    assert Group.allreduce is reduce


def test_what_communicates_is_known_by_its_signature() -> None:
    """Every collective, send and receive that all versions of torch have, and nothing that only asks."""
    found = {name for _, name in communicating_methods(dist.ProcessGroup)}
    assert found >= {
        "allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier", "allgather",
        "_allgather_base", "reduce_scatter", "_reduce_scatter_base", "alltoall", "alltoall_base", "send", "recv",
        "recv_anysource", "_end_coalescing",
    }  # fmt: skip
    assert not found & {"rank", "size", "name", "_start_coalescing", "_get_backend", "shutdown", "abort"}


def test_no_step_has_no_time() -> None:
    assert set(StepTimes(0, 0.0, 0.0, 0.0, 0.0).record().values()) == {0.0}


def test_the_record_of_a_run_says_where_its_time_went(
    megamix: Callable[..., subprocess.CompletedProcess[str]], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Two stages of a pipeline wait for each other; the parts are there for both engines and add up."""
    for name in ("deepspeed", "megatron"):
        run = tmp_path / name
        engine = {"name": name, "pipeline": 2}
        path = tiny_config(run_dir=str(run), train={"steps": 4}, log={"every": 2}, evaluate={"every": 0, "batches": 1})
        text = path.read_text().replace(
            "  pipeline: 1\n  zero: 1\n", "".join(f"  {k}: {v}\n" for k, v in engine.items())
        )
        path.write_text(text)
        megamix("train", path)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        train = [line for line in lines if line["event"] == "train"]
        assert [line["step"] for line in train] == [2, 4]
        for line in train:
            parts = [line[f"{part}_seconds"] for part in ("compute", "data_wait", "communication", "mixing")]
            assert sum(parts) == pytest.approx(line["step_seconds"])
            assert min(parts) > 0
            assert line["tokens_per_second"] == pytest.approx(8 * 64 / line["step_seconds"])
