"""Hard negatives against brute force and sentence-transformers; what may never be a negative; alignment; refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mining.corpora import QUERIES, TEXTS, brute_force, positives, read_rows, write_collection, write_rows

from FlagEmbedding.evaluation.__main__ import generate_embedding
from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.dataset import TrainDataset
from FlagEmbedding.mining.hard_negatives.command import main
from FlagEmbedding.schema import read_records
from FlagEmbedding.utils.texts import normalize_text

WINDOW = ("--range_for_sampling", "2-20", "--negative_number", "6")
KEYS = [f"q{i}" for i in range(9)]  # q9 has no positive


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("miracl"))


@pytest.fixture(scope="module")
def index_dir(collection: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index made by step 0."""
    folder = tmp_path_factory.mktemp("index")
    words = ["--encoder", str(tiny_model_dir), "--languages", "ko", "--data_dir", str(collection)]
    assert generate_embedding([*words, "--index_save_dir", str(folder), "--max_passage_length", "100"]) == 0
    return folder / tiny_model_dir.name / "ko"


@pytest.fixture(scope="module")
def ranking(tiny_model_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every query's whole ranking as (row, score), by brute force."""
    passages, queries = brute_force(tiny_model_dir, TEXTS), brute_force(tiny_model_dir, list(QUERIES.values()))
    scores = queries @ passages.T
    return {qid: [(int(i), float(s[i])) for i in np.argsort(-s)] for qid, s in zip(QUERIES, scores, strict=True)}


class Mine:
    """Runs the command on the collection."""

    def __init__(self, collection: Path, index_dir: Path, model: Path, folder: Path) -> None:
        self.words = ["--data_dir", str(collection), "--language", "ko", "--encoder", str(model)]
        self.words += ["--index_dir", str(index_dir)]
        self.folder = folder

    def __call__(self, *words: str, name: str = "out.jsonl") -> list[dict[str, Any]]:
        assert main([*self.words, *words, "--output_file", str(self.folder / name)]) == 0
        return read_rows(self.folder / name)

    def report(self, name: str = "out") -> dict[str, Any]:
        return json.loads((self.folder / "reports" / f"{name}.json").read_text())["result"]


@pytest.fixture
def mine(collection: Path, index_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> Mine:
    return Mine(collection, index_dir, tiny_model_dir, tmp_path)


def may_serve(qid: str, rows: list[int]) -> list[str]:
    """Texts of ``rows`` in order without positives, their spellings, and repetitions: the rule, written out."""
    left, seen = [], {normalize_text(text) for text in positives(qid)}
    for row in rows:
        if normalize_text(TEXTS[row]) not in seen:
            seen.add(normalize_text(TEXTS[row]))
            left.append(TEXTS[row])
    return left


def test_the_top_of_the_window_is_what_brute_force_says(
    mine: Mine, ranking: dict[str, list[tuple[int, float]]]
) -> None:
    rows = mine(*WINDOW, "--sampling_strategy", "top")
    assert [list(row) for row in rows] == [["query", "pos", "neg"]] * 9
    assert [row["query"] for row in rows] == [QUERIES[qid] for qid in KEYS]
    for qid, row in zip(KEYS, rows, strict=True):
        assert row["pos"] == positives(qid)
        window = [place for place, _ in ranking[qid][2:20]]
        assert row["neg"] == may_serve(qid, window)[:6]
    report = mine.report()
    left_out = sum(18 - len(may_serve(qid, [place for place, _ in ranking[qid][2:20]])) for qid in KEYS)
    assert sum(report["left_out"].values()) == left_out > 0
    assert report["candidates"] == 9 * 18 and report["negatives"] == 54 and report["share_short"] == 0


def test_random_choice_stays_in_the_window_and_follows_the_seed(
    mine: Mine, ranking: dict[str, list[tuple[int, float]]]
) -> None:
    first, again, other = (mine(*WINDOW, "--seed", seed, name=f"{i}.jsonl") for i, seed in enumerate("778"))
    assert first == again != other
    for qid, row in zip(KEYS, first, strict=True):
        allowed = may_serve(qid, [place for place, _ in ranking[qid][2:20]])
        assert len(row["neg"]) == 6 and [n for n in allowed if n in row["neg"]] == row["neg"]
    assert any(set(a["neg"]) != set(b["neg"]) for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def sentence_transformer(tiny_model_dir: Path) -> Any:
    models = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.models")
    transformer = parts.Transformer(str(tiny_model_dir), max_seq_length=128)
    pooling = parts.Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
    return models.SentenceTransformer(modules=[transformer, pooling, parts.Normalize()], device="cpu")


@pytest.mark.parametrize(
    ("limits", "reranked"),
    [
        ({"absolute_margin": 0.002}, False),
        ({"relative_margin": 0.003}, False),
        ({"max_score": 0.995, "min_score": 0.985}, False),
        ({"absolute_margin": 0.0, "relative_margin": 0.002, "max_score": 0.99}, False),
        ({"relative_margin": 0.1, "min_score": 0.02}, True),
    ],
)
def test_filters_leave_what_sentence_transformers_leaves(
    mine: Mine, sentence_transformer: Any, cross_encoder_dir: Path, limits: dict[str, float], reranked: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import CrossEncoder
    from sentence_transformers.util import mine_hard_negatives

    pairs = [(QUERIES[qid], text) for qid in KEYS for text in positives(qid)]
    corpus = TEXTS[:60]
    reranker = CrossEncoder(str(cross_encoder_dir), device="cpu", max_length=128)
    theirs = mine_hard_negatives(
        datasets.Dataset.from_dict({"query": [q for q, _ in pairs], "answer": [p for _, p in pairs]}),
        sentence_transformer, corpus=corpus, num_negatives=5, range_max=58, sampling_strategy="top", verbose=False,
        cross_encoder=reranker if reranked else None, **limits,
    )  # fmt: skip
    expected: dict[str, list[str]] = {}
    for row in theirs:
        listed = expected.setdefault(row["query"], [])
        listed += [row["negative"]] if row["negative"] not in listed else []

    words = [word for name, value in limits.items() for word in (f"--{name}", str(value))]
    words += ["--cross_encoder", str(cross_encoder_dir), "--cross_encoder_max_length", "128"] if reranked else []
    corpus_file = write_rows(
        mine.folder / "corpus.jsonl", [{"docid": f"d{i}", "text": t} for i, t in enumerate(corpus)]
    )
    mine.words[mine.words.index("--index_dir") + 1] = str(mine.folder / "index")
    ours = mine(
        *words, "--corpus", str(corpus_file), "--range_for_sampling", "0-60", "--negative_number", "59",
        "--fill", "none", "--with_scores",
    )  # fmt: skip
    found = {row["query"]: row["neg"] for row in ours}
    assert found.keys() == expected.keys() and expected
    assert sum(mine.report()["left_out"].values()) > len(pairs)  # the filters do something beyond the positives
    for row in ours:
        # By score, as sentence-transformers orders them; by default ours stand in order of rank.
        order = sorted(range(len(row["neg"])), key=lambda i: -row["neg_scores"][i])
        assert [row["neg"][i] for i in order][:5] == expected[row["query"]]


def test_scores_are_inner_products(mine: Mine, ranking: dict[str, list[tuple[int, float]]]) -> None:
    for qid, row in zip(KEYS, mine(*WINDOW, "--with_scores"), strict=True):
        score = {TEXTS[place]: value for place, value in ranking[qid]}
        assert list(row) == ["query", "pos", "neg", "pos_scores", "neg_scores"]
        np.testing.assert_allclose(row["pos_scores"], [score[text] for text in row["pos"]], atol=5e-6)
        np.testing.assert_allclose(row["neg_scores"], [score[text] for text in row["neg"]], atol=5e-6)


def test_titles_are_part_of_texts_and_vectors(collection: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    words = ["--data_dir", str(collection), "--language", "ko", "--encoder", str(tiny_model_dir), "--with_title"]
    words += ["--index_save_dir", str(tmp_path / "index"), *WINDOW, "--with_scores"]
    assert main([*words, "--output_file", str(tmp_path / "o.jsonl")]) == 0
    texts = [f"t{i} {text}".strip() for i, text in enumerate(TEXTS)]
    vectors = dict(zip(texts, brute_force(tiny_model_dir, texts), strict=True))
    queries = dict(zip(QUERIES.values(), brute_force(tiny_model_dir, list(QUERIES.values())), strict=True))
    for row in read_rows(tmp_path / "o.jsonl"):
        for text, score in zip(row["neg"] + row["pos"], row["neg_scores"] + row["pos_scores"], strict=True):
            assert score == pytest.approx(vectors[text] @ queries[row["query"]], abs=5e-6)


@pytest.mark.parametrize("fill", ["next", "random", "none"])
def test_filling_up(mine: Mine, ranking: dict[str, list[tuple[int, float]]], fill: str) -> None:
    rows = mine("--range_for_sampling", "0-6", "--negative_number", "6", "--relative_margin", "0.002", "--fill", fill)
    report = mine.report()
    assert report["short"] > 0
    by_query = {row["query"]: row for row in rows}
    for qid in KEYS:
        score = {TEXTS[place]: value for place, value in ranking[qid]}
        limit = min(score[text] for text in positives(qid)) * 0.998
        negatives = by_query.get(QUERIES[qid], {"neg": []})["neg"]
        assert all(score[text] <= limit + 1e-6 for text in negatives)
        allowed = [t for t in may_serve(qid, [place for place, _ in ranking[qid][:18]]) if score[t] <= limit]
        if fill == "next":
            assert negatives == allowed[:6]
        elif fill == "none":
            assert negatives == [t for t in allowed if t in [TEXTS[place] for place, _ in ranking[qid][:6]]]
    assert (report["filled"] > 0) == (fill != "none")
    assert len(rows) == report["rows"] == sum(1 for row in rows if row["neg"])


def test_random_negatives_need_no_model(collection: Path, tmp_path: Path) -> None:
    words = ["--data_dir", str(collection), "--language", "ko", "--random_negatives", "--negative_number", "40"]
    seen: set[str] = set()
    for name in ("a", "b"):
        assert main([*words, "--output_file", str(tmp_path / f"{name}.jsonl")]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    for qid, row in zip(KEYS, read_rows(tmp_path / "a.jsonl"), strict=True):
        allowed = may_serve(qid, list(range(len(TEXTS))))
        assert len(row["neg"]) == 40 and len({normalize_text(n) for n in row["neg"]}) == 40
        assert {normalize_text(n) for n in row["neg"]} <= {normalize_text(n) for n in allowed}
        seen |= set(row["neg"])
    assert len(seen) >= 60


def test_mining_again_keeps_neg_q_where_the_negative_stays(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {
            "query": QUERIES[qid], "pos": positives(qid), "neg": [TEXTS[j] for j in range(20 + i, 30 + i)],
            "neg_q": [f"about {j}" if j % 3 else ["one", f"two {j}"] if j % 2 else "" for j in range(20 + i, 30 + i)],
            "neg_scores": [0.5] * 10, "pos_scores": [1.0] * len(positives(qid)), "source": qid,
        }
        for i, qid in enumerate(KEYS)
    ]  # fmt: skip
    source = write_rows(tmp_path / "rows.jsonl", rows)
    words = ["--input_file", str(source), "--encoder", str(tiny_model_dir), "--index_save_dir", str(tmp_path / "index")]
    assert main([*words, "--range_for_sampling", "0-30", "--negative_number", "8", "--output_file", str(tmp_path / "o.jsonl")]) == 0  # fmt: skip  # noqa: E501
    stayed = new = 0
    for before, after in zip(rows, read_rows(tmp_path / "o.jsonl"), strict=True):
        # Scores that came with other negatives are gone, columns that are not ours stay.
        assert list(after) == ["query", "pos", "neg", "neg_q", "source"]
        known = dict(zip(before["neg"], before["neg_q"], strict=True))
        assert after["neg_q"] == [known.get(text, "") for text in after["neg"]]
        stayed += sum(text in known for text in after["neg"])
        new += sum(text not in known for text in after["neg"])
    assert stayed > 5 and new > 5
    assert all(r.neg_q is not None and len(r.neg_q) == len(r.neg) for r in read_records(tmp_path / "o.jsonl"))
    assert len(TrainDataset(DataArguments([str(tmp_path / "o.jsonl")]))) == 9


def test_rows_without_negatives_and_positives_of_the_same_query_elsewhere(tiny_model_dir: Path, tmp_path: Path) -> None:
    # One question in three rows with three positives: none may be a negative of the others.
    rows = [{"query": f"How old is it?{' ' * i}", "pos": [TEXTS[i]]} for i in range(3)]
    rows += [{"query": "Another one?", "pos": [TEXTS[9]], "neg": []}]
    corpus = write_rows(
        tmp_path / "corpus.jsonl", [{"text": text, "title": "t"} for text in [*TEXTS[:12], "how old is IT?"]]
    )
    words = ["--input_file", str(write_rows(tmp_path / "rows.jsonl", rows)), "--corpus", str(corpus)]
    words += ["--encoder", str(tiny_model_dir), "--index_dir", str(tmp_path / "index"), "--fill", "none"]
    assert main([*words, "--range_for_sampling", "0-13", "--negative_number", "13", "--output_file", str(tmp_path / "o.jsonl")]) == 0  # fmt: skip  # noqa: E501
    found = read_rows(tmp_path / "o.jsonl")
    for row in found[:3]:
        assert sorted(row["neg"]) == sorted(TEXTS[3:12])
    assert sorted(found[3]["neg"]) == sorted([*TEXTS[:9], *TEXTS[10:12], "how old is IT?"])
    counts = json.loads((tmp_path / "reports/o.json").read_text())["result"]["left_out"]
    assert counts == {"judged_positive": 10, "same_as_query": 3}


def test_corpora_with_dots_in_their_names_have_indexes_of_their_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"query": "Which?", "pos": ["Not in a corpus."]}])
    for lang, texts in (("ko", TEXTS[:20]), ("fa", TEXTS[20:40])):
        folder = tmp_path / f"miracl-corpus-v1.0-{lang}"
        folder.mkdir()
        write_rows(folder / "docs-0.jsonl", [{"docid": f"{i}", "text": text} for i, text in enumerate(texts)])
        output = tmp_path / f"{lang}.jsonl"
        words = ["--input_file", str(source), "--corpus", str(folder), "--encoder", str(tiny_model_dir)]
        words += ["--index_save_dir", str(tmp_path / "index"), "--range_for_sampling", "0-20", "--negative_number", "5"]
        assert main([*words, "--output_file", str(output)]) == 0
        assert set(read_rows(output)[0]["neg"]) < set(texts)
        assert (tmp_path / "index" / tiny_model_dir.name / folder.name / "index").is_file()


def test_another_encoder_or_corpus_than_the_index_is_refused(
    mine: Mine, tiny_dropout_dir: Path, tiny_moe_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output_file", str(mine.folder / "x.jsonl"), *WINDOW]
    words = list(mine.words)
    words[words.index("--encoder") + 1] = str(tiny_moe_dir)
    assert main([*words, *output]) == 2
    assert "was made by another encoder (model:" in capsys.readouterr().err
    other = write_rows(mine.folder / "other.jsonl", [{"docid": f"d{i}", "text": f"text {i}"} for i in range(63)])
    assert main([*mine.words, *output, "--corpus", str(other)]) == 2
    assert "not those of this corpus" in capsys.readouterr().err
    assert main([*mine.words, *output, "--passage_max_length", "64"]) == 2
    assert "was made with 100" in capsys.readouterr().err
    assert not (mine.folder / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--range_for_sampling", "30-2"], "give two ranks such as 2-30"),
        (["--range_for_sampling", "2-7"], "holds (5)"),
        (["--relative_margin", "-0.1"], "must not be negative"),
        (["--max_score", "0.2", "--min_score", "0.4"], "nothing would be left"),
        (["--random_negatives", "--max_score", "0.9"], "has no effect with --random_negatives"),
        (["--cross_encoder", "x"], "has no effect without a filter"),
        (["--input_file", "x.jsonl"], "give either --input_file"),
        (["--language", "xx"], "not in MIRACL"),
        (["--seed", "one"], "invalid int value"),
        (["--cross_encoder", "/nowhere", "--max_score", "0.9"], "--cross_encoder /nowhere: cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line(mine: Mine, capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    assert main([*mine.words, *WINDOW[2:], *words, "--output_file", str(mine.folder / "x.jsonl")]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("error:") == 1 and "Traceback" not in error


def test_a_reranker_without_a_head_is_refused(
    mine: Mine, tiny_bert_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cross_encoder", str(tiny_bert_dir), "--max_score", "0.9", "--output_file", str(mine.folder / "x.jsonl")]
    assert main([*mine.words, *WINDOW, *words]) == 2
    assert "not a trained reranker, it lacks" in capsys.readouterr().err


def test_broken_rows_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"query": "q", "pos": []}\n{"query": "", "pos": ["p"]}\n{"query": "q", "pos": ["p"]}\n')
    words = ["--input_file", str(source), "--encoder", "x", "--output_file", str(tmp_path / "o.jsonl")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{source}:1: pos is an empty list" in error and f"{source}:2: query is empty text" in error


def test_the_report_reads_well(mine: Mine) -> None:
    mine(*WINDOW, "--relative_margin", "0.02")
    page = (mine.folder / "reports/out.md").read_text()
    identity = json.loads((mine.folder / "reports/out.json").read_text())["identity"]
    assert identity["passage_max_length"] == 100  # as the index was made, where no flag says otherwise
    assert "6 negatives per query, random of ranks 3 to 20 of 63 passages" in page
    assert "filters: relative_margin 0.02; fill: random; seed 42" in page
    assert re.search(r"\| topics left out: no relevant passage +\| +1 \|", page)
    result = mine.report()
    assert result["left"] + sum(result["left_out"].values()) == result["candidates"]
    for name in ("positive", "negative"):
        assert sum(result["scores"][name]["histogram"]["counts"]) == result["scores"][name]["count"]
    # A positive never passes a margin from itself; q1 has two, each of which can be taken for unknown.
    assert result["false_negatives"]["judged_pass"] <= result["false_negatives"]["judged"]
    assert result["false_negatives"]["hidden_pass"] <= result["false_negatives"]["hidden"] <= 2
