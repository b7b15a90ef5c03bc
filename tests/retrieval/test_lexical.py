"""The inverted index against scipy and bm25s; late interaction against a plain double loop; fusion by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from FlagEmbedding.retrieval import late_interaction, lexical
from FlagEmbedding.retrieval.fusion import Found, Fusing, fuse
from FlagEmbedding.retrieval.late_interaction import maxsim, rerank
from FlagEmbedding.retrieval.lexical import Postings, best, bm25_impact, postings_in_memory, write_postings
from FlagEmbedding.utils.modes import Mode, parse_modes

ROWS, VOCABULARY = 200, 37


@pytest.fixture(scope="module")
def matrix() -> scipy.sparse.csr_array:
    """Passages x tokens: whole counts, some passages empty."""
    counts = np.random.default_rng(1).poisson(0.15, (ROWS, VOCABULARY)).astype(np.float32)
    counts[[0, 7, ROWS - 1]] = 0
    return scipy.sparse.csr_array(counts)


def on_disk(folder: Path, matrix: scipy.sparse.csr_array, bm25: bool = False) -> Postings:
    arrays = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data
    files = write_postings(folder, *arrays, bm25_impact(*arrays) if bm25 else None)
    docids = [f"d{row:03d}" for row in range(matrix.shape[0])]
    read = [np.fromfile(folder / name, str(file["dtype"])) for name, file in files.items()]
    assert [list(array.shape) for array in read] == [file["shape"] for file in files.values()]
    return Postings(docids, *read)


def queries(weights: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(2)
    chosen = [np.sort(generator.choice(VOCABULARY + 5, 4, replace=False)) for _ in range(9)]  # some no passage has
    return [(ids, generator.random(4).astype(np.float32) if weights else np.ones(4, np.float32)) for ids in chosen]


@pytest.mark.parametrize("block", [1, 13, 1 << 22])
def test_scores_are_those_of_the_matrix_product(
    block: int, matrix: scipy.sparse.csr_array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lexical, "_BLOCK", block)
    found = on_disk(tmp_path, matrix)
    asked = queries(weights=True)
    dense = np.zeros((len(asked), VOCABULARY + 5))
    for row, (ids, weights) in zip(dense, asked, strict=True):
        row[ids] = weights
    expected = dense[:, :VOCABULARY] @ matrix.toarray().astype(np.float64).T
    np.testing.assert_allclose([found.scores(query) for query in asked], expected, atol=1e-12)
    held = postings_in_memory(found.docids, np.diff(matrix.indptr), matrix.indices, matrix.data)
    for top_k in (3, ROWS):
        for row, query in zip(expected, asked, strict=True):
            hits, again = (best(each.docids, each.scores(query), top_k) for each in (found, held))
            order = sorted(((round(s, 6), d) for s, d in zip(row, found.docids, strict=True) if s > 0), reverse=True)
            assert [(hit.score, hit.docid) for hit in hits] == order[:top_k]  # ties by docid, nothing at 0
            assert again == hits


def test_bm25_is_that_of_bm25s(matrix: scipy.sparse.csr_array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bm25s = pytest.importorskip("bm25s")
    monkeypatch.setattr(lexical, "_BLOCK", 50)
    found = on_disk(tmp_path, matrix, bm25=True)
    texts = [np.repeat(np.arange(VOCABULARY), row.astype(int)).tolist() for row in matrix.toarray()]
    model = bm25s.BM25(k1=0.9, b=0.4, method="lucene", dtype="float64")
    model.index((texts, {f"w{i}": i for i in range(VOCABULARY)}), show_progress=False)
    for ids, ones in queries(weights=False):
        known = [int(i) for i in ids if i < VOCABULARY]
        expected = model.get_scores_from_ids(known)
        np.testing.assert_allclose(found.scores((ids, ones)), expected, atol=1e-5)
        assert expected.max() > 1


def test_an_empty_matrix_finds_nothing(tmp_path: Path) -> None:
    nothing = scipy.sparse.csr_array((3, 0), dtype=np.float32)
    for bm25 in (False, True):
        found = on_disk(tmp_path, nothing, bm25)
        assert [best(found.docids, found.scores(query), 5) for query in queries(weights=True)[:2]] == [[], []]


def test_late_interaction_is_the_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    passages = [generator.standard_normal((n, 8)).astype(np.float32) for n in (3, 1, 0, 5, 2)]
    asked = [generator.standard_normal((n, 8)).astype(np.float32) for n in (4, 1, 0)]

    def plain(query: np.ndarray, passage: np.ndarray) -> float:
        if not len(query) or not len(passage):
            return 0.0
        return float(np.mean([max(float(np.dot(q, p)) for p in passage.astype(float)) for q in query.astype(float)]))

    expected = [[plain(query, passage) for passage in passages] for query in asked]
    np.testing.assert_allclose([maxsim(query, passages) for query in asked], expected, atol=1e-12)
    wanted = [np.array([3, 0]), np.array([4, 2, 1]), np.array([], dtype=np.int64)]
    calls = []

    def read(rows: np.ndarray):  # type: ignore[no-untyped-def]
        calls.append(rows.tolist())
        for row in rows:
            yield np.array([row]), [passages[row]]

    found = rerank(asked, wanted, read)
    assert calls == [[0, 1, 2, 3, 4]]
    for own, rows, scores in zip(expected, wanted, found, strict=True):
        np.testing.assert_allclose(scores, [own[row] for row in rows], atol=1e-12)
    assert late_interaction.rerank(asked[:1], [np.array([], dtype=np.int64)], read)[0].size == 0


def test_fusion_by_hand() -> None:
    rows = np.array([2, 5, 9])
    scores = {"dense": np.array([0.5, 0.9, 0.1]), "sparse": np.array([1.0, 0.0, 3.0])}
    found = Found({"dense": np.array([5, 2]), "sparse": np.array([9, 2])}, rows, scores)
    docids = [f"d{i}" for i in range(10)]
    how = Fusing({"dense": 1.0, "sparse": 0.3}, rrf_k=1)
    (both, ranks) = parse_modes(["sparse+dense", "dense+sparse-rrf"])
    assert both == Mode(("dense", "sparse"))
    hits = fuse(both, found, how, docids, 2)
    assert [(hit.docid, hit.score) for hit in hits] == [("d9", round(1 / 1.3, 6)), ("d5", round(0.9 / 1.3, 6))]
    # Row 2 is second in both lists, rows 5 and 9 are first in one: 2 * 2/3 / 2 against 1 / 2.
    hits = fuse(ranks, found, how, docids, 3)
    assert [(hit.docid, hit.score) for hit in hits] == [("d2", 0.666667), ("d9", 0.5), ("d5", 0.5)]
