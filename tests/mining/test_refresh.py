"""Negatives mined again by a checkpoint: every setting acts, a refresh that is there is not made again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from mining.corpora import QUERIES, TEXTS, positives, read_rows, write_rows

from FlagEmbedding.finetune.arguments import DataArguments, ModelArguments, RefreshArguments
from FlagEmbedding.mining.hard_negatives.refresh import RECORD, RefreshSettings, read_refresh, refresh_negatives

# Options of a training run that decide what is mined, beside those whose default serves here.
BASE: dict[str, Any] = {"refresh_range_for_sampling": "1-12", "query_max_len": 24, "passage_max_len": 48}
CHANGED: dict[str, Any] = {
    "refresh_range_for_sampling": "3-20", "refresh_relative_margin": 0.02, "seed": 7, "query_max_len": 4,
    "passage_max_len": 4, "query_instruction_for_retrieval": "find the river: ",
    "passage_instruction_for_retrieval": "read this text: ", "sentence_pooling_method": "mean",
    "normalize_embeddings": False,
}  # fmt: skip
GROUPS = {"source": RefreshArguments, "texts": DataArguments, "vectors": ModelArguments}
NEEDED: dict[str, dict[str, Any]] = {
    "source": {"refresh_negatives_every_n_epochs": 1}, "texts": {"train_data": []},
    "vectors": {"model_name_or_path": "unused"},
}  # fmt: skip


def settings_of(changes: dict[str, Any]) -> RefreshSettings:
    """A run's groups of options with ``changes``, wherever each belongs."""
    groups: dict[str, Any] = {}
    for name, kind in GROUPS.items():
        own = {field.name for field in fields(kind)} & set(changes)
        groups[name] = kind(**NEEDED.get(name, {}), **{field: changes[field] for field in own})
    return RefreshSettings(**groups, seed=changes.get("seed", 42), dtype="fp32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"query": QUERIES[qid], "pos": positives(qid), "neg": [TEXTS[20 + i], TEXTS[30 + i]], "neg_q": ["a", ""]}
        for i, qid in enumerate(list(QUERIES)[:9])
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "ko.v1.jsonl", rows)


def mine(model: Path, source: Path, folder: Path, epoch: int = 1, **changes: Any) -> tuple[dict[str, Any], list[dict]]:
    settings = settings_of({**BASE, **changes})
    record = refresh_negatives(model, [source], folder / f"epoch-{epoch}", settings)
    assert record["files"] == ["000-ko.jsonl"]
    return record, read_rows(folder / f"epoch-{epoch}/000-ko.jsonl")


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    return mine(tiny_model_dir, source, tmp_path_factory.mktemp("base"))


def test_every_setting_is_looked_at() -> None:
    """What mining reads of each group, as its protocols say, and the two values beside them."""
    hints = get_type_hints(RefreshSettings)
    read = {name for group in GROUPS for name in vars(hints[group]) if isinstance(vars(hints[group])[name], property)}
    assert {field.name for field in fields(RefreshSettings)} == {*GROUPS, "seed", "dtype"}
    # On a processor without bfloat16 the dtype is float32 whatever is asked for.
    assert read | {"seed"} == {*CHANGED, "refresh_corpus"}


@pytest.mark.parametrize("name", CHANGED)
def test_every_setting_acts(name: str, base: tuple, tiny_model_dir: Path, source: Path, tmp_path: Path) -> None:
    record, rows = mine(tiny_model_dir, source, tmp_path, **{name: CHANGED[name]})
    assert rows != base[1] or record["figures"] != base[0]["figures"]
    assert [(row["query"], row["pos"]) for row in rows] == [(row["query"], row["pos"]) for row in base[1]]
    if not name.startswith("refresh") and name != "seed":
        for figure in ("positive_score", "negative_score"):
            assert record["figures"][figure] != base[0]["figures"][figure]


def test_another_corpus_gives_other_negatives(tiny_model_dir: Path, source: Path, tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": f"{text} Indeed."} for text in TEXTS[:30]])
    record, rows = mine(tiny_model_dir, source, tmp_path / "run", refresh_corpus=[str(corpus)])
    assert all(text.endswith(" Indeed.") for row in rows for text in row["neg"])
    assert all(row["neg_q"] == [""] * 2 for row in rows)  # nothing is known of what they answer
    assert record["figures"]["kept"] == record["figures"]["neg_q"] == 0


def test_every_epoch_draws_again_and_a_finished_one_stays(
    base: tuple, tiny_model_dir: Path, source: Path, tmp_path: Path
) -> None:
    first, rows = mine(tiny_model_dir, source, tmp_path)
    assert (first, rows) == base
    other, others = mine(tiny_model_dir, source, tmp_path, epoch=2)
    assert others != rows and other["identity"] == first["identity"]
    folder = tmp_path / "epoch-1"
    assert sorted(path.name for path in folder.iterdir()) == ["000-ko.jsonl", RECORD]
    before = (folder / RECORD).stat().st_mtime_ns
    assert mine(tiny_model_dir, source, tmp_path) == (first, rows)
    assert (folder / RECORD).stat().st_mtime_ns == before
    assert mine(tiny_model_dir, source, tmp_path, seed=7)[0] != first  # other settings: made again
    (folder / "000-ko.jsonl").write_text("{}\n")
    assert read_refresh(folder) is None
    assert mine(tiny_model_dir, source, tmp_path) == (first, rows)


def test_a_row_without_new_negatives_stays_as_it_was(tiny_model_dir: Path, source: Path, tmp_path: Path) -> None:
    record, rows = mine(
        tiny_model_dir, source, tmp_path, refresh_range_for_sampling="1-3", refresh_relative_margin=0.99
    )
    assert rows == read_rows(source)
    assert (record["figures"]["kept"], record["figures"]["negative_score"]) == (1.0, 0.0)


def test_a_new_negative_gets_a_query_that_the_files_know(base: tuple, source: Path) -> None:
    known = {text: {QUERIES[qid]} for qid in list(QUERIES)[:9] for text in positives(qid)}
    for row in read_rows(source):
        known.setdefault(row["neg"][0], set()).add("a")
    with_query = 0
    for before, after in zip(read_rows(source), base[1], strict=True):
        own = dict(zip(before["neg"], before["neg_q"], strict=True))
        for text, query in zip(after["neg"], after["neg_q"], strict=True):
            assert query == own[text] if own.get(text) else query in known.get(text, {""})
            with_query += bool(query) and text not in own
    assert with_query
