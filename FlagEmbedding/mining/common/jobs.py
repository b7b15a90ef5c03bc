"""Long jobs that write JSONL: killed at any moment, the same command goes on and the file ends byte for byte the same.

While a job runs, everything it has finished stands in one append-only journal, ``.{output}.journal`` (hidden, so that
training does not take it for data). Its first line is the job's identity: the arguments and inputs that decide the
output. Every further line is one finished input: the rows it gave (0 to n) and a note for the report. Choices:

* An entry is one ``write`` of whole lines, so a kill leaves at most a torn last line; opening cuts it off.
* The output is made out of the journal at the end and moved into place at once: it is whole or it is not there.
  Reports are written before it and the journal is removed after it, so a kill in between only repeats that.
* A journal of other arguments or changed inputs is never continued: refused, or thrown away with ``--overwrite``.

What only copies rows needs no journal: :func:`write_rows` starts over after a kill and gives the same file.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from FlagEmbedding.mining.common.rows import json_line
from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.folders import remove_named
from FlagEmbedding.utils.identity import as_json, differences
from FlagEmbedding.utils.io import PathLike, atomic_text, parse_json, remove_leftovers
from FlagEmbedding.utils.locking import exclusive
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.progress import progress as progress  # the other commands take it from here

logger = get_logger(__name__)

T = TypeVar("T")
_FORMAT = 1
# Everything that commands write into their work folder: a corpus in one form, its texts by place, real queries.
_SCRATCH = ("docs-0.jsonl", "texts", "offsets", "docid", "passages.json", "negatives", "negatives-journal")


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of ``size``."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output``. A kill leaves it to the next run, an error does not.

    Raises:
        UsageError: another process works in it.
    """
    work = output.with_name(f".{output.name}.work")
    with ExitStack() as held:
        with clear_disk_errors(f"making {work}"):
            held.enter_context(exclusive(work.with_name(f"{work.name}.lock"), output))
            work.mkdir(exist_ok=True)
        held.callback(remove_named, work, *_SCRATCH, *(f".{name}.*.tmp" for name in _SCRATCH))
        yield work


def write_rows(output: Path, rows: Iterable[dict[str, Any]], overwrite: bool) -> int:
    """Write ``rows`` as they come; returns their number. The file appears at the end, or, after an error, not at all.

    An output that is there is refused before the first row is asked for, unless ``overwrite``.
    """
    count = 0
    with clear_disk_errors(f"writing {output}"), exclusive(output.with_name(f".{output.name}.lock"), output):
        check_output(output, overwrite)
        remove_leftovers(output.parent, glob.escape(output.name))
        with atomic_text(output) as stream:
            for row in progress(output.name, rows):
                stream.write(json_line(row))
                count += 1
    return count


class Job:
    """One output file made input by input, by one process at a time::

        with Job(output, identity, overwrite=options.overwrite) as job:
            for item in islice(items, job.done, None):  # items in a fixed order
                job.add(rows, note)
            write_report(job.notes())
            job.finish()

    Args:
        output: the JSONL file to write.
        identity: JSON values that decide the output (arguments, fingerprints of the inputs).
        overwrite: replace an output that is there, and throw away a journal that does not fit.

    Attributes:
        done: inputs whose rows are already safe; go on from there.

    Raises:
        UsageError: the output or a journal of another command is there, or another process works on it.
        DataError: the journal cannot be read or written.
    """

    def __init__(self, output: PathLike, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = Path(output)
        self._path = journal_path(self.output)
        self._header = as_json({"journal": _FORMAT, "output": self.output.name, **identity})
        with ExitStack() as opened:
            with clear_disk_errors(f"opening {self._path}"):
                opened.enter_context(exclusive(self._path.with_name(f"{self._path.name}.lock"), self.output))
                check_output(self.output, overwrite)  # under the lock: another process may just have finished it
                self._stream: IO[bytes] = opened.enter_context(open(self._path, "a+b", buffering=0))
            self.done = self._recover(overwrite)
            self._opened = opened.pop_all()
        if self.done:
            logger.info("%s: going on after %d finished inputs", self.output, self.done)

    def _recover(self, overwrite: bool) -> int:
        """Cut off what a kill left half-written, check or write the header, and count the entries."""
        whole = count = 0
        with open(self._path, "rb") as lines:
            for line in lines:
                value = _parse(line)
                if not line.endswith(b"\n") or value is None or (count == 0 and not self._fits(value, overwrite)):
                    break
                if count and not _is_entry(value):
                    break
                whole, count = whole + len(line), count + 1
        if whole < self._path.stat().st_size:
            logger.info("%s: what is half-written or of another command is cut off and done again", self._path)
            self._stream.truncate(whole)
        if not count:
            self._write(self._header)
        return max(0, count - 1)

    def _fits(self, there: Any, overwrite: bool) -> bool:
        found = differences(there, self._header) if isinstance(there, dict) else ["its first line is no header"]
        if found and not overwrite:
            raise UsageError(
                f"{self._path} was left by another command ({'; '.join(found)}): give the same arguments as before to "
                "go on, or --overwrite True to start again"
            )
        return not found

    def _write(self, value: Any) -> None:
        data = memoryview(json_line(value).encode("utf-8"))
        with clear_disk_errors(f"writing {self._path}"):
            while data:  # an unbuffered write may take less than all of it (a full disk)
                data = data[self._stream.write(data) or 0 :]

    def add(self, rows: Sequence[dict[str, Any]], note: Any = None) -> None:
        """Finish the next input, safe from a kill now: ``rows`` go to the output, ``note`` (JSON) to the report."""
        self._write({"rows": list(rows), "note": note})
        self.done += 1

    def _entries(self) -> Iterator[Any]:
        with open(self._path, "rb") as lines:
            next(lines, None)
            for line in lines:
                value = _parse(line)
                if not _is_entry(value):
                    raise DataError(f"{self._path}: damaged while it was in use; run the same command again")
                yield value

    def notes(self) -> Iterator[Any]:
        """The notes of all finished inputs, those of earlier runs included, in order."""
        return (entry["note"] for entry in self._entries())

    def finish(self) -> int:
        """Write the output out of the journal, remove the journal; returns the number of rows."""
        rows = 0
        with clear_disk_errors(f"writing {self.output}"), atomic_text(self.output) as stream:
            for entry in self._entries():
                stream.writelines(map(json_line, entry["rows"]))
                rows += len(entry["rows"])
        self._path.unlink()
        return rows

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("rows"), list) and "note" in value


def check_output(output: Path, overwrite: bool = False) -> None:
    """Refuse an output that may not be written, before any work is done for it. A job under way may go on."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder: name the file to write")
    if output.exists() and not overwrite and not journal_path(output).exists():
        raise UsageError(f"{output} is there already: pass --overwrite True to replace it, or name another file")


def journal_path(output: Path) -> Path:
    """Where the journal of ``output`` stands."""
    return output.with_name(f".{output.name}.journal")
