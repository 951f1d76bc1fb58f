"""The measurements of the acceptance, the most wanted first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cross_entropy import SHAPES  # pyright: ignore[reportMissingImports]
from peers import LINEAR, PEERS  # pyright: ignore[reportMissingImports]

TWO_MAIN = ["8192x50304", "16384x128256"]
MORE_SHAPES = ["8192x50257", "8192x262144"]
LINEAR_SHAPES = ["8192x2048x50304", "4096x4096x128256"]
OURS = [f"megamix {mode} (triton)" for mode in "AB"]
OPTIONS = {
    "half ignored": {"ignored": 0.5},
    "softcap": {"settings": {"softcap": 30.0}},
    "z-loss": {"settings": {"z_loss": 1e-4}},
    "smoothing": {"settings": {"label_smoothing": 0.1}},
    "fp32": {"dtype": "float32"},
}


@dataclass(frozen=True)
class Task:
    """One measurement: ``arguments`` are for measure.py, ``labels`` for the tables; ``ranks`` above 0 are launched."""

    key: str
    kind: str
    labels: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 120
    ranks: int = 0


def all_tasks(device: str, num_gpus: int) -> list[Task]:
    """Tasks for a machine; on a CPU one or two of each kind, tiny."""
    return _gpu_tasks(num_gpus) if device == "cuda" else _cpu_tasks()


def _gpu_tasks(num_gpus: int) -> list[Task]:
    names = [*OURS, *(f"megamix {mode} (torch)" for mode in "AB"), *PEERS]
    tasks = [_numerics()]
    tasks += [_loss(shape, name) for shape in TWO_MAIN for name in names]
    # What the machine code cannot say of the cliffs: rows off 16 bytes, softcap, the widest row.
    tasks += [_loss(MORE_SHAPES[0], name) for name in OURS]
    tasks += [_loss(TWO_MAIN[0], name, "softcap") for name in OURS]
    tasks += [_ahead(TWO_MAIN[1])]
    tasks += [_reading(shape) for shape in TWO_MAIN]
    tasks += [_bytes(shape) for shape in TWO_MAIN]
    tasks += [_statistics(TWO_MAIN[0], mode, num_domains) for mode in "AB" for num_domains in (1, 22, 1024)]
    tasks += [_linear(shape, name) for shape in LINEAR_SHAPES for name in LINEAR]
    tasks += [_host(name) for name in OURS]
    tasks += [_model(name) for name in ("torch", "triton", "linear")]
    tasks += [_trace()]
    tasks += [_loss(TWO_MAIN[0], name, option) for option in OPTIONS for name in OURS]
    tasks += [_parallel(ranks) for ranks in (1, 2, 4, 8) if ranks <= num_gpus]
    tasks += [_model("triton", ranks=2)] if num_gpus >= 2 else []
    tasks += [_loss(shape, name) for shape in [*SHAPES, *MORE_SHAPES] if shape not in TWO_MAIN for name in names]
    return list({task.key: task for task in tasks}.values())


def _cpu_tasks() -> list[Task]:
    shape = "2x320"
    return [
        _numerics(),
        *(_loss(shape, name) for name in (OURS[0], *PEERS) if name not in ("torch.compile", "megatron fused")),
        _ahead(shape),
        _reading(shape),
        _bytes(shape),
        _statistics(shape, "A", 22),
        *(_linear("8x16x320", name) for name in LINEAR),
        _host(OURS[0]),
        _model("torch"),
        _model("linear", ranks=2),
        _trace(),
        *(_loss(shape, OURS[1], option) for option in ("half ignored", "softcap")),
        _parallel(2),
    ]


def _numerics() -> Task:
    return Task("numerics", "numerics", {"name": "tests of the Triton path"}, limit_s=420)


def _host(name: str) -> Task:
    return Task(f"host/{name}", "host", {"name": name}, {"name": name})


def _loss(shape: str, name: str, option: str = "") -> Task:
    arguments = {"shape": shape, "name": name, **OPTIONS.get(option, {})}
    key = "/".join(part for part in ("loss", shape, name, option) if part)
    return Task(key, "loss", {"shape": shape, "name": name, "option": option or "none"}, arguments)


def _statistics(shape: str, mode: str, num_domains: int) -> Task:
    labels = {"shape": shape, "name": f"mode {mode}, K = {num_domains}"}
    return Task(
        f"statistics/{shape}/{mode}/{num_domains}",
        "statistics",
        labels,
        {"shape": shape, "mode": mode, "domains": num_domains},
    )


def _reading(shape: str) -> Task:
    return Task(f"reading/{shape}", "reading", {"shape": shape, "name": "second reading"}, {"shape": shape})


def _bytes(shape: str) -> Task:
    return Task(f"bytes/{shape}", "bytes", {"shape": shape, "name": "megamix (triton)"}, {"shape": shape})


def _ahead(shape: str) -> Task:
    return Task(f"ahead/{shape}", "ahead", {"shape": shape, "name": "megamix (triton)"}, {"shape": shape})


def _linear(shape: str, name: str) -> Task:
    return Task(f"linear/{shape}/{name}", "linear", {"shape": shape, "name": name}, {"shape": shape, "name": name})


def _model(implementation: str, ranks: int = 1) -> Task:
    """A model's step; over ``ranks`` the batch is divided. bench_step.py starts the ranks itself."""
    key, name = f"model/{implementation}", f"loss.implementation: {implementation}"
    if ranks > 1:
        key, name = f"{key}/{ranks}", f"{name}, {ranks} ranks"
    return Task(key, "model", {"name": name}, {"implementation": implementation, "data": ranks}, limit_s=400)


def _trace() -> Task:
    arguments = {"implementation": "auto", "data": 1}
    return Task("trace", "trace", {"name": "mixing"}, arguments, limit_s=300)


def _parallel(ranks: int) -> Task:
    return Task(
        f"parallel/{ranks}",
        "parallel",
        {"name": f"vocabulary over {ranks} rank{'s' if ranks > 1 else ''}"},
        ranks=ranks,
    )
