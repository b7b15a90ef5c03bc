"""Rows out of tables: Parquet and Arrow files. Datasets, as ``datasets`` saves them to disk or the hub has them, are
Arrow files; where a dataset has splits, ``train`` is read. Row n of a file is called line n.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from FlagEmbedding.utils.io import PathLike, read_json

_BATCH = 256
_FILE = r"(?!.*\.(?:jsonl?|gz|zst|parquet|csv|tsv|txt)$)"  # a file's name that is mistyped is no dataset
_HUB = re.compile(_FILE + r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


def is_table(path: PathLike) -> bool:
    """Whether ``path`` names a Parquet or Arrow file."""
    return str(path).lower().endswith((".parquet", ".arrow"))


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` saved a dataset in ``folder``."""
    return all(os.path.isfile(folder / name) for name in ("dataset_info.json", "state.json"))


def names_dataset(given: str) -> bool:
    """Whether ``given`` can be a dataset of the hub: ``owner/name``, and no place on this disk."""
    return bool(_HUB.fullmatch(given)) and not os.path.exists(given) and not os.path.exists(os.path.dirname(given))


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved dataset, as its ``state.json`` lists them. Raises ``OSError``."""
    try:
        names = [str(file["filename"]) for file in read_json(folder / "state.json")["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"state.json does not list its files ({type(error).__name__})") from error
    if odd := [name for name in names if Path(name).name != name or not is_table(name)]:
        raise OSError(f"state.json lists {odd[0][:60]!r}, which is no Arrow file beside it")
    return [folder / name for name in names]


def hub_files(name: str) -> list[Path]:
    """The Arrow files of the split ``train`` of a dataset of the hub, which is fetched. Raises ``OSError``."""
    import datasets

    found = _HUB.fullmatch(name)
    assert found is not None
    with _as_os_error():
        dataset = datasets.load_dataset(found[1], found[2], split="train")
        return [Path(file["filename"]) for file in dataset.cache_files]


def table_rows(path: str, stream: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """``(row number from 1, row)`` of an open file of this name. Raises ``OSError``."""
    rows = _parquet(stream) if path.lower().endswith(".parquet") else _arrow(stream)
    number = 0
    while True:
        with _as_os_error(f"row {number + 1}: "):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield number, row


def _parquet(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(_BATCH):
        yield from batch.to_pylist()


def _arrow(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    import pyarrow

    whole = stream.read(6) == b"ARROW1"  # a file that can be read from anywhere, otherwise a stream, as datasets writes
    stream.seek(0)
    reader = pyarrow.ipc.open_file(stream) if whole else pyarrow.ipc.open_stream(stream)
    for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader:
        batch.validate(full=True)  # what a damaged file announces is otherwise believed
        for start in range(0, batch.num_rows, _BATCH):
            yield from batch.slice(start, _BATCH).to_pylist()


@contextmanager
def _as_os_error(place: str = "") -> Iterator[None]:
    """What reading a table raises, as an ``OSError`` of one line."""
    import datasets
    import pyarrow

    libraries = pyarrow.ArrowException, datasets.exceptions.DatasetsError
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, *libraries) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        reason = "".join(letter if letter.isprintable() else "\ufffd" for letter in reason)
        raise OSError(f"{place}{reason}") from error
