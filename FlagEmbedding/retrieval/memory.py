"""What exact search asks of an index, and an index that lies in memory: for a model that changes while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class VectorTable(Protocol):
    """Vectors by row number, with the id of each: ``FlatIndex`` on disk, ``MemoryIndex`` in memory."""

    @property
    def folder(self) -> Path: ...
    @property
    def rows(self) -> int: ...
    @property
    def dimension(self) -> int: ...
    @property
    def docids(self) -> Sequence[str]: ...

    def blocks(self, block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """``(first row, vectors [n, dimension] float32)`` from the first row to the last."""
        ...

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors of the given rows, ``[n, dimension]`` float32."""
        ...


@dataclass(frozen=True)
class MemoryIndex:
    """Vectors ``[rows, dimension]`` float32 in memory, 4 bytes per number.

    Attributes:
        folder: what messages call it.
    """

    folder: Path
    docids: Sequence[str]
    vectors: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        return int(self.vectors.shape[1])

    def blocks(self, block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """``(first row, vectors)``, block by block; views, not copies."""
        for start in range(0, self.rows, block_rows):
            yield start, self.vectors[start : start + block_rows]

    def read_rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Vectors of the given rows, ``[n, dimension]``."""
        return self.vectors[np.asarray(rows, dtype=np.int64)]
