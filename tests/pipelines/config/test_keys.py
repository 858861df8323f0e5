"""A list of keys: CSV or Parquet, with a header or bare, keys always as text."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config.keys import read_keys
from storage.errors import ConfigError, ObjectNotFound
from storage.objects.protocols import StorageOptions


def keys(folder: Path, text: str | bytes, name: str = "keys.csv") -> frozenset[str]:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_keys(str(path), StorageOptions())


@pytest.mark.parametrize(
    "text",
    [
        "key\n000123.jpg\na/b.jpg\n",
        "key,size\n000123.jpg,5\na/b.jpg,6\n",
        "size,key\n5,000123.jpg\n6,a/b.jpg\n",
        '"size","key"\n5,"000123.jpg"\n6,"a/b.jpg"\n',
        "000123.jpg\na/b.jpg\n",
        "000123.jpg\na/b.jpg",
        "key\r\n000123.jpg\r\na/b.jpg\r\n",
        "\ufeffkey\n000123.jpg\na/b.jpg\n",  # as spreadsheets save it
        "000123.jpg\n\na/b.jpg\n\n",
    ],
)
def test_every_form_of_csv_gives_the_same_keys(tmp_path: Path, text: str) -> None:
    assert keys(tmp_path, text) == {"000123.jpg", "a/b.jpg"}


def test_a_key_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    assert keys(tmp_path, "key,n\n000123,1\n1e5,2\n") == {"000123", "1e5"}
    assert keys(tmp_path, "000123\n1e5\n") == {"000123", "1e5"}


def test_keys_with_commas_and_quotes(tmp_path: Path) -> None:
    assert keys(tmp_path, 'key,n\n"a,b.jpg",1\n"say ""x"".jpg",2\n') == {"a,b.jpg", 'say "x".jpg'}


def test_a_bare_list_of_names_with_commas(tmp_path: Path) -> None:
    text = 'a,b.jpg\r\nc.jpg\n"say ""x"", y.jpg"\n1,2,3.tar\n\n'
    assert keys(tmp_path, text) == {"a,b.jpg", "c.jpg", 'say "x", y.jpg', "1,2,3.tar"}


def test_parquet_by_name_or_as_the_only_column(tmp_path: Path) -> None:
    for columns in ({"key": ["a", None, "b"], "n": [1, 2, 3]}, {"path": ["a", "b", "b"]}):
        pq.write_table(pa.table(columns), tmp_path / "keys.parquet")
        assert read_keys(str(tmp_path / "keys.parquet"), StorageOptions()) == {"a", "b"}


def test_without_a_column_named_key_the_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="file_name, size"):
        keys(tmp_path, "file_name,size\na.jpg,1\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keys.parquet", b"not parquet"),
        ("keys.csv", b"key,size\na.jpg\n"),
        ("keys.csv", b"key\n\xff\xfe\n"),
        ("keys.csv", b""),
    ],
)
def test_a_file_that_is_neither_is_a_config_error(tmp_path: Path, name: str, text: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        keys(tmp_path, text, name)
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match=r"none\.csv"):
        read_keys(str(tmp_path / "none.csv"), StorageOptions())
