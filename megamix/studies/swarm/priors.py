"""Token counts and shares of a data set: the centre of a swarm, and the bounds of repetition.

{"token_counts": {"web": 70, "code": 30}, "relative_sizes": {"web": 0.7, "code": 0.3}}     Olmix's keys
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamix.core.files import replace_json, writing
from megamix.core.text import Table, plural
from megamix.data.tokens.manifest import Manifest

FILE = "priors.json"


@dataclass(frozen=True)
class Priors:
    """Token counts and shares of the domains.

    Attributes:
        token_counts: {domain: training tokens}.
        relative_sizes: {domain: share}, which sum to 1.
    """

    token_counts: dict[str, int]
    relative_sizes: dict[str, float]

    @classmethod
    def natural(cls, token_counts: Mapping[str, int]) -> Priors:
        """Shares in proportion to the tokens."""
        total = sum(token_counts.values())
        return cls(dict(token_counts), {name: count / total for name, count in token_counts.items()})

    def write(self, path: Path) -> None:
        """Writes them as JSON.

        Raises:
            InputError: it cannot be written.
        """
        content = {"token_counts": self.token_counts, "relative_sizes": self.relative_sizes}
        with writing(path, "Choose another place."):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(path, content)

    def table(self) -> Table:
        """A row for each domain, and the sums."""
        rows = [(name, f"{count:,}", f"{self.relative_sizes[name]:.4f}") for name, count in self.token_counts.items()]
        total = sum(self.token_counts.values())
        return Table(
            ("domain", "training tokens", "share"), [*rows, (plural(len(rows), "domain"), f"{total:,}", "1.0000")], 1
        )


def priors_of(data: Path, domains: Sequence[str] | None = None) -> Priors:
    """Priors of a prepared data set.

    Args:
        data: its manifest, or its folder.
        domains: some of its domains, in this order; None: all.

    Raises:
        InputError: no data set, or a domain that it does not have.
    """
    manifest = Manifest.load(data)
    names = domains or manifest.domain_names
    return Priors.natural({name: manifest.domain(name).train.tokens for name in names})
