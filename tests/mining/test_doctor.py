"""The doctor against planted faults, against figures computed by hand, and killed in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from FlagEmbedding import FlagModel
from FlagEmbedding.mining.doctor import examine as examination
from FlagEmbedding.mining.doctor.command import main
from FlagEmbedding.mining.doctor.report import length_figures
from FlagEmbedding.mining.doctor.scan import Row
from FlagEmbedding.mining.doctor.scores import Histogram, Scores, score_row

ROWS = [
    {"query": "q1", "pos": ["P1"], "neg": ["N1", "N2"], "neg_q": ["n1", ""]},
    {"query": "q2", "pos": ["P2", "p2 "], "neg": ["N1", "n1 "]},  # a positive and a negative twice
    {"query": "Q1", "pos": ["P3"], "neg": ["P1", "P2"]},  # row 1's query again; P1 answers it, P2 another
    {"query": "q1", "pos": ["P1"], "neg": ["N2", "N1"]},  # says what row 1 says
    {"query": "q4", "pos": ["q4"], "neg": ["Q4"], "pos_scores": [1.0]},
    {"query": "q5", "pos": ["P5"], "neg": ["N5"], "neg_q": [["q5", "x"]], "pos_scores": [1.0], "neg_scores": [0.5]},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def examine(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_planted_faults_are_counted_and_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    code, page, _ = examine(capsys, tmp_path, "--train_group_size", 3)
    assert code == 0
    record = json.loads((tmp_path / "reports/doctor/report.json").read_text())
    assert {name: f["count"] for name, f in record["findings"].items()} == {
        "repeated_row": 1, "repeated_query": 2, "repeated_positive": 1, "repeated_negative": 1, "false_negative": 2,
        "negative_is_query": 1, "positive_is_query": 1, "own_query_as_neg_q": 1, "too_few_negatives": 2,
        "one_sided_scores": 1,
    }  # fmt: skip
    places = {name: f["places"] for name, f in record["findings"].items()}
    assert places["repeated_row"] == [f"{data}:4: q1"] and places["repeated_query"] == [
        f"{data}:3: Q1",
        f"{data}:4: q1",
    ]
    assert places["repeated_negative"] == [f"{data}:2: neg[1] n1"]
    # Q4 is its row's positive in another spelling, P1 is the positive of the same query in row 1.
    assert places["false_negative"] == [f"{data}:3: neg[0] P1", f"{data}:5: neg[0] Q4"]
    assert places["own_query_as_neg_q"] == [f"{data}:6: neg_q[0] q5"]
    counts = record["files"][str(data)]
    assert (counts["rows"], counts["negatives"], counts["with_query"], counts["queries"]) == (6, 10, 2, 3)
    assert (counts["known_answers"], counts["with_scores"]) == (1, 1)  # P2 answers q2
    assert "**2 negatives that answer the query" in page and f"`{data}:3: neg[0] P1`" in page
    assert (tmp_path / "reports/doctor/report.md").read_text() == page
    assert not (tmp_path / "reports/doctor/.work").exists()
    # The report lies in the training folder and is no training data.
    assert examine(capsys, tmp_path)[1].count("data.jsonl |") == 1


def test_bad_rows_are_named_the_others_examined_and_the_exit_code_says_so(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "data.jsonl", [ROWS[0], {"query": "x", "pos": [], "neg": ["N"]}, ROWS[1]])
    code, page, error = examine(capsys, data)
    assert code == 2 and f"{data}:2: pos is an empty list; give a list of at least one passage" in error
    assert f"`{data}:2: pos is an empty list" in page and "**1 rows or files cannot be read**" in page
    assert json.loads((tmp_path / "reports/doctor/report.json").read_text())["files"][str(data)]["rows"] == 2
    code, _, error = examine(capsys, tmp_path / "none.jsonl")
    assert code == 2 and "no such file" in error
    (tmp_path / "bad.jsonl").write_text("{}\n")
    code, _, error = examine(capsys, tmp_path / "bad.jsonl")
    assert code == 2 and "bad.jsonl:1" in error


def test_the_first_ten_places_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data.jsonl", [{"query": "q", "pos": ["P"], "neg": ["N"]}] * 13)
    examine(capsys, data, "--report_dir", tmp_path / "r")
    found = json.loads((tmp_path / "r/report.json").read_text())["findings"]["repeated_row"]
    assert found == {"count": 12, "places": [f"{data}:{line}: q" for line in range(2, 12)]}


def test_more_texts_than_one_page_in_roles_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2,100 different texts beside ones that stand in several places and roles."""
    rows = [
        {"query": "same", "pos": ["same"], "neg": ["same", f"n{i:04}"], "neg_q": ["", "same"]} for i in range(2_100)
    ]
    data = write(tmp_path / "data.jsonl", rows)
    examine(capsys, data, "--report_dir", tmp_path / "r")
    sizes = json.loads((tmp_path / "r/report.json").read_text())["lengths"]
    assert {role: found["texts"] for role, found in sizes.items()} == {
        "query": 2_100, "pos": 2_100, "neg": 4_200, "neg_q": 2_100,
    }  # fmt: skip
    assert (sizes["neg"]["mean"], sizes["neg"]["50%"], sizes["neg"]["max"]) == (4.5, 4, 5)


def test_totals_are_those_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl", ROWS[2:])
    page = examine(capsys, tmp_path)[1]
    record = json.loads((tmp_path / "reports/doctor/report.json").read_text())
    assert record["neg_q"] == {"negatives": 10, "with_query": 2, "queries": 3}
    assert "8 (80.00 %) negatives have no neg_q" in page and "1 rows that say what an earlier row says" in page


def test_what_others_wrote_acts_neither_in_the_page_nor_on_the_terminal(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "q <img src=x> [a](http://evil) \x1b[31m\u202e"
    rows = [{"query": query, "pos": ["`P`"], "neg": ["`P`", "a|b"]}, {"query": query, "pos": ["`P`"], "neg": ["N"]}]
    write(tmp_path / "data.jsonl", rows)
    code, page, _ = examine(capsys, tmp_path / "data.jsonl", "--model", tiny_model_dir)
    assert code == 0 and "\x1b" not in page and "\u202e" not in page
    assert "neg[0] `P`" in page and f"`` {tmp_path / 'data.jsonl'}:1: neg[0] `P` ``" in page
    line = next(line for line in page.splitlines() if "&lt;img" in line)
    assert "<img" not in line and "[a\\](http" in line and "\\\\x1b[31m\\\\u202e" in line
    assert "a\\|b" in page or "\\`P\\`" in page


def test_a_file_of_somebody_else_in_the_work_folder_stays(tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    (tmp_path / "report/.work").mkdir(parents=True)
    (tmp_path / "report/.work/photo.txt").write_text("mine")
    assert examine(capsys, data, "--report_dir", tmp_path / "report")[0] == 0
    assert [path.name for path in (tmp_path / "report/.work").iterdir()] == ["photo.txt"]


def test_clean_data_is_clean(sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, page, _ = examine(capsys, sample_dir / "train", "--report_dir", tmp_path / "report")
    assert code == 0 and "Nothing stands out." in page and "Tokens, and what is cut off, need a tokenizer" in page


def test_scores_and_lengths_agree_with_figures_computed_by_hand(
    sample_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys
) -> None:
    rows = [json.loads(line) for line in (sample_dir / "train/fa_CLPL_train_data.jsonl").open()][:30]
    for i, row in enumerate(rows):
        row["pos"] += rows[(i + 9) % 30]["pos"][:1] * (i % 3 == 0)
        row["neg_q"] = ["" if j == 1 else q for j, q in enumerate(row["neg_q"])]
    data = write(tmp_path / "data.jsonl", rows)
    words = ["--query_max_len", 16, "--passage_max_len", 40, "--query_instruction_for_retrieval", "سؤال: "]
    code, page, _ = examine(capsys, data, "--model", tiny_model_dir, "--temperature", 0.05, *words)
    assert code == 0
    record = json.loads((tmp_path / "reports/doctor/report.json").read_text())
    scores = record["scores"]

    model = FlagModel(str(tiny_model_dir), query_instruction_for_retrieval="سؤال: ")
    positive, negative, margins, losses, penalties = [], [], [], [], []
    for row in rows:
        q = model.encode_queries([row["query"]], max_length=16)[0]
        p, n = model.encode_corpus(row["pos"], max_length=40) @ q, model.encode_corpus(row["neg"], max_length=40) @ q
        positive += p.tolist()
        negative += n.tolist()
        margins.append(p.min() - n)
        losses.append(np.mean([np.log(1 + np.exp((n - one) / 0.05).sum()) for one in p]))
        for text, query in zip(row["neg"], row["neg_q"], strict=True):
            if query:
                pair = model.encode_corpus([text], max_length=40)[0], model.encode_queries([query], max_length=40)[0]
                penalties.append(1 - pair[0] @ pair[1])
    flat = np.concatenate(margins)
    for name, values in (("positive", positive), ("negative", negative), ("margin", flat), ("penalty", penalties)):
        assert scores[name]["count"] == len(values)
        assert scores[name]["mean"] == pytest.approx(np.mean(values), abs=2e-5)
        for quantile, share in (("min", 0.0), ("25%", 0.25), ("50%", 0.5), ("99%", 0.99), ("max", 1.0)):
            exact = np.quantile(values, share, method="inverted_cdf")
            assert scores[name][quantile] == pytest.approx(exact, abs=0.0026), (name, quantile)
    assert scores["negatives_above_positive"] == int((flat < 0).sum()) > 0
    assert scores["rows_with_one"] == sum(bool((m < 0).any()) for m in margins)
    assert scores["mean_loss"] == pytest.approx(np.mean(losses), abs=2e-3)
    assert scores["solved_rows"] == sum(loss <= -np.log(0.99) for loss in losses)
    worst = sorted((m.min(), f"{data}:{i + 1}: neg[{m.argmin()}]") for i, m in enumerate(margins))[:10]
    assert [where for _, where, _, _ in scores["suspects"]] == [where for _, where in worst]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for role, limit in (("query", 16), ("pos", 40), ("neg", 40), ("neg_q", 40)):
        texts = [t for row in rows for t in ([row["query"]] if role == "query" else row[role]) if t]
        sizes = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        found = record["lengths"][role]
        assert (found["texts"], found["max"], found["over"]) == (len(sizes), max(sizes), sum(s > limit for s in sizes))
        assert found["50%"] == np.quantile(sizes, 0.5, method="inverted_cdf")
    assert "are cut off at --passage_max_len 40" in page
    for picture in ("scores.png", "lengths.png"):
        assert (tmp_path / "reports/doctor" / picture).read_bytes().startswith(b"\x89PNG")


def test_solved_rows_are_those_that_teach_nothing(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    """The query's own text as positive has cosine 1: at a low temperature such a row is solved."""
    rows = [{"query": f"پرسش {i} است", "pos": [f"پرسش {i} است"], "neg": ["The Han river", "गंगा नदी"]} for i in range(7)]
    rows += [{"query": "x", "pos": ["The Han river"], "neg": ["The Han river "]}]  # the same vector: never solved
    write(tmp_path / "data.jsonl", rows)
    words = ["--model", tiny_model_dir, "--temperature", 0.001]
    assert examine(capsys, tmp_path, *words)[0] == 0
    assert json.loads((tmp_path / "reports/doctor/report.json").read_text())["scores"]["solved_rows"] == 7


def test_a_row_is_solved_from_99_percent_on_and_a_long_text_is_cut_beyond_the_limit() -> None:
    """Rows whose positive gets 98 % and 99.5 % of its group; lengths at and over the limit."""
    scores = Scores()
    for share in (0.98, 0.995):
        cosine = np.log(share / (1 - share))  # at temperature 1 against a negative of cosine 0
        vectors = np.array([[1, 0], [cosine, 0], [0, 1]], dtype=np.float32)
        score_row(Row("", 0, [1], [2], []), vectors, 1.0, scores)
    assert (scores.rows, scores.solved) == (2, 1)
    figures = length_figures(
        {"query": Counter({4: 3, 5: 1}), "pos": Counter({5: 2, 6: 1})}, {"query_max_len": 4, "passage_max_len": 5}
    )
    assert (figures["query"]["over"], figures["pos"]["over"]) == (1, 1)
    assert figures["query"] == {"texts": 4, "mean": 4.2, "50%": 4, "90%": 5, "99%": 5, "max": 5, "limit": 4, "over": 1}


@pytest.mark.parametrize("before", ["other texts", "other lengths"])
def test_vectors_of_another_command_are_not_taken_up(
    before: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run that ended early left behind serves the same command alone."""
    rows = [{**row, "pos": [f"runs through the city {i} of Seoul"]} for i, row in enumerate(ROWS)]
    data = write(tmp_path / "data.jsonl", rows[::-1] if before == "other texts" else rows)
    words = [data, "--model", tiny_model_dir, "--report_dir"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination, "plot_lengths", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cut = ["--passage_max_len", 3] if before == "other lengths" else []
        assert examine(capsys, *words, tmp_path / "left", *cut)[0] == 130
    assert (tmp_path / "left/.work/vectors.f32").stat().st_size
    write(data, rows)
    assert [examine(capsys, *words, tmp_path / name)[0] for name in ("left", "fresh")] == [0, 0]
    left, fresh = (json.loads((tmp_path / name / "report.json").read_text())["scores"] for name in ("left", "fresh"))
    assert left == fresh


def test_a_sample_of_rows_is_the_seeds(tiny_model_dir: Path, sample_dir: Path, tmp_path: Path, capsys) -> None:
    pages = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--model", tiny_model_dir, "--sample_rows", 9, "--seed", seed, "--report_dir", tmp_path / name]
        pages.append(examine(capsys, sample_dir / "train", *words)[1])
        record = json.loads((tmp_path / name / "report.json").read_text())
        assert record["scores"]["rows"] == 9 == record["sample_rows"]
    assert pages[0] == pages[1] != pages[2]


def test_histograms_count_what_lies_beyond_their_ends() -> None:
    histogram = Histogram(-1, 1)
    histogram.add(np.array([-1.5, 1.0, 1.2, 0.0]))
    assert histogram.count == 4 and (histogram.counts[0], histogram.counts[-1]) == (1, 2)
    assert (histogram.quantile(0), histogram.quantile(1)) == (-0.9975, 0.9975)


def test_histograms_give_counts_means_and_quantiles() -> None:
    values = np.random.default_rng(3).normal(0.1, 0.2, 5_000)
    histogram = Histogram(-2, 2)
    for part in np.split(values, 10):
        histogram.add(part)
    assert histogram.count == 5_000 and histogram.below_zero == (values < 0).sum()
    for share in (0.0, 0.1, 0.5, 0.97, 1.0):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert histogram.quantile(share) == pytest.approx(exact, abs=0.0026)
    edges, counts = histogram.coarse()
    reference, _ = np.histogram(values, edges)
    assert counts.sum() == 5_000 and np.abs(counts - reference).max() <= 2  # values on an edge may go either way


def test_kill_9_while_embedding_and_the_identical_report(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"query": f"질문 {i}", "pos": [f"문단 {i}"], "neg": [f"다른 {i}", f"또 {i}"]} for i in range(900)]
    data = write(tmp_path / "data.jsonl", rows)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [str(data), "--model", str(tiny_model_dir), "--report_dir"]
    assert main([*words, str(whole)]) == 0
    start = [sys.executable, "-m", "FlagEmbedding.mining.doctor", *words, str(killed)]
    vectors, window = killed / ".work/vectors.f32", 2_048 * 32 * 4
    worker = subprocess.Popen(
        [*start, "--report_dir", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while worker.poll() is None and not (vectors.exists() and vectors.stat().st_size >= window):
        time.sleep(0.001)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert vectors.stat().st_size < 3_600 * 32 * 4 and not (killed / "report.md").exists()
    with vectors.open("ab") as stream:
        stream.write(b"torn")  # as a kill in the middle of a write leaves it
    subprocess.run(start, check=True, capture_output=True)
    for name in ("report.md", "scores.png", "lengths.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m", "--tokenizer", "t"], "brings its own tokenizer"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--query_max_len", "0"], "--query_max_len must be at least 1"),
        (["--tokenizer", "/nowhere"], "no tokenizer can be loaded"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, capsys, words: list[str], message: str) -> None:
    data = write(tmp_path / "data.jsonl", ROWS)
    code, _, error = examine(capsys, data, *words)
    assert code == 2 and message in error and error.count("error:") == 1
