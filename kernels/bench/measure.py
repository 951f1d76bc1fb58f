"""One measurement of the acceptance, in a process of its own: `python measure.py '{"kind": ..., "file": ...}'`.

Writes a list of rows {metric, value, unit, low, high, note} to the file.

Shapes: N tokens, H hidden, V vocabulary, K domains.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

REQUEST: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
if REQUEST.get("device") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # settled when Triton is first imported

import running  # noqa: E402  # pyright: ignore[reportMissingImports]
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from cross_entropy import Bench  # noqa: E402  # pyright: ignore[reportMissingImports]
from peers import INCOMING, LINEAR, PEERS, megamix  # noqa: E402  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device(REQUEST.get("device", "cpu"))
ON_GPU = DEVICE.type == "cuda"
REPEATS = 30 if ON_GPU else 2
Rows = list[dict[str, Any]]


def figure(metric: str, values: list[float] | float, unit: str, note: str = "") -> dict[str, Any]:
    """Row of the median and the quartiles of some values."""
    values = values if isinstance(values, list) else [values]
    row: dict[str, Any] = {"metric": metric, "value": statistics.median(values), "unit": unit, "note": note}
    if len(values) > 1:
        row["low"], _, row["high"] = statistics.quantiles(values, n=4, method="inclusive")
    return row


def bench_of(request: dict[str, Any]) -> Bench:
    dtype = getattr(torch, request.get("dtype", "bfloat16"))
    return Bench(request["shape"], DEVICE, dtype, REPEATS, request.get("ignored", 0.0))


def builder(name: str, settings: dict[str, Any]) -> Callable[..., Any]:
    """The loss of this name; of this package, with settings."""
    if name in PEERS:
        return PEERS[name]
    mode, path = re.fullmatch(r"megamix (A|B) \((\w+)\)", name).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return lambda device: megamix(device, implementation=path, promised=mode == "A", **settings)


def loss(request: dict[str, Any]) -> Rows:
    bench, settings = bench_of(request), request.get("settings", {})
    # The check knows the plain loss only.
    with mock.patch.object(bench, "_check") if settings else contextlib.nullcontext():
        result = bench.measure(request["name"], builder(request["name"], settings))
    if result.note or result.total_ms is None or result.forward_ms is None:
        return [{"metric": "failed", "note": result.note}]
    rows = [
        figure("forward + backward", result.total_ms, "ms") | {"low": result.low_ms, "high": result.high_ms},
        figure("forward", result.forward_ms, "ms"),
    ]
    if result.percent_of_copy is not None:
        rows.append(figure("bandwidth of one reading and one writing", result.percent_of_copy, "% of a copy"))
    return rows + ([figure("peak memory", result.peak_bytes, "bytes a logit")] if result.peak_bytes else [])


def reading(request: dict[str, Any]) -> Rows:
    """The part of a second reading that is paid: mode A less a copy, over a reading alone."""
    bench = bench_of(request)
    at_once, later = (builder(f"megamix {mode} (triton)", {})(DEVICE) for mode in "AB")
    mode_a = bench.spans(lambda: bench.step(at_once))[-1]
    forward = bench.spans(lambda: bench.step(later))[0]
    paid = [(total - bench.copy_ms) / statistics.median(forward) for total in mode_a]
    return [
        figure("mode A", mode_a, "ms"),
        figure("one reading", forward, "ms"),
        figure("a copy", bench.copy_ms, "ms"),
        figure("second reading paid", paid, "readings", "0: from the cache; 1: from memory; the arithmetic included"),
    ]


def ahead(request: dict[str, Any]) -> Rows:
    """The next tile of a row loaded before the one before it is worked on, and not: in mode A, and where a kernel only
    reads, which has registers for two rows a multiprocessor."""
    from megamix_kernels import triton_loss

    bench, found = bench_of(request), []
    for mode, part, mark in (("A", "mode A", -1), ("B", "mode B, forward", 0)):
        made = builder(f"megamix {mode} (triton)", {})(DEVICE)
        spans = []
        for is_on in (True, False):
            with mock.patch.object(triton_loss.Launch, "ahead", is_on):
                spans.append(bench.spans(lambda made=made: bench.step(made))[mark])
        on, off = spans
        ratio = statistics.median(on) / statistics.median(off)
        found += [figure(f"{part}: on", on, "ms"), figure(f"{part}: off", off, "ms")]
        found.append(figure(f"{part}: on / off", ratio, ""))
    return found


def statistics_cost(request: dict[str, Any]) -> Rows:
    """Mode A or B with the sums, without them, and with kernels that do not load a token's domain either."""
    from megamix_kernels.inputs import VocabularyShard

    bench = bench_of(request)
    made = megamix(DEVICE, implementation="triton", promised=request["mode"] == "A", num_domains=request["domains"])
    on = bench.spans(lambda: bench.step(made))[-1]
    with mock.patch.object(VocabularyShard, "holds_sums", False):
        off = bench.spans(lambda: bench.step(made))[-1]
        with _without_domains():
            plain = bench.spans(lambda: bench.step(made))[-1]
    ratios = (statistics.median(on) / statistics.median(other) for other in (off, plain))
    return [
        *(figure(name, times, "ms") for name, times in (("on", on), ("off", off), ("domains not loaded", plain))),
        *(figure(name, ratio, "") for name, ratio in zip(("on / off", "on / domains not loaded"), ratios, strict=True)),
    ]


@contextlib.contextmanager
def _without_domains() -> Iterator[None]:
    from megamix_kernels import triton_loss

    tokens = triton_loss._tokens

    def without(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        labels_N, _, *others = tokens(*arguments, **options)
        return labels_N, None, *others

    with mock.patch.object(triton_loss, "_tokens", without):
        yield


def counters_of(request: dict[str, Any]) -> Rows:
    """Bytes that ncu counts; see counters.py."""
    import counters  # pyright: ignore[reportMissingImports]

    return counters.measure(request, figure)


def step(request: dict[str, Any]) -> Rows:
    """One step of a mode, for ncu to look at."""
    bench = bench_of(request)
    bench.step(builder(f"megamix {request['mode']} (triton)", {})(DEVICE))
    _wait()
    return []


def linear(request: dict[str, Any]) -> Rows:
    num_rows, hidden, vocabulary = (int(part) for part in request["shape"].split("x"))
    generator = torch.Generator(DEVICE).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": DEVICE, "dtype": torch.bfloat16}
    hidden_NH = torch.randn(num_rows, hidden, **options).requires_grad_()
    weight_VH = (torch.randn(vocabulary, hidden, **options) / hidden**0.5).requires_grad_()
    labels_N = torch.randint(0, vocabulary, (num_rows,), generator=generator, device=DEVICE)
    try:
        made = LINEAR[request["name"]](DEVICE)
    except ImportError as error:
        return [{"metric": "failed", "note": f"not installed ({error})"}]

    with torch.no_grad():
        want = float(torch.nn.functional.cross_entropy((hidden_NH @ weight_VH.T).float(), labels_N))
    got = float(made(hidden_NH, weight_VH, labels_N).detach())
    if abs(got - want) > 0.02 * want:
        raise ValueError(f"the loss is {got}, not {want}")

    def step() -> float:
        hidden_NH.grad = weight_VH.grad = None
        _wait()
        started = time.perf_counter()
        (made(hidden_NH, weight_VH, labels_N) * INCOMING).backward()
        _wait()
        return (time.perf_counter() - started) * 1e3

    step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    rows = [figure("forward + backward", [step() for _ in range(max(REPEATS // 3, 2))], "ms", "host included")]
    if ON_GPU:
        rows.append(figure("peak memory", (torch.cuda.max_memory_allocated() - before) / 2**20, "MiB"))
    return rows


def host(request: dict[str, Any]) -> Rows:
    """Time in which the host enqueues a call, on logits so small that the device is always ahead, and the same of an
    autograd function that does nothing. On a CPU without the launches and what only a CPU checks."""
    made = builder(request["name"], {})(DEVICE)
    source_NV = torch.randn(2, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    labels_N = torch.arange(2, device=DEVICE)
    found = []
    with contextlib.nullcontext() if ON_GPU else _without_launches():
        for name, loss in (("", made), (" of an empty function", lambda logits_NV, _: _Empty.apply(logits_NV))):
            forward, backward = [], []
            for _ in range(400):
                logits_NV = source_NV * 1
                _wait()
                marks = [time.perf_counter()]
                value = loss(logits_NV, labels_N)
                marks.append(time.perf_counter())
                (value * INCOMING).backward()
                marks.append(time.perf_counter())
                forward.append((marks[1] - marks[0]) * 1e6)
                backward.append((marks[2] - marks[1]) * 1e6)
            found += [figure(f"forward{name}", forward[200:], "us"), figure(f"backward{name}", backward[200:], "us")]
    ratios = [found[index]["value"] / found[index + 2]["value"] for index in (0, 1)]
    return [
        *found,
        *(figure(f"{name} / empty", ratio, "") for name, ratio in zip(("forward", "backward"), ratios, strict=True)),
    ]


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor) -> torch.Tensor:
        ctx.logits_NV = logits_NV.detach()
        return logits_NV.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.logits_NV


@contextlib.contextmanager
def _without_launches() -> Iterator[None]:
    from megamix_kernels import checks, inputs, loss, triton_loss

    # Mocks would take several microseconds a call.
    def nothing(*_arguments: Any, **_options: Any) -> None: ...

    launcher = type("Launcher", (), {"__getitem__": lambda _, grid: nothing})()
    with contextlib.ExitStack() as stack:
        for name in ("loss_rows", "gradient_rows"):
            stack.enter_context(mock.patch.object(triton_loss.kernels, name, launcher))
        for module, name in ((checks, "check_values"), (inputs, "counted_rows"), (loss, "check_promise")):
            stack.enter_context(mock.patch.object(module, name, nothing))
        yield


def numerics(request: dict[str, Any]) -> Rows:
    folder = ROOT / "tests" / "kernels" / "on_device"
    chosen = [str(path) for path in sorted(folder.glob("*.py"))]
    if not ON_GPU:
        chosen = [f"{folder / 'autograd.py'}::test_the_promise_reaches_hidden_states_and_weight"]
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0" if ON_GPU else "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *chosen]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    if not found:
        return [{"metric": "failed", "note": (done.stdout + done.stderr).strip()[-160:]}]
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    return [figure(f"tests {word}", float(number), "", "; ".join(failed)[:300]) for word, number in found.items()]


def model(request: dict[str, Any]) -> Rows:
    """A model's step with mixing on against off, from tests/benchmarks/bench_step.py."""
    import model_step  # pyright: ignore[reportMissingImports]

    return model_step.measure(request, figure)


def trace(request: dict[str, Any]) -> Rows:
    import model_step  # pyright: ignore[reportMissingImports]

    return model_step.trace(request, figure)


def parallel(request: dict[str, Any]) -> Rows:
    """One rank's part of 131072 columns, each rank on a GPU of its own."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ON_GPU:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    rows, columns = (8192, 131072 // ranks) if ON_GPU else (4, 128 // ranks)
    device = torch.device("cuda", rank) if ON_GPU else DEVICE
    bench = Bench(f"{rows}x{columns}", device, torch.bfloat16, REPEATS)
    dist.broadcast(bench.labels_N, 0)
    bench.source_NV += rank  # each rank has columns of its own
    found = [
        figure("largest error", _error_over_ranks(bench, rank, ranks), "", "loss and gradients of 4 rows, float64")
    ]
    for mode, num_domains in itertools.product("AB", (22, 1)):
        settings = {"promised": mode == "A", "process_group": dist.group.WORLD, "num_domains": num_domains}
        made = megamix(device, implementation="triton", **settings)
        spans = bench.spans(lambda made=made: bench.step(made))[-1]
        found.append(figure(f"mode {mode}, K = {num_domains}", spans, "ms"))
    dist.barrier()
    dist.destroy_process_group()
    return found if rank == 0 else []


def _error_over_ranks(bench: Bench, rank: int, ranks: int) -> float:
    """The largest relative error of some rows' loss and of this rank's gradients, in both modes, over all ranks.

    Raises:
        ValueError: it is more than rounding.
    """
    logits_NV = bench.source_NV[:4].float()
    parts = [torch.empty_like(logits_NV) for _ in range(ranks)]
    dist.all_gather(parts, logits_NV)
    columns, width = slice(rank * logits_NV.shape[1], (rank + 1) * logits_NV.shape[1]), ranks * logits_NV.shape[1]
    labels_N = torch.arange(4, device=logits_NV.device) * (width // 4) + 1  # on all ranks
    whole_NW = torch.cat(parts, dim=1).double().requires_grad_()
    want = torch.nn.functional.cross_entropy(whole_NW, labels_N)
    (want * INCOMING).backward()
    want_NV = whole_NW.grad[:, columns]  # pyright: ignore[reportOptionalSubscript]
    errors = []
    for mode in "AB":
        settings = {"promised": mode == "A", "process_group": dist.group.WORLD}
        leaf_NV = logits_NV.clone().requires_grad_()
        loss = megamix(leaf_NV.device, implementation="triton", **settings)(leaf_NV, labels_N)
        (loss * INCOMING).backward()
        errors.append(abs(loss.detach() - want.detach()) / want.detach())
        assert leaf_NV.grad is not None
        errors.append((leaf_NV.grad - want_NV).abs().max() / want_NV.abs().max())
    largest = torch.stack([error.double() for error in errors]).max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if not largest < 1e-5:
        raise ValueError(f"loss or gradients over {ranks} ranks are off by {largest.item():.2g} of their size")
    return largest.item()


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


KINDS = {
    "loss": loss, "ahead": ahead, "reading": reading, "bytes": counters_of, "step": step,
    "statistics": statistics_cost, "linear": linear, "host": host, "numerics": numerics, "model": model, "trace": trace, "parallel": parallel,
}  # fmt: skip

if __name__ == "__main__":
    running.end_with_owner()
    if not ON_GPU:
        torch.set_num_threads(1)
    rows = KINDS[REQUEST["kind"]](REQUEST)
    if rows:
        Path(REQUEST["file"]).write_text(json.dumps(rows), encoding="utf-8")
