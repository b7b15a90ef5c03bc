"""Long jobs that write JSONL: killed at any moment, the same command goes on and the file ends byte for byte the same.

While a job runs, everything it has finished stands in one append-only journal, ``.{output}.journal`` beside the output
(hidden, so that training does not take it for data). Its first line is the job's identity: the arguments and inputs
that decide the output. Every further line is one finished input: the rows it gave (0 to n) and a note, such as what was
filtered, out of which the report is made. Choices:

* An entry is one ``write`` of whole lines, so a kill leaves at most a torn last line; opening cuts it off.
* The output is made out of the journal at the end and moved into place at once: it is whole or it is not there.
  Reports are written before it and the journal is removed after it, so a kill in between only repeats that.
* A journal of other arguments or changed inputs is never continued: refused, or thrown away with ``--overwrite``.
* A journal can be written by one process at a time (``flock``).

Use::

    with Job(output, identity, overwrite=options.overwrite) as job:
        for item in islice(items, job.done, None):     # items in a fixed order
            job.add(rows, note)
        write_report(job.notes())
        job.finish()
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from FlagEmbedding.retrieval.shards import clear_disk_errors
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import differences
from FlagEmbedding.utils.io import PathLike, atomic_open
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

_FORMAT = 1
_REPORT_SECONDS = 10.0


def json_line(value: Any) -> str:
    """``value`` as one line of JSON with its line end; text as it is, escaped only where UTF-8 cannot hold it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, in a column that is not ours
        text = json.dumps(value)
    return text + "\n"


class Journal:
    """An append-only file of JSON lines that survives being killed; also good as a cache that must not lose entries.

    Args:
        path: the file; made when it is not there.
        header: written as the first line, and compared with the one that is there.

    Attributes:
        entries: number of whole entries, the header not counted.

    Raises:
        UsageError: another process writes to it, or its header differs (each difference is named).
        DataError: it cannot be read or written.
    """

    def __init__(self, path: PathLike, header: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.header = {"journal": _FORMAT, **(header or {})}
        self._lock = threading.Lock()
        with clear_disk_errors(f"opening {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: IO[bytes] = open(self.path, "a+b", buffering=0)  # noqa: SIM115 — closed by close()
        try:
            self._take()
            self.entries = self._recover()
        except BaseException:
            self._stream.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{self.path}: another process is writing to it; wait for it, or end it first") from error
        if not self.path.exists() or not os.path.samestat(os.fstat(self._stream.fileno()), self.path.stat()):
            raise UsageError(f"{self.path}: another process has just finished it; look at its output")

    def _recover(self) -> int:
        """Cut off what a kill left half-written, check or write the header, and count the entries."""
        whole = count = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n") or _parse(line) is None:
                    break
                if count == 0:
                    self._check_header(_parse(line))
                whole, count = whole + len(line), count + 1
        if whole < self.path.stat().st_size:
            logger.info("%s: a half-written last entry is cut off and done again", self.path)
            self._stream.truncate(whole)
        if not count:
            self._write(self.header)
        return max(0, count - 1)

    def _check_header(self, there: Any) -> None:
        found = differences(there, self.header) if isinstance(there, dict) else ["its first line is no header"]
        if found:
            raise UsageError(
                f"{self.path} was left by another command ({'; '.join(found)}): give the same arguments as before to "
                "go on, or --overwrite True to start anew"
            )

    def _write(self, value: Any) -> None:
        data = memoryview(json_line(value).encode("utf-8"))
        with clear_disk_errors(f"writing {self.path}"):
            while data:  # an unbuffered write may take less than all of it (a full disk)
                data = data[self._stream.write(data) or 0 :]

    def append(self, value: Any) -> None:
        """Add one entry; when this returns, a kill of the process cannot lose it. Threads may call it together."""
        with self._lock:
            self._write(value)
            self.entries += 1

    def read(self) -> Iterator[Any]:
        """The entries, in the order they were added."""
        with open(self.path, "rb") as lines:
            next(lines, None)
            for line in lines:
                value = _parse(line)
                if value is None:
                    raise DataError(f"{self.path}: damaged while it was in use; run the same command again")
                yield value

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def remove(self) -> None:
        """Delete the file and let go of it."""
        self.path.unlink(missing_ok=True)
        self.close()


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Job:
    """One output file made input by input; see the top of this file.

    Args:
        output: the JSONL file to write.
        identity: JSON values that decide the output (arguments, fingerprints of the inputs).
        overwrite: replace an output that is there, and throw away a journal that does not fit.

    Attributes:
        done: inputs whose rows are already safe; go on from there.

    Raises:
        UsageError: the output is there, or a journal of another command is, and ``overwrite`` is off.
    """

    def __init__(self, output: PathLike, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.output = Path(output)
        path = journal_path(self.output)
        check_output(self.output, overwrite)
        header = {"output": self.output.name, **json.loads(json.dumps(identity))}
        try:
            self._journal = Journal(path, header)
        except UsageError:
            if not overwrite or _in_use(path):
                raise
            logger.info("%s: left by another command, thrown away (--overwrite)", path)
            path.unlink()
            self._journal = Journal(path, header)
        if self.done:
            logger.info("%s: going on after %d finished inputs", self.output, self.done)

    @property
    def done(self) -> int:
        """Inputs whose rows are safe."""
        return self._journal.entries

    def add(self, rows: Sequence[dict[str, Any]], note: Any = None) -> None:
        """Finish the next input: ``rows`` go to the output, ``note`` (JSON) to the report."""
        self._journal.append({"rows": list(rows), "note": note})

    def notes(self) -> Iterator[Any]:
        """The notes of all finished inputs, those of earlier runs included, in order."""
        return (entry["note"] for entry in self._journal.read())

    def finish(self) -> int:
        """Write the output out of the journal, remove the journal; returns the number of rows."""
        rows = 0
        with clear_disk_errors(f"writing {self.output}"), atomic_open(self.output) as stream:
            for entry in self._journal.read():
                stream.writelines(map(json_line, entry["rows"]))
                rows += len(entry["rows"])
        self._journal.remove()
        return rows

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()


def check_output(output: Path, overwrite: bool = False) -> None:
    """Refuse an output that may not be written, before any work is done for it. A job under way may go on."""
    if output.is_dir():
        raise UsageError(f"{output} is a folder: name the file to write")
    if output.exists() and not overwrite and not journal_path(output).exists():
        raise UsageError(f"{output} is there already: pass --overwrite True to replace it, or name another file")


def journal_path(output: Path) -> Path:
    """Where the journal of ``output`` stands."""
    return output.with_name(f".{output.name}.journal")


def _in_use(path: Path) -> bool:
    with open(path, "rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


class Progress:
    """Every ten seconds one line: how many are done, how fast, and how long the rest will take."""

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self._first = done
        self._started = self._last = time.monotonic()

    def step(self, count: int = 1) -> None:
        """Count ``count`` more as done."""
        self.done += count
        now = time.monotonic()
        if now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        rate = (self.done - self._first) / (now - self._started)
        if self.total is None or not rate:
            logger.info("%s: %s, %.1f/s", self.what, f"{self.done:,}", rate)
            return
        minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        logger.info(
            "%s: %s of %s (%.1f %%), %.1f/s, %d:%02d:%02d left",
            self.what,
            f"{self.done:,}",
            f"{self.total:,}",
            100 * self.done / max(1, self.total),
            rate,
            hours,
            minutes,
            seconds,
        )
