"""Mining killed with -9 in the middle gives the identical file; memory does not follow the corpus; the help page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from mining.corpora import TEXTS, read_rows, write_rows

from FlagEmbedding.mining.__main__ import COMMANDS
from FlagEmbedding.mining.__main__ import main as help_main
from FlagEmbedding.mining.common.jobs import journal_path
from FlagEmbedding.mining.common.passages import PassageStore
from FlagEmbedding.mining.hard_negatives.command import main

REPOSITORY = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_killed_and_run_again_gives_the_identical_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {"query": f"How old is number {i}?", "pos": [TEXTS[i % 60]], "neg": [TEXTS[(i + 7) % 60]], "neg_q": [f"n {i}"]}
        for i in range(400)
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    # Chunks of 150, so that the kill leaves one in the middle; a cold start is slow, the work itself is not.
    words = ["--input_file", str(source), "--encoder", str(tiny_model_dir), "--index_dir", str(tmp_path / "index")]
    words += ["--range_for_sampling", "2-30", "--negative_number", "5", "--relative_margin", "0.001", "--with_scores"]
    words += ["--search_batch_size", "150", "--output_file"]
    whole, broken = tmp_path / "whole" / "out.jsonl", tmp_path / "broken" / "out.jsonl"
    whole.parent.mkdir()
    assert main([*words, str(whole)]) == 0

    process = subprocess.Popen(
        [sys.executable, "-m", "FlagEmbedding.mining.hard_negatives", *words, str(broken)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal, until = journal_path(broken), time.monotonic() + 240
    while not (journal.exists() and journal.stat().st_size > 200_000):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < 400 and not broken.exists()

    assert main([*words, str(broken)]) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in broken.parent.iterdir()) == ["out.jsonl", "reports"]
    reports = [json.loads((p.parent / "reports/out.json").read_text()) for p in (whole, broken)]
    assert reports[0]["result"] == reports[1]["result"]


def test_other_arguments_do_not_go_on_with_a_journal(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"query": "q", "pos": [TEXTS[0]], "neg": TEXTS[1:20]}])
    words = ["--input_file", str(source), "--random_negatives", "--negative_number", "5", "--output_file"]
    output = tmp_path / "out.jsonl"
    assert main([*words, str(output)]) == 0
    lines = output.read_bytes()
    assert main([*words, str(output)]) == 2
    assert "is there already: pass --overwrite True" in capsys.readouterr().err
    assert main([*words, str(output), "--overwrite"]) == 0
    assert output.read_bytes() == lines


def test_memory_does_not_follow_the_corpus(tmp_path: Path) -> None:
    """Everything but the search (whose blocks are bounded, see its own tests): 4,000 passages, and 20 times more."""
    source = write_rows(tmp_path / "rows.jsonl", [{"query": f"Where is {i}?", "pos": [TEXTS[i]]} for i in range(50)])
    peaks = []
    for count in (4_000, 80_000):
        corpus = tmp_path / f"c{count}.jsonl"
        with corpus.open("w") as stream:
            stream.writelines(f'{{"docid": "d{i}", "text": "{i} {TEXTS[i % 60]}"}}\n' for i in range(count))
        words = ["--input_file", str(source), "--corpus", str(corpus), "--random_negatives", "--output_file"]
        tracemalloc.start()
        assert main([*words, str(tmp_path / f"o{count}.jsonl")]) == 0
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
        assert all(len(row["neg"]) == 15 for row in read_rows(tmp_path / f"o{count}.jsonl"))
    # 8 bytes a passage for the places of docids, three times while they are collected: 2 MB of 8 on disk.
    assert peaks[1] - peaks[0] < 2.5


def test_a_store_gives_every_text_and_survives_a_half_written_one(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "c.jsonl", [{"docid": f"d{i}", "text": text} for i, text in enumerate(TEXTS)])
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "texts").write_bytes(b"half")
    store = PassageStore.prepare([corpus], tmp_path / "store")
    assert list(store) == TEXTS
    assert store.rows_of({"d7", "d62", "nowhere"}) == {"d7": 7, "d62": 62}
    with pytest.raises(IndexError):
        store[len(TEXTS)]
    before = (tmp_path / "store" / "texts").stat().st_mtime_ns
    assert list(PassageStore.prepare([corpus], tmp_path / "store")) == TEXTS
    assert (tmp_path / "store" / "texts").stat().st_mtime_ns == before


def test_the_help_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_main([]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in COMMANDS)
    assert {"from_corpus", "hard_negatives", "query_generation", "doctor", "split_data_by_length", "convert", "merge", "sample", "score", "check_data"} == set(COMMANDS)  # fmt: skip  # noqa: E501
    assert help_main(["nothing"]) == 2
    assert "no command 'nothing'" in capsys.readouterr().err


def test_a_command_runs_through_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as ended:
        help_main(["hard_negatives", "--output_file", str(tmp_path / "x")])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: give either --input_file")
