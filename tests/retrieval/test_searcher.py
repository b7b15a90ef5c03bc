"""Exact search against a plain numpy sort, whatever the block size; approximate search against the exact one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from FlagEmbedding.retrieval.approximate import SearchEffort, load_or_build, recall, search_approximate
from FlagEmbedding.retrieval.index import FlatIndex, assemble_index
from FlagEmbedding.retrieval.searcher import search, torch_threads
from FlagEmbedding.retrieval.shards import ShardStore
from FlagEmbedding.utils.errors import DataError, UsageError


def make_index(folder: Path, vectors: np.ndarray, docids: list[str]) -> FlatIndex:
    store = ShardStore.create(folder / "shards", {}, *vectors.shape, len(vectors))
    store.write(0, vectors, docids)
    assemble_index(store, folder)
    store.remove()
    return FlatIndex(folder)


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def reference(vectors: np.ndarray, docids: list[str], query: np.ndarray, top_k: int) -> list[tuple[str, float]]:
    """All scores in double precision, sorted as trec_eval sorts: score, then docid, both descending."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    ranked = sorted(((round(float(s), 6), d) for s, d in zip(scores, docids, strict=True)), reverse=True)
    return [(docid, score) for score, docid in ranked[:top_k]]


@pytest.mark.parametrize("block_rows", [1, 3, 50, 173, 1000])
@pytest.mark.parametrize("top_k", [1, 7, 60, 500])
def test_exact_search_equals_sorting_everything(tmp_path: Path, block_rows: int, top_k: int) -> None:
    # Small integers: every score is exact, and ties abound, also at the cut.
    generator = np.random.default_rng(3)
    vectors = generator.integers(-2, 3, (173, 4)).astype(np.float32)
    queries = generator.integers(-2, 3, (9, 4)).astype(np.float32)
    docids = [f"{i * 37 % 173}#{i % 3}" for i in range(173)]
    index = make_index(tmp_path, vectors, docids)
    found = search(index, queries, top_k, block_rows=block_rows)
    for query, hits in zip(queries, found, strict=True):
        assert [(hit.docid, hit.score) for hit in hits] == reference(vectors, docids, query, top_k)
        assert all(docids[hit.row] == hit.docid for hit in hits)


def test_real_scores_and_the_order_do_not_depend_on_blocks_or_threads(tmp_path: Path) -> None:
    vectors, queries = unit(400, 48, 1), unit(30, 48, 2)
    docids = [f"d{i}" for i in range(400)]
    index = make_index(tmp_path, vectors, docids)
    whole = search(index, queries, 25)
    assert whole == search(index, queries, 25, block_rows=7, threads=2)
    for query, hits in zip(queries, whole, strict=True):
        expected = reference(vectors, docids, query, 25)
        assert [hit.docid for hit in hits] == [docid for docid, _ in expected]
        assert [hit.score for hit in hits] == [score for _, score in expected]


def test_equal_passages_stand_in_docid_order_wherever_they_are(tmp_path: Path) -> None:
    vectors = np.repeat(unit(1, 64, 5), 300, axis=0)
    docids = [f"{i:03d}" for i in np.random.default_rng(0).permutation(300)]
    index = make_index(tmp_path, vectors, docids)
    for block_rows in (11, 128, 300):
        hits = search(index, unit(2, 64, 6), 10, block_rows=block_rows)
        for row in hits:
            assert [hit.docid for hit in row] == [f"{i:03d}" for i in range(299, 289, -1)]


def test_queries_that_cannot_be_searched_are_refused(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(5, 4, 0), list("abcde"))
    with pytest.raises(UsageError, match="another encoder"):
        search(index, unit(1, 3, 0), 2)
    with pytest.raises(UsageError, match="--hits"):
        search(index, unit(1, 4, 0), 0)
    with pytest.raises(DataError, match="not finite"):
        search(index, np.full((1, 4), np.nan, dtype=np.float32), 2)


@pytest.mark.parametrize("index_type", ["HNSW16", "IVF8,Flat", "IVF4,PQ4x4", "SQ8", "Flat"])
def test_approximate_search_by_factory_string(tmp_path: Path, index_type: str) -> None:
    vectors, queries = unit(600, 16, 1), unit(20, 16, 2)
    index = make_index(tmp_path, vectors, [str(i) for i in range(600)])
    exact = search(index, queries, 10)
    found, seconds = search_approximate(index, queries, 10, index_type)
    assert seconds > 0
    share = recall(found, exact)
    # A quantizer of four bits loses much on random vectors; everything else must find nearly all.
    assert share > (0.3 if "PQ" in index_type else 0.9)
    if index_type == "Flat":
        assert [[hit.docid for hit in hits] for hits in found] == [[hit.docid for hit in hits] for hits in exact]


def test_an_approximate_index_is_kept_until_the_vectors_change(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(50, 8, 1), [str(i) for i in range(50)])
    load_or_build(index, "HNSW8")
    written = (tmp_path / "index.HNSW8").stat().st_mtime_ns
    load_or_build(index, "HNSW8")
    assert (tmp_path / "index.HNSW8").stat().st_mtime_ns == written
    other = make_index(tmp_path, unit(50, 8, 2), [str(i) for i in range(50)])
    np.testing.assert_array_equal(load_or_build(other, "HNSW8").storage.ntotal, 50)
    assert (tmp_path / "index.HNSW8").stat().st_mtime_ns != written


@pytest.mark.parametrize("index_type", ["nonsense", "IVF4,PQ5"])
def test_a_type_that_faiss_cannot_build_is_one_line(tmp_path: Path, index_type: str) -> None:
    index = make_index(tmp_path, unit(50, 8, 1), [str(i) for i in range(50)])
    with pytest.raises(UsageError, match="--index_type") as caught:
        search_approximate(index, unit(2, 8, 2), 5, index_type)
    assert "\n" not in str(caught.value)


def test_recall_by_hand(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(8, 4, 1), list("abcdefgh"))
    exact = search(index, unit(2, 4, 2), 4)
    assert recall([exact[0][:3], exact[1]], exact) == pytest.approx((0.75 + 1) / 2)


def test_an_approximate_index_is_taken_from_disk_only_when_it_is_of_this_type(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(60, 8, 1), [str(i) for i in range(60)])
    load_or_build(index, "HNSW8")
    assert type(load_or_build(index, "SQ8")) is not type(load_or_build(index, "HNSW8"))
    assert json.loads((tmp_path / "index.SQ8.json").read_text()) == {
        "index_type": "SQ8",
        "index_sha256": index.checksum(),
    }


def test_a_damaged_approximate_index_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = make_index(tmp_path / "a", unit(50, 8, 1), [str(i) for i in range(50)])
    path = tmp_path / "a" / "index.HNSW8"
    load_or_build(index, "HNSW8")
    whole = path.read_bytes()
    load_or_build(make_index(tmp_path / "b", unit(40, 8, 1), [str(i) for i in range(40)]), "HNSW8")
    for content in (whole[:100], b"", (tmp_path / "b" / "index.HNSW8").read_bytes()):
        path.write_bytes(content)
        assert load_or_build(index, "HNSW8").ntotal == 50
        assert path.read_bytes() == whole


def test_effort_reaches_the_index(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(600, 16, 1), [str(i) for i in range(600)])
    queries = unit(20, 16, 2)
    exact = search(index, queries, 10)

    def found(index_type: str, **effort: int) -> float:
        return recall(search_approximate(index, queries, 10, index_type, effort=SearchEffort(**effort))[0], exact)

    assert found("IVF16,Flat", n_probe=1) < 0.7 < 0.999 < found("IVF16,Flat", n_probe=16)
    assert found("HNSW4", ef_search=10) < found("HNSW4", ef_search=600)


def test_fewer_passages_than_asked_and_no_empty_places(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(12, 8, 1), [f"d{i:02d}" for i in range(12)])
    for hits in (search(index, unit(2, 8, 2), 50), search_approximate(index, unit(2, 8, 2), 50, "Flat")[0]):
        assert [len({hit.docid for hit in row}) for row in hits] == [12, 12]
    # One list of an IVF index is looked at: faiss fills the places that it has nothing for with -1.
    few, _ = search_approximate(index, unit(1, 8, 2), 12, "IVF3,Flat", effort=SearchEffort(n_probe=1))
    assert 0 < len(few[0]) < 12 and all(hit.row >= 0 for hit in few[0])


def test_longer_vectors_have_wider_ties(tmp_path: Path) -> None:
    # Scores about 4,000, where float32 is off by more than 1e-4: the cut must not lose the right passage.
    vectors = unit(300, 32, 1) * 64
    vectors[100:] = vectors[:1] + np.random.default_rng(0).normal(0, 1e-6, (200, 32)).astype(np.float32)
    queries = (vectors[:1] + unit(3, 32, 3)).astype(np.float32)
    docids = [f"d{i}" for i in range(300)]
    index = make_index(tmp_path, vectors, docids)
    for block_rows in (7, 300):
        for query, hits in zip(queries, search(index, queries, 9, block_rows=block_rows), strict=True):
            assert [(hit.docid, hit.score) for hit in hits] == reference(vectors, docids, query, 9)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with torch_threads(0):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_exactly_the_same(tmp_path: Path) -> None:
    index = make_index(tmp_path, unit(400, 48, 1), [f"d{i}" for i in range(400)])
    queries = unit(30, 48, 2)
    assert search(index, queries, 25, device="cuda:0", block_rows=64) == search(index, queries, 25)
