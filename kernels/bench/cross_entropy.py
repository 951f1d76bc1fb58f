"""Benchmark of the domain loss and the other installed cross-entropies, forward and backward.

    python kernels/bench/cross_entropy.py                      # all shapes, all that is installed; minutes on a GPU
    python kernels/bench/cross_entropy.py --shapes 8192x50304 --only "megamix A,megamix B,liger-kernel"
    python kernels/bench/cross_entropy.py --sweep              # other launches of our kernels

Prints tables and writes OUT/cross_entropy.csv, domains.csv and cross_entropy.png. Each figure is the median of several
runs on fresh logits, "low" and "high" are quartiles. Device events time them, after a write that empties the cache and
a pause in which the host enqueues the whole step: the host's time is no part of it. The incoming gradient is 1/8, not
1. GB/s divides the bytes of one reading and one writing of the logits by the time: the same bytes for all, so ratios of
GB/s are ratios of time. "% copy" compares the rate with a copy of the same bytes, timed here. Peak is the largest
memory use in bytes per logit, the logits included.

On a CPU the shapes are small and the times mean nothing; the run only checks the benchmark.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peers import INCOMING, PEERS, Loss, megamix, ours  # pyright: ignore[reportMissingImports]
from torch import Tensor

from megamix_kernels.inputs import VocabularyShard

# The last is one rank's part of a vocabulary over 8 ranks.
SHAPES = ["8192x50304", "16384x128256", "8192x131072", "4096x151936", "8192x32000", "16384x16032"]
CPU_SHAPES = ["64x512", "32x2048"]
FLUSH_BYTES = 2**28
PAUSE_CYCLES = 4_000_000  # 2 ms: longer than the host takes for a step


@dataclass(frozen=True)
class Result:
    """Result of one implementation at one shape; times in ms, peak in bytes per logit, or the reason for none."""

    shape: str
    name: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    total_ms: float | None = None
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    peak_bytes: float | None = None
    note: str = ""


class _Logits(torch.autograd.Function):
    """Makes a buffer an inner tensor of a graph, like a model's logits, and drops its gradient, at no cost."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer_NV: Tensor) -> Tensor:
        ctx.anchor = anchor
        return buffer_NV.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return ctx.anchor.detach(), None


class Bench:
    """Logits of one shape, a share of their rows ``ignored``, and the timing of calls on them."""

    def __init__(
        self, shape: str, device: torch.device, dtype: torch.dtype, repeats: int, ignored: float = 0.0
    ) -> None:
        self.shape, self.device, self.repeats = shape, device, repeats
        num_rows, width = (int(part) for part in shape.split("x"))
        generator = torch.Generator(device).manual_seed(0)
        self.source_NV = torch.randn(num_rows, width, generator=generator, device=device, dtype=dtype) * 3
        self.labels_N = torch.randint(0, width, (num_rows,), generator=generator, device=device)
        if ignored:
            self.labels_N[:: round(1 / ignored)] = -100
        self.buffer_NV = torch.empty_like(self.source_NV)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        flush = FLUSH_BYTES if device.type == "cuda" else 1
        self.flush = torch.empty(flush, dtype=torch.uint8, device=device)
        want = torch.nn.functional.cross_entropy(self.source_NV[:64].float(), self.labels_N[:64])
        self.want_loss = float(want)
        self.copy_ms = self.median(self._copy)[-1]

    @property
    def floor_bytes(self) -> int:
        return 2 * self.source_NV.numel() * self.source_NV.element_size()

    def measure(self, name: str, make: Callable[..., Loss]) -> Result:
        """Returns an implementation's result; a missing or failing one becomes a note."""
        try:
            loss = make(self.device)
        except ImportError as error:
            return Result(self.shape, name, note=f"not installed ({error})")
        try:
            self._check(loss)
            spans = self.spans(lambda: self.step(loss))
            peak = self._peak(loss)
        except Exception as error:  # a peer's own failure is a finding, not the end of the benchmark
            return Result(self.shape, name, note=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
        forward, total = (statistics.median(span) for span in spans)
        low, _, high = statistics.quantiles(spans[-1], n=4, method="inclusive") if self.repeats > 1 else spans[-1] * 3
        rate = self.floor_bytes / total / 1e6
        return Result(
            *(self.shape, name, forward, total - forward, total, rate, 100 * self.copy_ms / total),
            *(low, high, peak),
        )

    def _check(self, loss: Loss) -> None:
        """Raises unless the loss of some rows is right."""
        rows = slice(0, 64)
        logits_NV = self.source_NV[rows].clone().requires_grad_()
        got = float(loss(logits_NV, self.labels_N[rows]).detach())
        if abs(got - self.want_loss) > 0.02 * self.want_loss:
            raise ValueError(f"the loss of the first rows is {got}, not {self.want_loss}")

    def _copy(self) -> list[Any]:
        self._pause()
        marks = [self._mark()]
        self.buffer_NV.copy_(self.source_NV)
        return [*marks, self._mark()]

    def step(self, loss: Loss) -> list[Any]:
        """Marks before, between and after forward and backward."""
        self.buffer_NV.copy_(self.source_NV)
        logits_NV = _Logits.apply(self.anchor, self.buffer_NV)
        self.flush.zero_()
        self._pause()
        marks = [self._mark()]
        value = loss(logits_NV, self.labels_N)
        marks.append(self._mark())
        (value * INCOMING).backward()
        return [*marks, self._mark()]

    def _peak(self, loss: Loss) -> float | None:
        """Bytes per logit, the logits included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self.step(loss)
        torch.cuda.synchronize()
        beside = torch.cuda.memory_allocated() - self.buffer_NV.nbytes
        torch.cuda.reset_peak_memory_stats()
        self.step(loss)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - beside) / self.buffer_NV.numel()

    def median(self, run: Callable[[], list[Any]]) -> list[float]:
        """Returns median ms from the first mark to each later one."""
        return [statistics.median(span) for span in self.spans(run)]

    def spans(self, run: Callable[[], list[Any]]) -> list[list[float]]:
        """Returns the ms of every run from the first mark to each later one."""
        for _ in range(3 if self.device.type == "cuda" else 1):
            run()
        marks = [run() for _ in range(self.repeats)]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        spans = [[self._between(first, mark) for mark in others] for first, *others in marks]
        return [list(span) for span in zip(*spans, strict=True)]

    def _pause(self) -> None:
        if self.device.type == "cuda":
            torch.cuda._sleep(PAUSE_CYCLES)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) if self.device.type == "cuda" else (last - first) * 1e3


def statistics_cost(bench: Bench, mode: str, path: str) -> list[dict[str, Any]]:
    """Returns the time with and without domain statistics, for few and many domains."""
    rows = []
    for num_domains in (1, 22, 1024):
        loss = megamix(bench.device, implementation=path, promised=mode == "A", num_domains=num_domains)
        on = bench.median(lambda loss=loss: bench.step(loss))[-1]
        with mock.patch.object(VocabularyShard, "holds_sums", False):
            off = bench.median(lambda loss=loss: bench.step(loss))[-1]
        names = ("shape", "mode", "domains", "on_ms", "off_ms", "ratio")
        rows.append(dict(zip(names, (bench.shape, mode, num_domains, on, off, on / off), strict=True)))
        print(f"{bench.shape:>13}  mode {mode}, K = {num_domains:<5} {on:9.3f} ms on {off:9.3f} ms off  {on / off:.3f}")
    return rows


def sweep(bench: Bench) -> None:
    """Times both modes with other launch configurations, the current one first."""
    from megamix_kernels import triton_loss

    element_size = bench.source_NV.element_size()
    chosen = triton_loss.launch_for(bench.source_NV.shape[1], element_size)
    launches = [chosen]
    for num_warps in (4, 8, 16, 32):
        for share in (32, 64, 128):
            launches.append(triton_loss.Launch(share * num_warps, 16 // element_size, num_warps))
    for launch in launches:
        with mock.patch.object(triton_loss, "launch_for", lambda *args, launch=launch, **kwargs: launch):
            times = []
            for mode in "AB":
                loss = megamix(bench.device, implementation="triton", promised=mode == "A")
                times.append(bench.median(lambda loss=loss: bench.step(loss))[-1])
        print(f"{bench.shape:>13}  {launch!s:<30} A {times[0]:8.3f} ms  B {times[1]:8.3f} ms")


def show(result: Result) -> None:
    """Prints one line of the table."""
    if result.note:
        print(f"{result.shape:>13}  {result.name:<20} {result.note}")
        return
    numbers = (result.forward_ms, result.backward_ms, result.total_ms, result.gb_per_s, result.percent_of_copy)
    cells = " ".join(f"{number:10.3f}" for number in numbers)
    peak = "        -" if result.peak_bytes is None else f"{result.peak_bytes:9.2f}"
    print(f"{result.shape:>13}  {result.name:<20} {cells} {peak}")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, results: list[Result], title: str) -> None:
    """Plots bars of the percentage of the copy's bandwidth, one group per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [result for result in results if result.percent_of_copy is not None]
    shapes, names = (list(dict.fromkeys(getattr(r, key) for r in timed)) for key in ("shape", "name"))
    figure, axes = plt.subplots(figsize=(2 + 2 * len(shapes), 5), layout="constrained")
    for index, name in enumerate(names):
        own = {result.shape: result.percent_of_copy for result in timed if result.name == name}
        at = [place + (index - len(names) / 2) * 0.8 / len(names) for place in range(len(shapes))]
        axes.bar(at, [own.get(shape) or 0 for shape in shapes], width=0.8 / len(names), label=name, align="edge")
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("% of the copy's bandwidth (forward + backward)")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="comma-separated NxV")
    parser.add_argument("--only", help="comma-separated beginnings of names")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=None, help="timed runs of each (GPU: 30, CPU: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_cross_entropy"))
    parser.add_argument("--sweep", action="store_true", help="time other launches of our kernels instead")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if on_gpu else "CPU: these times mean nothing"
    title = f"{machine}, {arguments.dtype}, torch {torch.__version__}"
    print(title)
    if arguments.sweep and not on_gpu:
        raise SystemExit("--sweep times Triton kernels and needs a GPU")
    shapes = arguments.shapes.split(",") if arguments.shapes else (SHAPES if on_gpu else CPU_SHAPES)
    repeats = arguments.repeats or (30 if on_gpu else 3)
    wanted = tuple(arguments.only.split(",")) if arguments.only else ("",)
    chosen = {name: make for name, make in (ours(device) | PEERS).items() if name.startswith(wanted)}
    results: list[Result] = []
    domains: list[dict[str, Any]] = []
    heads = ("forward ms", "backward", "total ms", "GB/s", "% copy")
    print(f"{'shape':>13}  {'':<20} {' '.join(f'{head:>10}' for head in heads)} {'peak B':>9}")
    for shape in shapes:
        bench = Bench(shape, device, getattr(torch, arguments.dtype), repeats)
        if arguments.sweep:
            sweep(bench)
            continue
        print(f"{shape:>13}  {'copy':<20} {bench.copy_ms:32.3f} {bench.floor_bytes / bench.copy_ms / 1e6:10.3f}")
        for name, make in chosen.items():
            results.append(bench.measure(name, make))
            show(results[-1])
        for mode in "AB":
            domains += statistics_cost(bench, mode, "triton" if on_gpu else "torch")
    if results:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out / "cross_entropy.csv", [asdict(result) for result in results])
        write_csv(arguments.out / "domains.csv", domains)
        plot(arguments.out / "cross_entropy.png", results, title)
        print(f"written to {arguments.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
