"""BEIR's layout and languages of one's own: the three steps give the numbers of MIRACL's layout of the same data."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from commands import STEPS, run_script

from tests.evaluation.conftest import make_passages, write_collection

LANG = "pt-br"
PASSAGES = make_passages(30)
QUERIES = {"q1": "river Seoul", "q2": "kimchi sea", "q3": "रिवर mountain"}
GRADES = [("q1", "0#0", 1), ("q1", "0#1", 0), ("q2", "2#1", 2), ("q3", "5#2", 1)]


def write_beir(folder: Path, splits: tuple[str, ...] = ("test",)) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": row["docid"], "title": row["title"], "text": row["text"]} for row in PASSAGES]
    asked = [{"_id": qid, "text": query} for qid, query in {**QUERIES, "other": "of another split"}.items()]
    for name, rows in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split in splits:
        lines = "".join(f"{qid}\t{docid}\t{grade}\n" for qid, docid, grade in GRADES)
        (folder / f"qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def miracl_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_collection(tmp_path_factory.mktemp("own"), LANG, PASSAGES, QUERIES)
    qrels = root / f"miracl-v1.0-{LANG}/qrels/qrels.miracl-v1.0-{LANG}-dev.tsv"
    qrels.parent.mkdir()
    qrels.write_text("".join(f"{qid} Q0 {docid} {grade}\n" for qid, docid, grade in GRADES))
    return root


@pytest.fixture(scope="module")
def beir_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("beir") / "data")


def steps(model: Path, data: Path, out: Path, *more: str, lang: str = LANG) -> dict:
    """Steps 0 to 2; the run and the scores."""
    words = ["--encoder", model, "--languages", lang, "--data_dir", data]
    for number, own in enumerate((
        ["--index_save_dir", out / "index"],
        ["--index_save_dir", out / "index", "--result_save_dir", out / "runs", "--hits", "30"],
        ["--search_result_save_dir", out / "runs", "--qrels_dir", out, "--eval_result_save_dir", out / "scores",
         "--metrics", "ndcg@30", "recall@5"],
    )):  # fmt: skip
        answer = run_script(STEPS[number], [*words, *own, *more])
        assert answer.returncode == 0, answer.stderr
    scores = json.loads((out / f"scores/{model.name}.json").read_text())
    return {"run": (out / f"runs/{model.name}/{lang}.txt").read_text(), "results": scores["results"]}


def test_both_layouts_give_the_same_run_and_scores(
    tiny_model_dir: Path, miracl_layout: Path, beir_layout: Path, tmp_path: Path
) -> None:
    expected = steps(tiny_model_dir, miracl_layout, tmp_path / "miracl")
    assert 0 < expected["results"][LANG]["ndcg@30"] < 1
    assert expected["run"].count("\n") == 3 * 30
    assert steps(tiny_model_dir, beir_layout, tmp_path / "beir", "--split", "test") == expected
    assert steps(tiny_model_dir, beir_layout, tmp_path / "default") == expected  # no dev there: test, with a line
    index = f"index/{tiny_model_dir.name}/{LANG}/index"
    assert (tmp_path / "miracl" / index).read_bytes() == (tmp_path / "beir" / index).read_bytes()


def test_packed_files_and_a_folder_for_each_language(tiny_model_dir: Path, beir_layout: Path, tmp_path: Path) -> None:
    for lang in ("xx", "scifact"):
        for path in [p for p in beir_layout.rglob("*") if p.is_file()]:
            target = tmp_path / "data" / lang / path.relative_to(beir_layout)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    words = ["--encoder", tiny_model_dir, "--languages", "xx", "scifact", "--data_dir", tmp_path / "data"]
    index = ["--index_save_dir", tmp_path / "index"]
    for number, own in enumerate((index, [*index, "--result_save_dir", tmp_path / "runs", "--split", "test"])):
        answer = run_script(STEPS[number], [*words, *own])
        assert answer.returncode == 0, answer.stderr
    runs = [(tmp_path / f"runs/{tiny_model_dir.name}/{lang}.txt").read_text() for lang in ("xx", "scifact")]
    assert runs[0] == runs[1] and runs[0].startswith("q1 Q0 ")


def test_dev_is_dev_where_beir_has_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data", ("dev", "test"))
    (data / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\nother\t0#0\t1\n")
    found = steps(tiny_model_dir, data, tmp_path / "out")
    assert {line.split()[0] for line in found["run"].splitlines()} == {"other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.copy(f / "corpus.jsonl", f / "x"), None),
        (lambda f: (f / "corpus.jsonl").write_text('{"_id": "a", "text": "x"}\n' * 2),
         "corpus.jsonl:2: docid 'a' was there before, at {f}/corpus.jsonl:1"),
        (lambda f: (f / "corpus.jsonl").write_text('{"_id": 5, "text": "x"}\n'),
         "corpus.jsonl:1: expected a string as '_id', found int"),
        (lambda f: (f / "corpus.jsonl").write_text('{"title": "t", "text": "x"}\n'), "'docid', which is missing"),
    ],
)  # fmt: skip
def test_a_corpus_that_cannot_be_used_is_one_line(
    tiny_model_dir: Path, tmp_path: Path, change: object, message: str | None
) -> None:
    data = write_beir(tmp_path / "data")
    change(data)
    words = ["--encoder", tiny_model_dir, "--languages", "xx", "--data_dir", data, "--index_save_dir", tmp_path / "i"]
    answer = run_script(STEPS[0], words)
    assert answer.returncode == (2 if message else 0), answer.stderr
    assert (message or "").replace("{f}", str(data)) in answer.stderr
    assert "Traceback" not in answer.stderr


def test_queries_that_cannot_be_used_are_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "data")
    words = ["--encoder", tiny_model_dir, "--languages", "xx", "--data_dir", data, "--index_save_dir", tmp_path / "i"]
    assert run_script(STEPS[0], words).returncode == 0
    whole = (data / "queries.jsonl").read_text()
    for more, message in (
        ('{"_id": "q2", "text": "again"}\n', "queries.jsonl:5: _id 'q2' was there before, in line 2"),
        ('{"_id": "q 9", "text": "again"}\n', "one word without white space"),
        ('{"_id": "q9", "text": "\\u200b"}\n', "queries.jsonl:5: no _id and text"),
        ('{"_id": "q9", "text": "\\ud83d"}\n', "queries.jsonl:5: half of a surrogate pair"),
    ):
        (data / "queries.jsonl").write_text(whole + more)
        answer = run_script(STEPS[1], [*words, "--result_save_dir", tmp_path / "runs"])
        assert answer.returncode == 2 and message in answer.stderr, answer.stderr
    (data / "queries.jsonl").write_text("".join(whole.splitlines(True)[1:]))
    answer = run_script(STEPS[1], [*words, "--result_save_dir", tmp_path / "runs"])
    assert answer.returncode == 2 and "query 'q1' is judged and not there" in answer.stderr


def test_own_languages_need_a_folder_and_a_name(tiny_model_dir: Path, tmp_path: Path, beir_layout: Path) -> None:
    words = ["--encoder", tiny_model_dir, "--index_save_dir", tmp_path / "i", "--languages"]
    for more, message in (
        (["xx"], "--languages xx: not in MIRACL; choose from"),
        (["xx", "--data_dir", tmp_path], "--languages xx: not in MIRACL, and nothing of it in --data_dir"),
        (["../xx", "--data_dir", beir_layout], "--languages ../xx: not in MIRACL"),
        (["xx", "yy", "--data_dir", beir_layout], "one BEIR folder for several languages"),
    ):
        answer = run_script(STEPS[0], [*words, *more])
        assert answer.returncode == 2 and message in answer.stderr, answer.stderr
    assert not (tmp_path / "i").exists()
    score = ["--encoder", "m", "--languages", "xx", "--qrels_dir", tmp_path]
    answer = run_script(STEPS[2], score)
    assert answer.returncode == 2 and "--languages xx: not in MIRACL" in answer.stderr
