"""The CSS classes of runs and domains, and the colours and dashes behind them."""

from __future__ import annotations

from megamix.analysis.palette import domain_look, run_look


def domain_class(index: int) -> str:
    return f"d{index}"


def run_class(index: int) -> str:
    return f"r{index}"


def swatch(look: str) -> str:
    """A square of a class's colour; nothing without a class."""
    return f'<i class="swatch {look}"></i>' if look else ""


def rules(num_domains: int, num_runs: int) -> str:
    """CSS that gives every class its colour ``--c`` and the dashes of its lines."""
    looks = [(domain_class(index), *domain_look(index)) for index in range(num_domains)]
    looks += [(run_class(index), *run_look(index)) for index in range(num_runs)]
    light = "".join(
        f".{name}{{--c:{colours[0]};--dash:{' '.join(map(str, dashes)) or 'none'}}}" for name, colours, dashes in looks
    )
    dark = "".join(f".{name}{{--c:{colours[1]}}}" for name, colours, _ in looks)
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"
