"""What is wrong with data, place by place: all problems are counted, the first are shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from FlagEmbedding.utils.errors import DataError

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Problem:
    """What is wrong in one place. ``line`` 0 means the file or folder as a whole, ``key`` "" the line as a whole."""

    path: str
    line: int
    key: str
    found: str
    hint: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {f'{self.key} ' if self.key else ''}{self.found}; {self.hint}"


@dataclass
class Problems:
    """The first problems and the number of all (a file can have millions)."""

    first: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, problem: Problem) -> None:
        """Count ``problem``, and keep it when it is one of the first."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(problem)

    def report(self, path: str, line: int, key: str, found: str, hint: str) -> None:
        """Add the ``Problem`` of these fields."""
        self.add(Problem(path, line, key, found, hint))

    def raise_if_any(self) -> None:
        """Raise all of them as one ``DataError``: a single line for a single problem."""
        if self.count == 1:
            raise DataError(str(self.first[0]))
        if self.count:
            shown = "all" if self.count <= len(self.first) else f"the first {len(self.first)}"
            raise DataError(f"{self.count} problems in the data, {shown}:\n" + "\n".join(f"  {p}" for p in self.first))


def unreadable(path: str, error: Exception) -> Problem:
    """The problem of a file that the system does not let us read."""
    return Problem(path, 0, "", f"cannot be read ({error})", "check the file and its permissions")
