"""More than one block of anything: docids and shards over 1 MiB, more queries than one turn, many rescored pairs."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from FlagEmbedding.retrieval.approximate import load_or_build, search_approximate
from FlagEmbedding.retrieval.index import DocIds, FlatIndex, assemble_index
from FlagEmbedding.retrieval.searcher import search
from FlagEmbedding.retrieval.shards import ShardStore

MEBIBYTE = 1 << 20


def make_index(folder: Path, vectors: np.ndarray, docids: list[str] | None = None, shard_size: int = 0) -> FlatIndex:
    docids = docids or [f"d{i}" for i in range(len(vectors))]
    store = ShardStore.create(folder / "shards", {}, *vectors.shape, shard_size or len(vectors))
    for shard in range(len(store)):
        start, stop = store.span(shard)
        store.write(shard, vectors[start:stop], docids[start:stop])
    assemble_index(store, folder)
    store.remove()
    return FlatIndex(folder)


def normal(rows: int, dimension: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


def ranked(vectors: np.ndarray, query: np.ndarray, docids: list[str], top_k: int) -> list[tuple[str, float]]:
    """All scores in double precision, sorted as trec_eval sorts: score, then docid, both descending."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    pairs = sorted(((round(float(s), 6), d) for s, d in zip(scores, docids, strict=True)), reverse=True)
    return [(docid, score) for score, docid in pairs[:top_k]]


@pytest.mark.parametrize("width", [15, 6], ids=["a line ends where a mebibyte ends", "a line lies across"])
@pytest.mark.parametrize("last", ["\n", ""], ids=["with a last line end", "without"])
def test_every_docid_of_a_long_file(tmp_path: Path, width: int, last: str) -> None:
    ids = [f"{i:0{width}d}" for i in range(3 * MEBIBYTE // (width + 1) + 5)]
    path = tmp_path / "docid"
    path.write_text("\n".join(ids) + last)
    assert path.stat().st_size > 3 * MEBIBYTE
    docids = DocIds(path)
    assert len(docids) == len(ids)
    assert list(docids) == ids


def test_shards_of_several_mebibytes_become_one_file_of_faiss(tmp_path: Path) -> None:
    vectors = normal(40_000, 16, 0)  # 2.4 MiB in two shards, the second a short one
    docids = [f"{'길' * 20}{i}" for i in range(len(vectors))]  # 2.5 MiB
    index = make_index(tmp_path, vectors, docids, shard_size=30_000)
    reference = faiss.IndexFlatIP(16)
    reference.add(vectors)
    faiss.write_index(reference, str(tmp_path / "reference"))
    assert (tmp_path / "index").read_bytes() == (tmp_path / "reference").read_bytes()
    assert (tmp_path / "docid").read_text(encoding="utf-8") == "".join(f"{docid}\n" for docid in docids)
    assert [index.docids[row] for row in (0, 29_999, 30_000, 39_999)] == [docids[i] for i in (0, 29_999, 30_000, -1)]


def test_vectors_of_several_blocks_are_all_searched(tmp_path: Path) -> None:
    vectors = normal(9_000, 1_024, 1)  # 35 MiB, a block is about 32
    index = make_index(tmp_path, vectors)
    rows = [0, 4_321, 8_191, 8_192, 8_999]
    # The same vectors, so that each passage's best query is itself; scores reach 1,000.
    found = search(index, vectors[rows], 3)
    assert [hits[0].row for hits in found] == rows
    for hits, row in zip(found, rows, strict=True):
        expected = ranked(vectors, vectors[row], [f"d{i}" for i in range(9_000)], 3)
        assert [hit.docid for hit in hits] == [docid for docid, _ in expected]
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=2e-6)


def test_more_queries_than_one_turn(tmp_path: Path) -> None:
    # A turn is as many queries as have 64 MiB of scores: 16 with blocks of 2^20 vectors.
    vectors, queries = normal(50, 8, 2), normal(45, 8, 3)
    index = make_index(tmp_path, vectors)
    docids = [f"d{i}" for i in range(50)]
    found = search(index, queries, 5, block_rows=1 << 20)
    assert len(found) == 45
    for hits, query in zip(found, queries, strict=True):
        assert [(hit.docid, hit.score) for hit in hits] == ranked(vectors, query, docids, 5)


def test_more_pairs_than_are_scored_again_at_once(tmp_path: Path) -> None:
    # 60 queries keep 200 passages each: 12,000 pairs, and 8,192 are scored in double precision at a time.
    vectors, queries = normal(230, 24, 4), normal(60, 24, 5)
    vectors[200:] = vectors[:30]  # equal passages, which must have equal scores
    index = make_index(tmp_path, vectors)
    docids = [f"d{i}" for i in range(230)]
    for hits, query in zip(search(index, queries, 200), queries, strict=True):
        assert [(hit.docid, hit.score) for hit in hits] == ranked(vectors, query, docids, 200)


def test_an_approximate_index_holds_every_block(tmp_path: Path) -> None:
    vectors = normal(70_000, 4, 6)  # filled in blocks of 65,536
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = make_index(tmp_path, vectors)
    assert load_or_build(index, "SQ8").ntotal == 70_000
    found, _ = search_approximate(index, vectors[[3, 69_999]], 50, "SQ8")
    assert [row in {hit.row for hit in hits} for row, hits in zip((3, 69_999), found, strict=True)] == [True, True]
