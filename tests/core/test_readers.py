"""Files of plain data that cannot be used: one error that names the place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megamix.core.errors import InputError
from megamix.core.files import parse_json, read_csv, read_json, read_json_lines
from megamix.core.yaml_text import parse_yaml

DEEP = "[" * 100_000


def test_json_nested_deeper_than_python_can_follow(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text(DEEP + "]" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json is not valid JSON: it is nested too deep\. Mend it\."):
        read_json(path, damaged="Mend it.")
    path.write_text('{"a": 1}\n' + DEEP + "\n")
    with pytest.raises(InputError, match=r"deep\.json, line 2 is damaged: its lists or objects are nested too deep\."):
        read_json_lines(path)
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(DEEP)


def test_yaml_nested_deeper_than_python_can_follow() -> None:
    with pytest.raises(InputError, match=r"^the config cannot be read: its lists or mappings are nested too deep\."):
        parse_yaml("[" * (sys.getrecursionlimit() * 2), "the config")


@pytest.mark.parametrize("line", ["[]", "3", '"x"', "null"])
def test_a_line_of_a_record_that_is_no_object(tmp_path: Path, line: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"record\.jsonl, line 2 is damaged: it is .*, expected an object\."):
        read_json_lines(path)


def test_rows_of_a_csv_file_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfrun,value\n\n0,1.5\n" + b'1,"two\nlines"\n')
    assert read_csv(path) == [(1, ["run", "value"]), (3, ["0", "1.5"]), (5, ["1", "two\nlines"])]


def test_a_field_of_a_csv_file_that_is_longer_than_128_kib(tmp_path: Path) -> None:
    """A field of just that length is read."""
    path = tmp_path / "table.csv"
    path.write_text(f"run\n{'x' * 131072}\n")
    assert len(read_csv(path)[1][1][0]) == 131072
    path.write_text(f"run\n{'x' * 131073}\n")
    with pytest.raises(InputError, match=r"table\.csv, line 2 is no CSV: field larger than field limit"):
        read_csv(path)
    path.write_text(json.dumps("x" * 200_000)[:-1])
    with pytest.raises(InputError, match="a quote that is not closed"):
        read_csv(path)
