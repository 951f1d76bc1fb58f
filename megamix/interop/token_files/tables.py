"""Token columns of parquet and arrow files: tokenised Hugging Face datasets, saved or exported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.packages import need
from megamix.interop.token_files.mds import COLUMNS

ENDINGS = (".parquet", ".arrow")
_ROWS = 1024


@dataclass(frozen=True)
class TokenTable:
    """A table with a column of token ids, a list in each row."""

    path: Path

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens of some rows, and how many each of them has, int64 [rows].

        Raises:
            InputError: the file is damaged, or has no column of lists of integers.
        """
        pyarrow = need("pyarrow", f"reading {self.path}")
        try:
            for rows in self._batches():
                tokens = rows.flatten()
                if tokens.null_count:
                    raise InputError(f"{self.path} holds a token id that is null. Remove its row.")
                lengths = rows.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
                yield tokens.to_numpy(zero_copy_only=False), lengths.astype(np.int64)
        except (pyarrow.ArrowException, OSError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"{self.path} is damaged ({reason}). Copy it again.") from error

    def _batches(self) -> Iterator[Any]:
        if self.path.suffix.lower() == ".parquet":
            with need("pyarrow.parquet", f"reading {self.path}").ParquetFile(self.path, pre_buffer=False) as file:
                column = self._column(file.schema_arrow)
                for batch in file.iter_batches(_ROWS, columns=[column]):
                    yield batch.column(0)
            return
        ipc = need("pyarrow.ipc", f"reading {self.path}")
        with need("pyarrow", "").memory_map(str(self.path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
            column = self._column(reader.schema)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                yield batch.column(column)

    def _column(self, schema: Any) -> str:
        types = need("pyarrow", "").types
        found = [name for name in COLUMNS if name in schema.names]
        if len(found) != 1:
            raise InputError(
                f"{self.path} has the columns {', '.join(schema.names[:8])}, expected one of token ids: {' or '.join(COLUMNS)}."
                " Text is for `megamix prepare`."
            )
        kind = schema.field(found[0]).type
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        if not any(check(kind) for check in lists) or not types.is_integer(kind.value_type):
            raise InputError(f"{self.path}: the column '{found[0]}' holds {kind}, expected lists of integers.")
        return found[0]
