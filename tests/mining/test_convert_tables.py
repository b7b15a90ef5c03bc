"""Tables of triples: columns by name, quotes that are not closed, encodings, counts; repeated ids; packed outputs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from FlagEmbedding.mining import convert, merge, sample


def triples(folder: Path, name: str, text: str | bytes) -> int:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["--format", "triples", "--input", folder / name, "--output_file", folder / "out.jsonl", "--overwrite"]
    return convert.main([str(word) for word in words])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


QPN = [{"query": "q", "pos": ["p"], "neg": ["n"]}]


@pytest.mark.parametrize(
    "header",
    ["query,positive,negative", "anchor,pos,neg", "Question,Answer,Hard Negative", "q,p,n", "QUERY,passage,negative_1"],
)
def test_known_names_say_what_columns_are(tmp_path: Path, header: str) -> None:
    assert triples(tmp_path, "a.csv", f"{header}\nq,p,n\n") == 0
    assert read(tmp_path / "out.jsonl") == QPN
    one, two, three = header.split(",")
    assert triples(tmp_path, "a.tsv", f"{three}\tid\t{two}\t{one}\tquery_id\nn\t7\tp\tq\t8\n") == 0
    assert read(tmp_path / "out.jsonl") == QPN
    assert triples(tmp_path, "a.jsonl", json.dumps({"_id": 1, three: ["n"], two: "p", one: "q"})) == 0
    assert read(tmp_path / "out.jsonl") == QPN


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a,b,c", "a column is called 'a', which does not say what it is; rename it to query, positive, negative"),
        ("query,positive,body", "a column is called 'body'"),
        ("query,question,positive", "the columns 'query' and 'question' are each the query"),
        ("query,positive,answer", "the columns 'positive' and 'answer' are each the positive"),
        ("query,negative,id", "no column is the positive (they are called 'query', 'negative', 'id')"),
        ("positive,negative,id", "no column is the query"),
        ("What is it?,It is this.,It is not.", "a column is called 'What is it?'"),  # no header at all
    ],
)
def test_names_that_say_nothing_are_refused(tmp_path: Path, capsys, header: str, message: str) -> None:
    assert triples(tmp_path, "a.csv", f"{header}\nx,y,z\nu,v,w\n") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


HEAD = "query,positive,negative\nq1,p1,n1\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('"q2,p2,n2\nq3,p3,n3\n', "a.csv:3: a quote that is opened here is never closed (the file ends in line 4)"),
        ('"q2,p2,n2\nq3,p3,n3\nq4",p4,n4\nq5,p5,n5\n', "a.csv:3: a quote that is opened here is closed 2 lines below"),
        ('q2,"p2,n2\nq3,p3"\n', "2 columns under a header of 3"),
        ('"big" q2,p2,n2\n', "a.csv:3: a quote that is opened here is followed by text in line 3"),
        ("q2,p2\n", "a.csv:3: 2 columns under a header of 3"),
        ("q2,p2,n2,x\n", "a.csv:3: 4 columns under a header of 3"),
        ("q2,,n2\n", "a.csv:3: a text is missing"),
        ("q2,\u200b,n2\n", "a.csv:3: a text is missing"),
        ("q2,p2,n2\rq3,p3,n3\n", "a.csv:3: a carriage return ends this line"),
        (f"q2,{'x' * (1 << 24)}x,n2\n", "a.csv:3: a field of more than 16,777,216 characters begins here"),
    ],
    ids=range(10),
)
def test_rows_that_would_be_swallowed_are_refused(tmp_path: Path, capsys, rows: str, message: str) -> None:
    assert triples(tmp_path, "a.csv", HEAD + rows) == 2
    error = capsys.readouterr().err
    assert message in error and "UTF-8" not in error
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_over_several_lines_and_long_ones_are_read_and_counted(tmp_path: Path, capsys) -> None:
    long = "x" * 200_000  # the csv module's own limit is 131,072
    rows = f'q2,"a ""b"", c\nd",n2\nq3,{long},n3\nq4,"one\n\nthree",n4'
    assert triples(tmp_path, "a.csv", HEAD + rows) == 0
    assert [row["pos"] for row in read(tmp_path / "out.jsonl")] == [["p1"], ['a "b", c\nd'], [long], ["one\n\nthree"]]
    said = capsys.readouterr().out
    assert "4 rows" in said and "read: 4 lines of triples (2 of them over several lines of their file)" in said


def test_a_tsv_need_not_quote(tmp_path: Path) -> None:
    rows = 'q1\t"Hello" he said\tn\nq2\t"open\tn2\nq3\t"P, ""p"""\tn3\nq4\t"two\nlines"\tn4\nq5\tp\t"last\ntext"\n'
    assert triples(tmp_path, "a.tsv", f'query\tpositive\tnegative\n{rows}q6\tp\t"end\n') == 0
    found = [(row["pos"][0], row["neg"][0]) for row in read(tmp_path / "out.jsonl")]
    expected = [('"Hello" he said', "n"), ('"open', "n2"), ('P, "p"', "n3"), ("two\nlines", "n4")]
    assert found == [*expected, ("p", "last\ntext"), ("p", '"end')]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_one_line(tmp_path: Path, capsys, codec: str) -> None:
    for name, text in (("a.csv", "query,positive\né,p\n"), ("a.jsonl", '{"query": "é", "positive": "p"}\n')):
        assert triples(tmp_path, name, text.encode(codec)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "UTF-8" in error


def test_marks_line_ends_and_packing_do_not_matter(tmp_path: Path) -> None:
    for text in ("\ufeffquery,positive,negative\r\nq,p,n", "query,positive,negative\n\nq,p,n\n\n"):
        assert triples(tmp_path, "a.csv", text) == 0
        assert read(tmp_path / "out.jsonl") == QPN
        assert triples(tmp_path, "a.CSV.gz", gzip.compress(text.encode())) == 0
        assert read(tmp_path / "out.jsonl") == QPN


def test_a_twin_of_the_positive_is_no_negative(tmp_path: Path) -> None:
    text = "آب\u200cترین رود"
    lines = [(text, other) for other in ("n1", text.replace("\u200c", " "), text.replace(" ", "\u00a0"), "n2")]
    assert triples(tmp_path, "a.jsonl", "".join(json.dumps(["q", *texts]) + "\n" for texts in lines)) == 0
    assert read(tmp_path / "out.jsonl") == [{"query": "q", "pos": [text], "neg": ["n1", "n2"]}]


def beir(folder: Path, corpus: str, queries: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(corpus)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return folder


PASSAGE, QUERY = '{"_id": "d", "text": "one"}\n', '{"_id": "q", "text": "what"}\n'


@pytest.mark.parametrize(
    ("corpus", "queries", "message"),
    [
        (PASSAGE + PASSAGE, QUERY, "corpus.jsonl:2: docid 'd' was there before, at {f}/corpus.jsonl:1"),
        (PASSAGE, QUERY + "\n" + QUERY, "queries.jsonl:3: _id 'q' was there before, in line 1"),
    ],
)
def test_an_id_that_is_there_twice_is_refused_with_both_lines(
    tmp_path: Path, capsys, corpus: str, queries: str, message: str
) -> None:
    folder = beir(tmp_path / "b", corpus, queries)
    words = ["--format", "beir", "--input", folder, "--output_file", tmp_path / "out.jsonl"]
    assert convert.main([str(word) for word in words]) == 2
    assert message.replace("{f}", str(folder)) in capsys.readouterr().err


@pytest.mark.parametrize(("ending", "magic"), [("gz", b"\x1f\x8b"), ("zst", b"\x28\xb5\x2f\xfd")])
def test_an_output_is_packed_as_its_name_says(tmp_path: Path, ending: str, magic: bytes) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "강", "pos": ["p"], "neg": ["n"]}\n')
    given = ["--input_file", str(tmp_path / "in.jsonl"), "--overwrite", "--output_file"]
    for module, more in ((merge, []), (sample, ["--number", "1"])):
        packed = tmp_path / f"out.jsonl.{ending}"
        contents = []
        for _ in range(2):
            assert module.main([*given, str(packed), *more]) == 0
            contents.append(packed.read_bytes())
        assert contents[0].startswith(magic) and contents[0] == contents[1]
        assert merge.main(["--input_file", str(packed), "--overwrite", "--output_file", str(tmp_path / "b.jsonl")]) == 0
        assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "in.jsonl").read_bytes()


def test_a_name_that_no_disk_takes_is_refused(tmp_path: Path, capsys) -> None:
    words = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / ("x" * 250))]
    assert merge.main(words) == 2
    assert "a name of 250 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl.bz2", "zip", "tar.gz", "csv.zst", "jsonl.lz4"])
def test_names_that_jsonl_would_belie_are_refused(tmp_path: Path, capsys, ending: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "q", "pos": ["p"], "neg": ["n"]}\n')
    words = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / f"o.{ending}")]
    assert merge.main(words) == 2
    assert "JSON lines are written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
