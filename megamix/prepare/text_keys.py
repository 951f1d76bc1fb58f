"""Keys of the text, by domain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megamix.core.errors import InputError, check_known
from megamix.prepare.blocks import TEXT_KEY


@dataclass(frozen=True)
class TextKeys:
    """The key of the text in each domain: of a JSON line, or the column of a table.

    Attributes:
        default: of all domains that are not in ``by_domain``.
    """

    default: str = TEXT_KEY
    by_domain: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: str | Sequence[str], domains: Iterable[str]) -> TextKeys:
        """Reads ``KEY`` for all domains and ``DOMAIN=KEY`` for one.

        Raises:
            InputError: No key, two keys for the same domain or for all, or a domain that is not there.
        """
        keys: dict[str, str] = {}
        for text in [given] if isinstance(given, str) else given:
            name, equals, key = text.rpartition("=")
            if not key or (equals and not name) or name in keys:
                raise InputError(f"--text-key '{text}': expected one KEY for all domains, and DOMAIN=KEY for some.")
            keys[name] = key
        default = keys.pop("", TEXT_KEY)
        check_known(keys, domains, "--text-key: no domain")
        return cls(default, keys)

    def of(self, domain: str) -> str:
        """The key of a domain."""
        return self.by_domain.get(domain, self.default)

    def __str__(self) -> str:
        return ", ".join([self.default, *(f"{name}={key}" for name, key in sorted(self.by_domain.items()))])
