"""Splitting by length: published flags and names, rows kept whole, parts kept or replaced, bad rows refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from FlagEmbedding.finetune.data.tasks import LENGTHS, batch_size_of
from FlagEmbedding.mining.split_data_by_length import SplitArguments, main
from FlagEmbedding.utils.cli import parse
from FlagEmbedding.utils.errors import UsageError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clp_rows(count: int) -> list[dict[str, Any]]:
    """Rows in the CLP format whose longest text is now the positive, now a negative, now a negative's query."""
    rows = []
    for i in range(count):
        long = f"섬진강 {i}: " + "강물은 남해로 흐른다. " * (i % 6)
        row: dict[str, Any] = {
            "id": i,
            "query": f"섬진강은 어디로 흐르는가? {i}",
            "pos": ["남해로 흐른다."],
            "neg": ["영산강은 서해로 흐른다.", "낙동강은 남해로 흐른다."],
            "pos_scores": [0.5],
            "neg_scores": [0.25, 0.125],
            "neg_q": ["영산강은?", ""],
        }
        row[("pos", "neg", "neg_q")[i % 3]][0] = long
        rows.append(row)
    return rows


def longest(row: dict[str, Any], tokenizer: Any) -> int:
    texts = [row["query"], *row["pos"], *row["neg"], *[text for text in row["neg_q"] if text]]
    return max(len(tokenizer(text)["input_ids"]) for text in texts)


def test_rows_go_where_their_longest_text_says(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clp_rows(150)
    source = write(tmp_path / "train/ko.v1.jsonl", rows)
    output = tmp_path / "split"
    words = ["--input_path", tmp_path / "train", "--output_dir", output, "--model_name_or_path", tiny_model_dir]
    words += ["--length_list", 0, 60, 120, 180, "--num_proc", 2, "--overwrite", "False", "--cache_dir", tmp_path / "c"]
    assert main([str(word) for word in words]) == 0

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    lengths = [longest(row, tokenizer) for row in rows]
    expected: dict[str, list[dict[str, Any]]] = {}
    for row, length in zip(rows, lengths, strict=True):
        name = "0-60" if length < 60 else "60-120" if length < 120 else "120-180" if length < 180 else "180-inf"
        expected.setdefault(f"ko.v1_len-{name}.jsonl", []).append(row)
    assert len(expected) >= 3
    assert {path.name: read(path) for path in output.glob("*.jsonl")} == expected
    (entry,) = read(output / ".split_log")
    assert (entry["file_name"], entry["size"], entry["file_path"]) == ("ko.v1.jsonl", 150, str(source))
    assert entry["avg_length"] == pytest.approx(sum(lengths) / 150)
    assert {name: n for name, n in entry["split_info"].items() if n} == {
        name.removeprefix("ko.v1_").removesuffix(".jsonl"): len(part) for name, part in expected.items()
    }
    assert set(entry) == {
        "file_name", "size", "avg_length", "file_path", "start_time", "end_time", "split_info",
    }  # fmt: skip
    assert f"{source}: 150 rows" in capsys.readouterr().out


def split(source: Path, output: Path, model: Path, *more: object) -> int:
    words = ["--input_path", source, "--output_dir", output, "--model_name_or_path", model, *more]
    return main([str(word) for word in words])


def test_existing_parts_stay_or_are_replaced(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = write(tmp_path / "ko.jsonl", clp_rows(12))
    output = tmp_path / "split"
    stale = write(output / "ko_len-500-1000.jsonl", [{"old": 1}])
    kept = write(output / "ko_len-0-500.jsonl", [{"old": 2}])
    assert split(source, output, tiny_model_dir) == 0
    assert (read(kept), read(stale)) == ([{"old": 2}], [{"old": 1}])
    assert split(source, output, tiny_model_dir, "--overwrite") == 0
    assert len(read(kept)) == 12
    assert not stale.exists(), "a part of an earlier run that has no rows now is not left behind"
    assert len(read(output / ".split_log")) == 2


def test_bad_rows_leave_nothing_behind(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "ko.jsonl", [*clp_rows(100), {"query": "q", "pos": ["p"], "neg": []}])
    assert split(source, tmp_path / "split", tiny_model_dir) == 2
    assert capsys.readouterr().err == (
        f"error: {source}:101: neg is an empty list; give a list of at least one passage\n"
    )
    assert list((tmp_path / "split").iterdir()) == []


def test_a_folder_can_be_split_into_itself_again(tmp_path: Path, tiny_model_dir: Path) -> None:
    write(tmp_path / "ko.jsonl", clp_rows(6))
    for _ in range(2):
        assert split(tmp_path, tmp_path, tiny_model_dir, "--overwrite", "y") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".split_log", "ko.jsonl", "ko_len-0-500.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length_list", 0, 500, 500], "--length_list needs different numbers from 0 up, got 0 500 500"),
        (["--length_list", -5, 500], "--length_list needs different numbers from 0 up, got -5 500"),
        (["--num_proc", 0], "--num_proc must be at least 1, got 0"),
        (["--model_name_or_path", "{}/nowhere"], "--model_name_or_path {}/nowhere: no tokenizer can be loaded"),
        (["--input_path", "{}/nowhere.jsonl"], "{}/nowhere.jsonl: there is no such file or folder; check the path"),
    ],
)
def test_wrong_options_are_one_line(
    more: list[Any], message: str, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "ko.jsonl", clp_rows(3))
    words = [str(word).replace("{}", str(tmp_path)) for word in more]
    assert split(source, tmp_path / "split", tiny_model_dir, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.replace("{}", str(tmp_path)))
    assert err.count("\n") == 1


def test_two_files_of_one_stem_are_refused(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("json", "jsonl"):
        write(tmp_path / f"train/ko.{suffix}", clp_rows(2))
    assert split(tmp_path / "train", tmp_path / "split", tiny_model_dir) == 2
    assert "would both be written to ko_len-…: rename one of them" in capsys.readouterr().err


def test_rows_shorter_than_the_first_bound_are_left_out(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = write(tmp_path / "ko.jsonl", clp_rows(30))
    assert split(source, tmp_path / "split", tiny_model_dir, "--length_list", 100) == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    long = [row for row in clp_rows(30) if longest(row, tokenizer) >= 100]
    assert 0 < len(long) < 30
    assert read(tmp_path / "split/ko_len-100-inf.jsonl") == long


def test_defaults_are_published_and_fit_the_length_table() -> None:
    (options,) = parse([SplitArguments], ["--input_path", "in", "--output_dir", "out"], "")
    assert vars(options) == {
        "input_path": "in",
        "output_dir": "out",
        "cache_dir": None,
        "log_name": ".split_log",
        "length_list": [0, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000],
        "model_name_or_path": "BAAI/bge-m3",
        "num_proc": 16,
        "overwrite": False,
    }
    assert options.parts == [f"len-{length}" for length in LENGTHS]
    assert all(batch_size_of(f"ko_{part}.jsonl", 8) for part in options.parts)
    with pytest.raises(UsageError, match="--length_list needs different numbers"):
        SplitArguments("in", "out", length_list=[])
