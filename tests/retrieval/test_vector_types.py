"""fp16, int8 and binary vectors: size, candidates by hand, and float scores of what was found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from FlagEmbedding.retrieval.approximate import SearchEffort, recall, search_approximate
from FlagEmbedding.retrieval.index import FlatIndex
from FlagEmbedding.retrieval.searcher import search
from FlagEmbedding.utils.errors import UsageError
from tests.retrieval.test_searcher import make_index, unit

ROWS, DIMENSION = 600, 64


@pytest.fixture
def index(tmp_path: Path) -> FlatIndex:
    return make_index(tmp_path, unit(ROWS, DIMENSION, 1), [f"d{i}" for i in range(ROWS)])


def queries() -> np.ndarray:
    return unit(20, DIMENSION, 2)


@pytest.mark.parametrize(
    ("kind", "bytes_each"), [("fp16", 2 * DIMENSION), ("int8", DIMENSION), ("binary", DIMENSION // 8)]
)
def test_size_and_float_scores(index: FlatIndex, kind: str, bytes_each: int) -> None:
    exact = search(index, queries(), 10)
    found, _ = search_approximate(index, queries(), 10, kind)
    size = (index.folder / f"index.{kind}").stat().st_size
    assert ROWS * bytes_each <= size <= ROWS * bytes_each + 1_000
    vectors = index.read_rows(range(ROWS)).astype(np.float64)
    for query, hits in zip(queries(), found, strict=True):
        assert len(hits) == 10
        assert [hit.score for hit in hits] == [round(float(vectors[hit.row] @ query), 6) for hit in hits]
        assert [(hit.score, hit.docid) for hit in hits] == sorted(((h.score, h.docid) for h in hits), reverse=True)
    if kind != "binary":
        assert found == exact  # candidates enough
    # From disk, without building again.
    again, _ = search_approximate(FlatIndex(index.folder), queries(), 10, kind)
    assert again == found


def test_binary_candidates_are_those_of_fewest_different_signs(index: FlatIndex) -> None:
    signs, asked = index.read_rows(range(ROWS)) > 0, queries() > 0
    distances = (asked[:, None, :] != signs[None]).sum(axis=2)
    plain, _ = search_approximate(index, queries(), 15, "binary", effort=SearchEffort(rescore=0))
    for hits, own in zip(plain, distances, strict=True):
        assert [-hit.score for hit in hits] == sorted(own)[:15]
    exact, shares = search(index, queries(), 15), []
    for times in (1, 3, 10, 40):
        found, _ = search_approximate(index, queries(), 15, "binary", effort=SearchEffort(rescore=times))
        for hits, own in zip(found, distances, strict=True):
            assert max(own[hit.row] for hit in hits) <= sorted(own)[min(15 * times, ROWS) - 1]
        shares.append(recall(found, exact))
    assert shares == sorted(shares) and shares[0] < 0.7 and shares[-1] == 1.0
    assert found == exact  # all rows were candidates
    default, _ = search_approximate(index, queries(), 15, "binary")
    four, _ = search_approximate(index, queries(), 15, "binary", effort=SearchEffort(rescore=4))
    assert default == four and shares[1] < recall(four, exact) < shares[2]


def test_an_index_of_faiss_is_rescored_only_when_asked(index: FlatIndex) -> None:
    def own_scores(**effort: int) -> bool:
        found, _ = search_approximate(index, queries(), 10, "PQ8x4", effort=SearchEffort(**effort))
        vectors = index.read_rows(range(ROWS)).astype(np.float64)
        scores = [
            [round(float(vectors[hit.row] @ query), 6) for hit in hits]
            for query, hits in zip(queries(), found, strict=True)
        ]
        return [[hit.score for hit in hits] for hits in found] != scores

    assert own_scores()
    assert not own_scores(rescore=2)


def test_signs_must_fill_bytes(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(30, 12, 1), [f"d{i}" for i in range(30)])
    with pytest.raises(UsageError, match=r"--index_type binary: .* multiple of 8"):
        search_approximate(index, unit(2, 12, 2), 5, "binary")
    assert not (tmp_path / "index.binary").exists()
