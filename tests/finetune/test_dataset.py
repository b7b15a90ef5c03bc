"""What is drawn from the rows: statistics against enumeration, determinism, thresholds, teacher scores."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import random
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finetune.helpers import opened
from scipy import stats

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.dataset import TrainDataset, draw_negatives, shuffle_text
from FlagEmbedding.finetune.data.tasks import batch_size_of
from FlagEmbedding.utils.errors import DataError, UsageError

RIVERS = ["Han", "Nakdong", "Geum", "Yeongsan", "Seomjin", "Imjin", "Soyang", "Namhan"]


def write_rivers(path: Path, rows: int, negatives: int = 6, positives: int = 2, **extra: object) -> Path:
    """Rows that say themselves which passage and which query belong together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(rows):
            name = RIVERS[i % len(RIVERS)]
            row = {
                "query": f"{path.stem} {i}: where does the {name} river end?",
                "pos": [f"{path.stem} {i} answer {k}: the {name} river ends in the sea." for k in range(positives)],
                "neg": [f"{path.stem} {i} negative {k}: the {name} river has bridges." for k in range(negatives)],
                "neg_q": [f"{path.stem} {i} negative {k}: what does it have?" for k in range(negatives)],
                **extra,
            }
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> DataArguments:
    return DataArguments([], train_group_size=4, same_task_within_batch=True, cache_path=str(tmp_path / "cache"))


def assert_distribution(observed: Iterable[Hashable], expected: dict[Hashable, float]) -> None:
    """Chi-square at 1e-4; the draws are seeded, so the answer is always the same."""
    counts = Counter(observed)
    assert set(counts) <= set(expected), "something impossible was drawn"
    total = sum(counts.values())
    frequencies = [expected[outcome] * total for outcome in expected]
    assert stats.chisquare([counts[outcome] for outcome in expected], frequencies).pvalue > 1e-4


# ---- the draw ----


@pytest.mark.parametrize(("available", "wanted"), [(5, 2), (4, 4), (3, 3), (2, 3), (3, 4), (2, 5)])
def test_negatives_are_drawn_as_enumeration_says(available: int, wanted: int) -> None:
    pool = list(range(available)) * (1 if wanted <= available else -(-wanted // available))
    outcomes = Counter(itertools.permutations(pool, wanted))
    total = sum(outcomes.values())
    generator = random.Random(3)
    draws = (tuple(draw_negatives(available, wanted, generator)) for _ in range(20_000))
    assert_distribution(draws, {outcome: count / total for outcome, count in outcomes.items()})


def test_a_single_negative_fills_the_group() -> None:
    assert draw_negatives(1, 4, random.Random(0)) == [0, 0, 0, 0]


def test_items_over_epochs_follow_the_same_statistics(tmp_path: Path, settings: DataArguments) -> None:
    """The seeding by (seed, epoch, row) must not bend the distribution."""
    write_rivers(tmp_path / "train/rivers.jsonl", rows=5, negatives=5, positives=3)
    dataset = opened([tmp_path / "train"], replace(settings, train_group_size=3))
    items = [dataset[epoch, row] for epoch in range(1500) for row in range(5)]
    positives = [int(item.passages[0].split("answer ")[1][0]) for item in items]
    negatives = [tuple(int(text.split("negative ")[1][0]) for text in item.passages[1:]) for item in items]
    assert_distribution(positives, dict.fromkeys(range(3), 1 / 3))
    assert_distribution(negatives, dict.fromkeys(itertools.permutations(range(5), 2), 1 / 20))
    independent = {(k, pair): 1 / 60 for k in range(3) for pair in itertools.permutations(range(5), 2)}
    assert_distribution(zip(positives, negatives, strict=True), independent)


def test_an_item_holds_its_own_row(tmp_path: Path, settings: DataArguments) -> None:
    path = write_rivers(tmp_path / "train/rivers.jsonl", rows=9)
    dataset = opened([path], settings)
    for row in range(9):
        item = dataset[2, row]
        assert item.row == f"{path}:{row + 1}"
        assert item.query.startswith(f"rivers {row}:")
        assert len(item.passages) == 4
        assert item.passages[0].startswith(f"rivers {row} answer")
        assert len({*item.passages}) == 4, "drawn without replacement"
        assert item.neg_q is not None
        for passage, queries in zip(item.passages[1:], item.neg_q, strict=True):
            assert passage.startswith(f"rivers {row} negative")
            assert queries == [passage.split(":")[0] + ": what does it have?"], "neg_q follows its negative"
        assert item.teacher_scores is None


def test_an_item_is_a_function_of_seed_epoch_and_row(tmp_path: Path, settings: DataArguments) -> None:
    write_rivers(tmp_path / "train/rivers.jsonl", rows=30)
    one, two = (opened([tmp_path / "train"], settings) for _ in range(2))
    keys = [(epoch, row) for epoch in range(3) for row in range(30)]
    drawn = {key: one[key] for key in keys}
    random.seed(99)
    np.random.seed(99)
    random.Random(5).shuffle(keys)
    assert all(two[key] == drawn[key] for key in keys), "neither order nor global generators matter"
    assert pickle.loads(pickle.dumps(one))[2, 29] == drawn[2, 29]
    other = opened([tmp_path / "train"], settings, seed=8)
    for same in (
        sum(other[key].passages == drawn[key].passages for key in keys),
        sum(drawn[0, row].passages == drawn[1, row].passages for row in range(30)),
    ):
        assert same < 5, "another seed or epoch draws other passages (chance 1/240 each)"


def test_the_draw_is_pinned(tmp_path: Path, settings: DataArguments) -> None:
    """A run started today must be resumable tomorrow: what a key draws may never change."""
    write_rivers(tmp_path / "rivers.jsonl", rows=27)
    item = opened([tmp_path / "rivers.jsonl"], settings, seed=42)[3, 26]
    assert item.passages[0].startswith("rivers 26 answer 0:")
    assert [int(text.split("negative ")[1][0]) for text in item.passages[1:]] == [5, 4, 1]


def test_without_neg_q_and_with_group_size_1(tmp_path: Path, settings: DataArguments) -> None:
    write_rivers(tmp_path / "plain.jsonl", rows=3, neg_q=None)
    assert opened([tmp_path / "plain.jsonl"], settings)[0, 0].neg_q is None
    write_rivers(tmp_path / "rivers.jsonl", rows=3)
    item = opened([tmp_path / "rivers.jsonl"], replace(settings, train_group_size=1))[0, 0]
    assert (len(item.passages), item.neg_q) == (1, [])


def test_instructions_stand_before_queries_and_passages(tmp_path: Path, settings: DataArguments) -> None:
    path = write_rivers(tmp_path / "rivers.jsonl", rows=3)
    plain = opened([path], settings)[1, 2]
    told = replace(settings, query_instruction_for_retrieval="Q: ", passage_instruction_for_retrieval="P: ")
    item = opened([path], told)[1, 2]
    assert item.query == "Q: " + plain.query
    assert item.passages == ["P: " + text for text in plain.passages]
    assert item.neg_q == [["Q: " + query for query in queries] for queries in plain.neg_q]
    assert opened([path], replace(told, neg_q_instruction=False))[1, 2].neg_q == plain.neg_q


# ---- shuffled passages ----


def test_shuffled_text_is_three_chunks_in_every_order() -> None:
    text = "".join(chr(0xAC00 + i) for i in range(103))
    chunks = [text[:35], text[35:70], text[70:]]
    orders = {" ".join(order): 1 / 6 for order in itertools.permutations(chunks)}
    generator = random.Random(1)
    assert_distribution((shuffle_text(text, 1.0, generator) for _ in range(6000)), dict(orders))
    untouched = sum(shuffle_text(text, 0.25, generator) == text for _ in range(8000))
    assert stats.binomtest(untouched, 8000, 0.75).pvalue > 1e-4
    assert shuffle_text(text[:100], 1.0, generator) == text[:100], "100 characters are not over 100"


def test_shuffle_ratio_reaches_passages_and_nothing_else(tmp_path: Path, settings: DataArguments) -> None:
    long = ["The Geum rises in Jangsu and flows north before it turns west. " * 3 + f"({i})" for i in range(6)]
    extra = {"pos": [long[0]], "neg": long, "neg_q": long}
    path = write_rivers(tmp_path / "rivers.jsonl", rows=4, **extra)
    item = opened([path], replace(settings, shuffle_ratio=1.0))[0, 0]
    for text in item.passages:
        assert any(sorted(text.replace(" ", "")) == sorted(whole.replace(" ", "")) for whole in long)
    assert any(text not in long for text in item.passages[1:])
    assert item.neg_q is not None
    assert all(queries[0] in long for queries in item.neg_q)


# ---- teacher scores ----


def test_scores_order_the_negatives_and_follow_their_passages(tmp_path: Path, settings: DataArguments) -> None:
    scores = {"pos_scores": [0.5, 0.6], "neg_scores": [0.1, 0.9, -2.0, 0.4, 7.5, 0.3]}
    path = write_rivers(tmp_path / "rivers.jsonl", rows=5, **scores)
    dataset = opened([path], replace(settings, knowledge_distillation=True))
    for key in itertools.product(range(20), range(5)):
        item = dataset[key]
        assert item.teacher_scores is not None
        positive, *negatives = item.teacher_scores
        assert positive == scores["pos_scores"][int(item.passages[0].split("answer ")[1][0])]
        assert negatives == sorted(negatives, reverse=True)
        numbers = [int(text.split("negative ")[1][0]) for text in item.passages[1:]]
        assert negatives == [scores["neg_scores"][number] for number in numbers]
        assert item.neg_q == [[f"rivers {key[1]} negative {k}: what does it have?"] for k in numbers]
    undistilled = opened([path], settings)
    assert undistilled[0, 0].teacher_scores is None
    assert [*undistilled[0, 0].passages] != [*dataset[0, 0].passages] or [*undistilled[1, 0].passages] != [
        *dataset[1, 0].passages
    ], "scores that are not used do not order"


def test_missing_scores_are_refused_where_a_batch_would_need_them(tmp_path: Path, settings: DataArguments) -> None:
    distil = replace(settings, knowledge_distillation=True)
    scores = {"pos_scores": [1, 2], "neg_scores": [1, 2, 3, 4, 5, 6]}
    scored = write_rivers(tmp_path / "train/scored.jsonl", rows=4, **scores)
    bare = write_rivers(tmp_path / "train/unscored.jsonl", rows=4)
    with pytest.raises(DataError, match=r"needs pos_scores and neg_scores, and no row"):
        opened([bare], distil)
    both = opened([tmp_path / "train"], distil)
    assert (both[0, 0].teacher_scores is None, both[0, 4].teacher_scores is None) == (False, True)
    for mixing in (replace(distil, same_task_within_batch=False), replace(distil, small_threshold=10)):
        with pytest.raises(DataError, match=r"unscored\.jsonl: no row has pos_scores and neg_scores, and its batches"):
            opened([tmp_path / "train"], mixing)
    partly = tmp_path / "partly.jsonl"
    partly.write_text(scored.read_text() + bare.read_text())
    with pytest.raises(DataError) as error:
        opened([partly], distil)
    lines = str(error.value).splitlines()
    assert lines[0] == "4 problems in the data, all:"
    assert lines[1].startswith(f"  {partly}:5: pos_scores, neg_scores are missing; 4 of 8 rows here have both")


# ---- which rows ----


def names(dataset: TrainDataset) -> list[set[str]]:
    """The files of each task."""
    return [{Path(dataset.record(int(row))[0].file.path).stem for row in task.rows} for task in dataset.tasks]


def test_files_become_tasks(tmp_path: Path, settings: DataArguments) -> None:
    for name, rows in (("b", 12), ("a", 3), ("c", 4), ("d", 20)):
        write_rivers(tmp_path / f"one/{name}.jsonl", rows)
    write_rivers(tmp_path / "two/e.json", 5)
    (tmp_path / "one/notes.txt").write_text("not read")
    (tmp_path / "one/deeper").mkdir()
    write_rivers(tmp_path / "one/deeper/z.jsonl", 50)
    folders = [tmp_path / "one", tmp_path / "two"]
    assert names(opened(folders, settings)) == [{"a"}, {"b"}, {"c"}, {"d"}, {"e"}]
    merged = replace(settings, small_threshold=12)
    assert names(opened(folders, merged)) == [{"a", "c"}, {"b"}, {"d"}, {"e"}]
    assert names(opened(folders, replace(merged, drop_threshold=6))) == [{"a", "c"}, {"b"}, {"d"}]
    assert names(opened(folders, replace(merged, drop_threshold=7))) == [{"a", "c"}, {"b"}, {"d"}], "7 are not fewer"
    assert names(opened(folders, replace(merged, drop_threshold=8))) == [{"b"}, {"d"}]
    mixed = opened(folders, replace(merged, drop_threshold=8, same_task_within_batch=False))
    assert names(mixed) == [{"b", "d"}]
    assert len(mixed) == 32
    with pytest.raises(DataError, match="--drop_threshold 99 drops every row"):
        opened([tmp_path / "two"], replace(settings, small_threshold=10, drop_threshold=99))
    listed = [tmp_path / "one/a.jsonl", tmp_path / "one/c.jsonl"]
    assert names(opened(listed, merged)) == [{"a", "c"}], "files named one by one merge like their folder"


def test_rows_keep_their_number_and_draw_when_others_go(tmp_path: Path, settings: DataArguments) -> None:
    path = write_rivers(tmp_path / "train/rivers.jsonl", rows=40)
    write_rivers(tmp_path / "train/small.jsonl", rows=9)
    whole = opened([tmp_path / "train"], settings)
    sampled = opened([tmp_path / "train"], replace(settings, max_example_num_per_dataset=10))
    assert [len(task.rows) for task in sampled.tasks] == [10, 9]
    assert sampled.tasks[0].rows.tolist() != list(range(10))
    assert all(sampled[1, int(row)] == whole[1, int(row)] for task in sampled.tasks for row in task.rows)
    again = opened([tmp_path / "train"], replace(settings, max_example_num_per_dataset=10))
    assert again.tasks[0].rows.tolist() == sampled.tasks[0].rows.tolist()
    other = opened([path], replace(settings, max_example_num_per_dataset=10), seed=8)
    assert other.tasks[0].rows.tolist() != sampled.tasks[0].rows.tolist()


def test_files_of_equal_size_do_not_lose_the_same_rows(tmp_path: Path, settings: DataArguments) -> None:
    for name in ("a", "b"):
        write_rivers(tmp_path / f"train/{name}.jsonl", rows=40)
    one, two = opened([tmp_path / "train"], replace(settings, max_example_num_per_dataset=10)).tasks
    assert one.rows.tolist() != [row - 40 for row in two.rows.tolist()]


def test_a_change_beyond_the_first_mebibyte_is_seen(tmp_path: Path, settings: DataArguments) -> None:
    """A file is known by all of its bytes."""
    path = write_rivers(tmp_path / "rivers.jsonl", rows=2, pos=["The Geum flows north. " * 60_000])
    opened([path], settings)
    text = path.read_text()
    path.write_text(text[:-400] + text[-400:].replace("bridges", "ferries"))
    assert path.stat().st_size > 2 << 20
    drawn = opened([path], replace(settings, train_group_size=7))[0, 1]
    assert any("ferries" in passage for passage in drawn.passages)


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path, settings: DataArguments) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: there is no such file or folder; check the path"):
        opened([tmp_path / "gone.jsonl"], settings)
    (tmp_path / "train").mkdir()
    broken = tmp_path / "train.jsonl.gz"
    broken.write_bytes(gzip.compress(b"{}")[:-9])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz: cannot be read \(.*\); check the file"):
        opened([broken], settings)
    with pytest.raises(DataError, match="names no path"):
        opened([], settings)


LENGTH_TABLE = [  # group size, file, batch size (FlagEmbedding 1.2.10)
    (8, "ko_len-0-500.jsonl", 48),
    (8, "ko_len-500-1000.jsonl", 32),
    (8, "ko_len-1000-2000.jsonl", 20),
    (8, "ko_len-2000-3000.jsonl", 18),
    (8, "ko_len-3000-4000.jsonl", 14),
    (8, "ko_len-4000-5000.jsonl", 14),
    (8, "ko_len-5000-6000.jsonl", 12),
    (8, "ko_len-6000-7000.jsonl", 10),
    (8, "ko_len-7000-inf.jsonl", 8),
    (1, "len-0-500.jsonl", 700),
    (1, "len-500-1000.jsonl", 570),
    (1, "len-1000-2000.jsonl", 388),
    (1, "len-2000-3000.jsonl", 288),
    (1, "len-3000-4000.jsonl", 224),
    (1, "len-4000-5000.jsonl", 180),
    (1, "len-5000-6000.jsonl", 157),
    (1, "len-6000-7000.jsonl", 128),
    (1, "len-7000-inf.jsonl", 104),
    (8, "ko.jsonl", None),
    (5, "ko_len-0-500.jsonl", None),
]


@pytest.mark.parametrize(("group", "name", "size"), LENGTH_TABLE)
def test_length_table(group: int, name: str, size: int | None) -> None:
    assert batch_size_of(f"train/{name}", group) == size


def test_length_table_only_when_asked(tmp_path: Path, settings: DataArguments) -> None:
    for name in ("ko_len-0-500", "ko_len-1000-2000", "rest"):
        write_rivers(tmp_path / f"train/{name}.jsonl", 3)
    eight = replace(settings, train_group_size=8)
    silent = opened([tmp_path / "train"], eight)
    assert [task.batch_size for task in silent.tasks] == [None, None, None]
    asked = replace(eight, batch_size_by_length=True)
    assert [task.batch_size for task in opened([tmp_path / "train"], asked).tasks] == [48, 20, None]
    merged = replace(asked, small_threshold=10)
    assert [task.batch_size for task in opened([tmp_path / "train"], merged).tasks] == [20]
    with pytest.raises(UsageError, match="--train_group_size 8 and 1 only, got 4"):
        opened([tmp_path / "train"], replace(asked, train_group_size=4))
    with pytest.raises(UsageError, match="needs --same_task_within_batch True"):
        opened([tmp_path / "train"], replace(asked, same_task_within_batch=False))
