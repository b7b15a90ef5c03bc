"""Candidates of sparse, of BM25 and of the union of modes: against the public classes, one text at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mining.corpora import QUERIES, TEXTS, positives, read_rows, write_collection

from FlagEmbedding import BGEM3FlagModel
from FlagEmbedding.mining.hard_negatives.command import main


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("miracl"))


def mine(collection: Path, model: Path, folder: Path, *words: str) -> int:
    given = ["--data_dir", str(collection), "--language", "ko", "--encoder", str(model), "--sampling_strategy", "top"]
    given += ["--index_save_dir", str(folder / "index"), "--range_for_sampling", "0-12", "--negative_number", "5"]
    return main([*given, *words, "--fill", "none", "--output_file", str(folder / "out.jsonl"), "--overwrite"])


def test_negatives_of_sparse_and_of_the_union(collection: Path, tiny_heads_dir: Path, tmp_path: Path) -> None:
    model = BGEM3FlagModel(str(tiny_heads_dir))
    queries, texts = (model.encode(each, return_sparse=True) for each in ([*QUERIES.values()], TEXTS))
    sparse = np.asarray(model.compute_lexical_matching_score(queries["lexical_weights"], texts["lexical_weights"]))
    dense = queries["dense_vecs"] @ texts["dense_vecs"].T
    by_query = {query: place for place, query in enumerate(QUERIES.values())}
    for modes in (["sparse"], ["dense", "sparse"]):
        assert mine(collection, tiny_heads_dir, tmp_path, "--modes", *modes, "--with_scores") == 0
        rows = read_rows(tmp_path / "out.jsonl")
        assert len(rows) == 9
        for row in rows:
            place = by_query[row["query"]]
            orders = {"dense": np.argsort(-dense[place]), "sparse": np.argsort(-sparse[place])}
            turns = [int(i) for pair in zip(*(orders[mode] for mode in modes), strict=True) for i in pair]
            window = [TEXTS[i] for i in dict.fromkeys(turns)][:12]
            own = positives(next(qid for qid, query in QUERIES.items() if query == row["query"]))
            expected = [text for text in window if text not in own][:5]
            # Passages of equal score may change places.
            assert len(set(row["neg"]) & set(expected)) >= 4
            # Whatever found them, the scores are dense.
            assert row["neg_scores"] == pytest.approx(
                [dense[place][TEXTS.index(text)] for text in row["neg"]], abs=1e-5
            )


def test_bm25_needs_no_heads_and_what_cannot_be_is_refused(
    collection: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mine(collection, tiny_model_dir, tmp_path, "--modes", "bm25") == 0
    by_words = (tmp_path / "out.jsonl").read_text()
    assert mine(collection, tiny_model_dir, tmp_path) == 0
    assert (tmp_path / "out.jsonl").read_text() != by_words
    for words, said in (
        (["--modes", "sparse"], "no sparse_linear.pt"),
        (["--modes", "dense+bm25-tuned"], "mining tunes no weights"),
        (["--modes", "bm25", "--random_negatives"], "--modes has no effect with --random_negatives"),
    ):
        assert mine(collection, tiny_model_dir, tmp_path, *words) == 2
        assert said in capsys.readouterr().err
