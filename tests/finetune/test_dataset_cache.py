"""The tables that training rows become: where they lie, when they are made again, how often a file is opened."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from finetune.helpers import opened
from finetune.test_dataset import write_rivers

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.utils.errors import DataError


@pytest.fixture
def settings(tmp_path: Path) -> DataArguments:
    return DataArguments([], train_group_size=4, same_task_within_batch=True, cache_path=str(tmp_path / "cache"))


def test_rows_lie_in_the_cache_and_follow_the_file(tmp_path: Path, settings: DataArguments) -> None:
    path = write_rivers(tmp_path / "train/rivers.jsonl", rows=300)
    dataset = opened([path], settings)
    (table,) = Path(str(settings.cache_path)).rglob("*.arrow")
    assert dataset.files[0].table.cache_files == [{"filename": str(table)}], "memory mapped from there"
    assert [p.name for p in path.parent.iterdir()] == ["rivers.jsonl"], "nothing is written beside the user's data"
    before = table.stat().st_mtime_ns
    opened([path], settings)
    assert table.stat().st_mtime_ns == before, "an unchanged file is not converted again"

    stat = path.stat()
    path.write_text(path.read_text().replace("bridges", "ferries"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "ferries" in opened([path], settings)[0, 299].passages[1], "content decides, not the file's date"


@pytest.fixture
def opens() -> Iterator[list[str]]:
    """Paths that Python opens meanwhile. (An audit hook cannot be taken out: it is switched off.)"""
    found: list[str] = []
    listening = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open":
            found.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield found
    listening = False


def test_a_file_is_opened_once(tmp_path: Path, settings: DataArguments, opens: list[str]) -> None:
    """To be hashed, checked, counted and converted; and no more for a process that finds the table there."""
    scores = {"pos_scores": [0.5, 0.6], "neg_scores": [0.1, 0.9, -2.0, 0.4, 7.5, 0.3]}
    for name in ("a", "b"):
        write_rivers(tmp_path / f"train/{name}.jsonl", rows=5, **scores)
    packed = tmp_path / "train/c.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "train/a.jsonl").read_bytes()))
    options = replace(settings, knowledge_distillation=True, small_threshold=9, max_example_num_per_dataset=3)
    for attempt in range(2):  # nothing is there yet; the tables are there
        opens.clear()
        dataset = opened([tmp_path / "train", packed], options)
        assert [dataset[attempt, row].row for row in (0, 5, 10)] == [f"{file.file.path}:1" for file in dataset.files]
        rows_opened = [path for path in opens if path.startswith(str(tmp_path / "train/"))]
        assert sorted(rows_opened) == sorted(file.file.path for file in dataset.files)


def test_unwritable_cache_is_one_line(tmp_path: Path, settings: DataArguments) -> None:
    path = write_rivers(tmp_path / "rivers.jsonl", rows=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept there .*--cache_path"):
        opened([path], replace(settings, cache_path=str(tmp_path / "file")))


def test_columns_of_all_kinds_survive_the_table(tmp_path: Path, settings: DataArguments) -> None:
    """Types that differ from row to row broke the published loader."""
    rows = [
        {"query": "q0", "pos": "p", "neg": "n", "id": 1},
        {"query": "q1", "pos": ["p"], "neg": ["n", "m"], "id": "x", "neg_q": ["a", ["b", "c"]], "neg_scores": [1, 2.5]},
        {"query": "q2", "pos": ["p"], "neg": ["n", "m"], "id": {"a": []}, "neg_q": ["", []], "pos_scores": [3]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = opened([path], settings)
    records = [dataset.record(row)[1] for row in range(3)]
    assert [r.pos for r in records] == [["p"]] * 3
    assert [r.neg_q for r in records] == [None, [["a"], ["b", "c"]], [[], []]]
    assert [r.pos_scores for r in records] == [None, None, [3.0]]
    assert [r.neg_scores for r in records] == [None, [1.0, 2.5], None]
