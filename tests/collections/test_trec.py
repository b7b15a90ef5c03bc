"""Run and qrels files: read as trec_eval reads them, refused with file and line when they are not that."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from FlagEmbedding.collections.trec import find_qrels, qrels_names, ranking, read_qrels, read_run, relevant, write_run
from FlagEmbedding.utils.errors import DataError


def test_a_run_is_read_whatever_separates_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text("q1 Q0 d1 1 0.5 Faiss\nq1\tQ0\td2\t2\t-1e-3\tFaiss\n\nq2 Q0 d1 1 7 x\r\n", encoding="utf-8")
    expected = {"q1": {"d1": 0.5, "d2": -0.001}, "q2": {"d1": 7.0}}
    assert read_run(path) == expected
    with gzip.open(tmp_path / "run.txt.gz", "wt", encoding="utf-8") as out:
        out.write(path.read_text())
    assert read_run(tmp_path / "run.txt.gz") == expected


def test_qrels_keep_judged_non_relevant_passages(tmp_path: Path) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text("q1\tQ0\t12#3\t1\nq1\tQ0\t12#4\t0\nq2\tQ0\t7#0\t2\n", encoding="utf-8")
    assert read_qrels(path) == {"q1": {"12#3": 1, "12#4": 0}, "q2": {"7#0": 2}}


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("q Q0 d 1 0.5 x\nq Q0 d2 2 0.4\n", 2, "5 columns"),
        ("q Q0 d 1 0.5 x extra\n", 1, "7 columns"),
        ("q Q0 d 1 high x\n", 1, "'high'"),
        ("q Q0 d 1 nan x\n", 1, "'nan'"),
        ("q Q0 d 1 inf x\n", 1, "'inf'"),
        ("q Q0 d 1 1_0 x\n", 1, "'1_0'"),
        ("q Q0 d 1 ٣ x\n", 1, "'٣'"),
        ("q Q0 d 1 0.5 x\nr Q0 d 1 0.5 x\nq Q0 d 2 0.4 x\n", 3, "twice"),
    ],
)
def test_a_broken_run_is_refused_with_its_line(tmp_path: Path, content: str, line: int, words: str) -> None:
    path = tmp_path / "run.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"run.txt:{line}: .*{words}"):
        read_run(path)


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        ("query-id\tcorpus-id\tscore\nq\td\t1\n", ":1", "3 columns"),
        ("q 0 d yes\n", ":1", "'yes'"),
        ("q 0 d 1.5\n", ":1", "'1.5'"),
        ("q 0 d 1\nq 0 e \u00b2\n", ":2", "'\u00b2'"),
        ("q 0 d 1_0\n", ":1", "'1_0'"),
        (f"q 0 d {10**29}\n", ":1", "whole number of -2 to 1000 as grade"),
        ("q 0 d 1\nq 0 e -3\n", ":2", "expected a grade of -2 to 1000, found '-3'"),
        ("q 0 d 1\nq 0 e 1001\n", ":2", "found '1001'"),
        (f"q 0 d {'9' * 5000}\n", ":1", "grade"),
        ("q 0 d 1\nq 0 d 0\n", ":2", "twice"),
        ("", "", "empty"),
        ("q 0 d 0\nr 0 d 0\n", "", "no grade above 0"),
    ],
)
def test_broken_qrels_are_refused(tmp_path: Path, content: str, where: str, words: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"qrels.tsv{where}: .*{words}"):
        read_qrels(path)


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run file"):
        read_run(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no such qrels file"):
        read_qrels(tmp_path / "absent.tsv")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="empty"):
        read_run(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"q Q0 d\xe9 1 0.5 x\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_run(tmp_path / "latin.txt")
    with gzip.open(tmp_path / "whole.gz", "wt") as out:
        out.writelines(f"q{i} Q0 d{i} 1 0.5 x\n" for i in range(5000))
    (tmp_path / "cut.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"cut\.gz:\d+: the run file cannot be read further"):
        read_run(tmp_path / "cut.gz")
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path)


def test_ties_go_to_the_greater_docid_in_single_precision() -> None:
    assert ranking({"a": 0.5, "c": 0.5, "b": 0.5, "z": 0.1}) == ["c", "b", "a", "z"]
    # 1 and 1 + 1e-9 are one number to trec_eval, which keeps scores as C floats.
    assert ranking({"a": 1.000000001, "b": 1.0}) == ["b", "a"]
    assert ranking({"a": 1.001, "b": 1.0}) == ["a", "b"]


def test_qrels_are_found_by_every_known_name(tmp_path: Path) -> None:
    published = "miracl-v1.0-ko_qrels_qrels.miracl-v1.0-ko-dev.tsv"
    assert qrels_names("ko", "dev")[0] == published
    for name in reversed(qrels_names("ko", "dev")):  # the later written one comes first in the order
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("q 0 d 1\n")
        assert find_qrels(tmp_path, "ko") == path
    assert find_qrels(tmp_path, "ko") == tmp_path / published
    assert find_qrels(tmp_path, "fa") is None
    assert find_qrels(tmp_path / published, "fa") == tmp_path / published
    with pytest.raises(DataError, match="one file for several languages"):
        find_qrels(tmp_path / published, "fa", only_language=False)


def test_qrels_of_beir_only_where_they_are_expected(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq\td\t1\nq\te\t-1\n", encoding="utf-8")
    assert read_qrels(path, beir=True) == {"q": {"d": 1, "e": -1}}
    path.write_text("q d score\nq\td\t1\nquery-id\tcorpus-id\tscore\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"test.tsv:3: expected a whole number .* \(column 3\), found 'score'"):
        read_qrels(path, beir=True)
    path.write_text("q 0 d 1000\nq 0 e +2\n", encoding="utf-8")
    assert read_qrels(path, beir=True) == {"q": {"d": 1000, "e": 2}}


def test_relevant_is_what_is_judged_above_zero_in_file_order() -> None:
    assert relevant({"c": 1, "a": 0, "b": 3, "d": -1}) == ["c", "b"]


def test_a_run_is_written_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ko.txt"
    found = [("q2", [("d1", 0.5), ("d#2", 0.1234567)]), ("q1", [("d1", -1.0)]), ("empty", [])]
    write_run(path, found)
    assert path.read_text() == ("q2 Q0 d1 1 0.500000 Faiss\nq2 Q0 d#2 2 0.123457 Faiss\nq1 Q0 d1 1 -1.000000 Faiss\n")
    assert read_run(path) == {"q2": {"d1": 0.5, "d#2": 0.123457}, "q1": {"d1": -1.0}}
    write_run(path, [("q", [("d", 1.0)])], tag="mine")
    assert path.read_text() == "q Q0 d 1 1.000000 mine\n"


def test_a_long_line_is_cut_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "run.txt"
    path.write_text("x" * 500)
    with pytest.raises(DataError, match=f"found 1 columns in '{'x' * 57}\\.\\.\\.'$"):
        read_run(path)
    path.write_text("y" * 60)
    with pytest.raises(DataError, match=f"found 1 columns in '{'y' * 60}'$"):
        read_run(path)
