"""Step 2: the published command, its result file, its comparison, and one clear line for everything wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from FlagEmbedding.evaluation.__main__ import eval_dense
from FlagEmbedding.utils.cli import entry_point
from tests.evaluation.conftest import cells
from tests.evaluation.runs import NAME, PUBLISHED, QUERIES, RECORD, REPOSITORY, ndcg, step2, write_run


def test_the_published_command_as_a_process(work: Path) -> None:
    script = REPOSITORY / "evaluation" / "step2-eval_dense_mldr.py"
    answer = subprocess.run(
        [sys.executable, str(script), *PUBLISHED.split()], cwd=work, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads((work / f"eval_results/{NAME}.json").read_text())
    expected = {"ndcg@5": pytest.approx(ndcg(1, 5)), "ndcg@10": pytest.approx(ndcg(1, 10))}
    assert result["results"] == {"ko": expected, "average": expected}
    assert result["model"] == "CreaLabs/bge-m3-fa-CLPL-outputMoE"
    assert (result["pooling_method"], result["normalize_embeddings"]) == ("cls", True)
    assert f"{100 * ndcg(1, 5):.1f}" in answer.stdout
    assert result["provenance"]["versions"]["ir_measures"]
    assert result["arguments"]["metrics"] == ["ndcg@5", "ndcg@10"]
    assert "nDCG@10" in (work / f"eval_results/{NAME}.md").read_text()


def test_average_is_the_mean_over_languages_and_missing_queries_count(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(work / f"search_results/{NAME}/fa.txt", 1, list(QUERIES)[:6])
    assert step2("--languages", "ko", "fa", "--metrics", "ndcg@10", "recall@50") == 0
    results = json.loads((work / f"eval_results/{NAME}.json").read_text())["results"]
    assert results["fa"]["ndcg@10"] == pytest.approx(ndcg(1, 10) / 2)
    assert results["average"]["ndcg@10"] == pytest.approx(0.75 * ndcg(1, 10))
    assert "6 of 12 judged queries have no results and count as 0" in caplog.text
    assert "Recall@50 on a run that is 20 deep" in caplog.text


def test_what_step1_recorded_goes_into_the_result(work: Path) -> None:
    (work / f"search_results/{NAME}/ko.json").write_text(json.dumps(RECORD))
    assert step2() == 0
    run = json.loads((work / f"eval_results/{NAME}.json").read_text())["runs"]["ko"]
    assert (run["model_sha256"], run["corpus_passages"], run["with_title"]) == ("abc", 1000, False)
    assert (run["query_instruction"], run["hits"]) == ("query: ", 20)


def test_every_model_has_its_own_scores_settings_and_origin(work: Path) -> None:
    (work / f"search_results/{NAME}/ko.json").write_text(json.dumps(RECORD))
    other = {"model": "xyz", "pooling": "mean", "normalize_embeddings": False, "dtype": "bf16"}
    arguments = {**RECORD["arguments"], "index_type": "HNSW32"}
    (work / "search_results/base/ko.json").write_text(json.dumps({**RECORD, "encoder": other, "arguments": arguments}))
    words = PUBLISHED.replace("--pooling_method cls --normalize_embeddings True", "").split()
    assert entry_point(eval_dense)([*words, "--encoder", NAME, "base"]) == 0
    for name, rank, encoder, kind in ((NAME, 1, RECORD["encoder"], "Flat"), ("base", 4, other, "HNSW32")):
        result = json.loads((work / f"eval_results/{name}.json").read_text())
        assert result["results"]["ko"]["ndcg@10"] == pytest.approx(ndcg(rank, 10))
        for key, recorded in (("pooling_method", "pooling"), ("normalize_embeddings", "normalize_embeddings")):
            assert result[key] == encoder[recorded]
        origin = result["runs"]["ko"]
        assert (origin["model_sha256"], origin["index_type"]) == (encoder["model"], kind)


def test_without_a_record_the_index_manifest_says_it(work: Path) -> None:
    folder = work / f"corpus-index/{NAME}/ko"
    folder.mkdir(parents=True)
    identity = {"model": "def", "pooling": "mean", "normalize_embeddings": True, "with_title": True}
    (folder / "manifest.json").write_text(json.dumps({"identity": identity, "rows": 7}))
    assert step2("--index_save_dir", "corpus-index", "--pooling_method", "mean") == 0
    run = json.loads((work / f"eval_results/{NAME}.json").read_text())["runs"]["ko"]
    assert (run["model_sha256"], run["corpus_passages"], run["with_title"]) == ("def", 7, True)
    assert step2("--index_save_dir", "corpus-index") == 2  # the published command says cls


def broken(work: Path, what: str) -> list[str]:
    """Break something; the words to add to the command."""
    run = work / f"search_results/{NAME}/ko.txt"
    qrels = work / "qrels/miracl-v1.0-ko_qrels_qrels.miracl-v1.0-ko-dev.tsv"
    if what == "no run":
        run.unlink()
    elif what == "empty run":
        run.write_text("")
    elif what == "broken run":
        run.write_text("0-0 Q0 a 1 high Faiss\n")
    elif what == "run of others":
        write_run(run, 1, ["other-1", "other-2"])
    elif what == "no qrels":
        qrels.unlink()
    elif what == "broken qrels":
        qrels.write_text("0-0\ta\t1\n")
    elif what == "one qrels file for two":
        return ["--languages", "ko", "fa", "--qrels_dir", str(qrels)]
    elif what == "record":
        run.with_suffix(".json").write_text("{}")
    elif what in ("pooling", "normalization", "split"):
        run.with_suffix(".json").write_text(json.dumps(RECORD))
        return {
            "pooling": ["--pooling_method", "mean"],
            "normalization": ["--normalize_embeddings", "False"],
            "split": ["--split", "testB", "--qrels_dir", str(qrels)],
        }[what]
    return {
        "measure": ["--metrics", "ndgc@10"],
        "no cutoff": ["--metrics", "recall"],
        "language": ["--languages", "xx"],
        "one to compare": ["--compare"],
        "same name": ["--encoder", "a/base", "b/base", "--compare"],
        "unknown flag": ["--metric", "ndcg@10"],
        "resamples": ["--resamples", "3"],
    }.get(what, [])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no run", "ko.txt: no such run file; run step1-search_results.py"),
        ("empty run", "the run file is empty"),
        ("broken run", "ko.txt:1: expected a finite number as score (column 5), found 'high'"),
        ("run of others", "no judged query is in the run"),
        ("no qrels", "no qrels of ko; expected miracl-v1.0-ko_qrels_qrels.miracl-v1.0-ko-dev.tsv"),
        ("broken qrels", "dev.tsv:1: expected 'qid 0 docid grade', found 3 columns"),
        ("one qrels file for two", "one file for several languages"),
        ("record", "not a record of step 1"),
        ("pooling", "--pooling_method mean: the run was made with cls"),
        ("normalization", "--normalize_embeddings False: the run was made with True"),
        ("split", "--split testB: the run was made with dev"),
        ("measure", "--metrics ndgc@10: expected nDCG@k"),
        ("no cutoff", "--metrics recall: a cutoff of 1 or more is missing"),
        ("language", "--languages xx: not in MIRACL"),
        ("one to compare", "--compare needs two or more models"),
        ("same name", "two models are called 'base'"),
        ("unknown flag", "unrecognized arguments: --metric"),
        ("resamples", "--resamples 3: give 100 or more"),
    ],
)
def test_everything_wrong_is_one_line_and_no_result(
    work: Path, what: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    added = broken(work, what)
    assert step2(*added) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert "Traceback" not in error
    assert not (work / "eval_results").exists()


def test_an_unwritable_result_folder(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "eval_results").write_text("a file")
    assert step2() == 2
    assert "the results cannot be written there" in capsys.readouterr().err


def test_compare_two_models(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / f"search_results/{NAME}/ko.txt").write_text((work / f"search_results/{NAME}/ko.txt").read_text())
    words = ["--encoder", "base", NAME, "--compare", "--languages", "ko", "fa", "--data_dir", "data", "--metrics"]
    assert step2(*words, "ndcg@5", "ndcg@10", "recall@20") == 0
    folder = work / f"eval_results/base_vs_{NAME}"
    printed = capsys.readouterr().out
    assert str(folder.relative_to(work) / "comparison.png") in printed
    found = json.loads((folder / "comparison.json").read_text())
    assert len(found["comparisons"]) == 9
    ko = found["comparisons"][0]
    assert (ko["language"], ko["measure"], ko["queries"]) == ("ko", "ndcg@5", 12)
    assert ko["difference"] == pytest.approx(ndcg(1, 5) - ndcg(4, 5))
    assert ko["p_value"] == pytest.approx(2 / 2**12)  # all twelve gained: the two extreme sign patterns
    assert ko["low"] < ko["difference"] < ko["high"]
    assert found["results"]["base"]["average"]["ndcg@5"] == pytest.approx(ndcg(4, 5))
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "질문 0 \\| 한강" in text  # a cell holds no bare bar
    assert "first hit of base (`1#0`): passage 1" in text
    assert "relevant (`0-0#right`): 답 0-0" in text
    assert "No query lost" in text
    lines = (folder / "per_query.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 25
    header, first = lines[0].split("\t"), lines[1].split("\t")
    row = dict(zip(header, first, strict=True))
    assert (row["language"], row["qid"], row["query"]) == ("ko", "0-0", "질문 0 | 한강")
    assert (row["first_relevant:base"], row[f"first_relevant:{NAME}"]) == ("4", "1")
    assert float(row["ndcg@5:base"]) == pytest.approx(1 / np.log2(5), abs=1e-6)
    assert (float(row[f"ndcg@5:{NAME}"]), float(row[f"recall@20:{NAME}"]), float(row["recall@20:base"])) == (1, 1, 1)
    assert float(row["ndcg@10:base"]) == float(row["ndcg@5:base"])


def test_the_chart_is_drawn_and_repeats(work: Path) -> None:
    words = ["--encoder", "base", NAME, "--compare", "--languages", "ko"]
    assert step2(*words, "--compare_save_dir", "one") == step2(*words, "--compare_save_dir", "two") == 0
    for name in ("comparison.png", "per_query.tsv", "comparison.md"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()
    picture = matplotlib.image.imread(work / "one" / "comparison.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 600
    assert 0.05 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.6  # ink, but not all of it


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("index", "with_title", True, "with_title True, {} with False"),
        ("index", "rows", 900, "corpus_passages 900, {} with 1000"),
        ("index", "max_passage_length", 64, "max_passage_length 64, {} with 512"),
        ("arguments", "hits", 5, "hits 5, {} with 20"),
    ],
)
def test_different_conditions_are_pointed_out(
    work: Path, caplog: pytest.LogCaptureFixture, part: str, key: str, value: object, said: str
) -> None:
    (work / f"search_results/{NAME}/ko.json").write_text(json.dumps(RECORD))
    other = {**RECORD, part: {**RECORD[part], key: value}}
    (work / "search_results/base/ko.json").write_text(json.dumps(other))
    assert step2("--encoder", "base", NAME, "--compare", "--resamples", "100") == 0
    lines = [record.getMessage() for record in caplog.records if "not of the models alone" in record.getMessage()]
    assert lines == [f"ko: base was made with {said.format(NAME)}: the comparison is not of the models alone"]


def test_conditions_are_compared_for_every_language_and_model(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    for lang in ("ko", "fa"):
        write_run(work / f"search_results/third/{lang}.txt", 2)
        for name in ("base", NAME, "third"):
            (work / f"search_results/{name}/{lang}.json").write_text(json.dumps(RECORD))
    (work / "search_results/third/fa.json").write_text(
        json.dumps({**RECORD, "arguments": {**RECORD["arguments"], "hits": 5}})
    )
    (work / f"search_results/{NAME}/ko.json").unlink()  # another tool's run: nothing is known of it
    words = ["--encoder", "base", NAME, "third", "--languages", "ko", "fa", "--compare", "--resamples", "100"]
    assert step2(*words) == 0
    lines = [record.getMessage() for record in caplog.records if "not of the models alone" in record.getMessage()]
    assert lines == ["fa: base was made with hits 20, third with 5: the comparison is not of the models alone"]


def test_what_the_result_says_without_a_record(work: Path) -> None:
    words = PUBLISHED.replace("--pooling_method cls --normalize_embeddings True", "").split()
    assert entry_point(eval_dense)(words) == 0
    result = json.loads((work / f"eval_results/{NAME}.json").read_text())
    assert (result["pooling_method"], result["normalize_embeddings"]) == ("cls", True)  # as published
    assert result["runs"] == {"ko": dict.fromkeys(result["runs"]["ko"])}
    made = {**RECORD["encoder"], "pooling": "mean", "normalize_embeddings": False}
    (work / f"search_results/{NAME}/ko.json").write_text(json.dumps({**RECORD, "encoder": made}))
    assert entry_point(eval_dense)(words) == 0
    result = json.loads((work / f"eval_results/{NAME}.json").read_text())
    assert (result["pooling_method"], result["normalize_embeddings"]) == ("mean", False)
    origin = result["runs"]["ko"]
    assert (origin["max_passage_length"], origin["index_type"], origin["dtype"]) == (512, "Flat", "fp32")


def test_three_models(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(work / "search_results/third/ko.txt", 2)
    assert step2("--encoder", "base", NAME, "third", "--compare", "--resamples", "200") == 0
    printed = capsys.readouterr().out
    assert printed.count("| third") == 4  # against base and against the other, on two measures
    folder = work / f"eval_results/base_vs_{NAME}_third"
    assert (folder / "comparison.png").exists()
    header, _, line = cells((folder / "comparison.md").read_text(encoding="utf-8"))[:3]
    expected = {
        f"{label} {name}": f"{100 * ndcg(rank, cutoff):.1f}"
        for label, cutoff in (("nDCG@5", 5), ("nDCG@10", 10))
        for name, rank in (("base", 4), (NAME, 1), ("third", 2))
    }
    assert dict(zip(header, line, strict=True)) == {"language": "ko", "queries": "12", **expected}


def test_the_passages_that_are_shown_are_those_of_the_language(work: Path) -> None:
    write_run(work / f"search_results/{NAME}/fa.txt", 1, list(QUERIES)[8:])  # others gain than in Korean, and some lose
    for path in work.glob("data/miracl-corpus-v1.0-*/docs-0.jsonl"):
        lang = path.parent.name[-2:]
        path.write_text(path.read_text(encoding="utf-8").replace("\\ub2f5", lang), encoding="utf-8")
    words = ["--encoder", "base", NAME, "--compare", "--languages", "ko", "fa", "--data_dir", "data"]
    assert step2(*words, "--resamples", "100", "--compare_save_dir", "out") == 0
    text = (work / "out/comparison.md").read_text(encoding="utf-8")
    shown = re.findall(r"- (\w\w) (\d+-0): 질문 (\d+) \| 한강\n    - relevant \(`(.*?)#right`\): (.*)", text)
    assert len(shown) == 9  # three gained in either language, three lost in Persian
    assert {lang for lang, *_ in shown} == {"ko", "fa"}
    for lang, qid, number, docid, passage in shown:
        assert (f"{number}-0", docid, passage) == (qid, qid, f"{lang} {qid}")


@pytest.mark.parametrize(("passages", "said"), [(5, False), (6, True), (1000, True), (None, True)])
def test_more_hits_are_asked_for_only_where_there_are_more(
    work: Path, caplog: pytest.LogCaptureFixture, passages: int | None, said: bool
) -> None:
    write_run(work / f"search_results/{NAME}/ko.txt", 1, depth=5)
    if passages is not None:
        record = {**RECORD, "index": {**RECORD["index"], "rows": passages}}
        (work / f"search_results/{NAME}/ko.json").write_text(json.dumps(record))
    assert step2("--metrics", "ndcg@10", "ndcg@5") == 0
    assert ("nDCG@10 on a run that is 5 deep; give step 1 more --hits" in caplog.text) == said
    assert "nDCG@5 on a run" not in caplog.text


def test_a_query_with_few_hits_makes_no_run_shallow(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = work / f"search_results/{NAME}/ko.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[18:]))  # two of the first query's twenty
    assert step2("--metrics", "ndcg@10") == 0
    assert "give step 1 more --hits" not in caplog.text


def test_a_run_without_any_relevant_passage_is_pointed_out(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(work / f"search_results/{NAME}/ko.txt", 30)
    assert step2() == 0
    assert "no relevant passage of any query is in it" in caplog.text
    caplog.clear()
    write_run(work / f"search_results/{NAME}/ko.txt", 20)  # one in three has it at the last place
    assert step2() == 0
    assert "no relevant passage" not in caplog.text
