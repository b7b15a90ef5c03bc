"""A batch against texts tokenized one by one: sequences, truncation, owners of the negatives' queries, scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.helpers import opened
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from FlagEmbedding.finetune.arguments import DataArguments
from FlagEmbedding.finetune.data.collator import TrainCollator
from FlagEmbedding.finetune.data.dataset import TrainDataset, TrainExample
from FlagEmbedding.finetune.data.sampler import TaskBatchSampler
from FlagEmbedding.modeling.tokens import TokenBatch


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def example(name: str, neg_q: list[list[str]] | None, scores: list[float] | None = None) -> TrainExample:
    passages = [f"{name} 정답: 소양강은 북한강으로 흘러든다.", f"{name} one", f"{name} two " + "강 " * 60]
    return TrainExample(f"{name}: 소양강은 어디로 흐르는가?", passages, neg_q, scores, f"rivers.jsonl:{name}")


def alone(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[int]:
    """The ids of one text: first and last token around what fits between."""
    inside = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.cls_token_id, *inside[: max_length - 2], tokenizer.sep_token_id]


def assert_sequences(part: TokenBatch, expected: list[list[int]]) -> None:
    assert part.ids.dtype == torch.int64
    assert part.ids.tolist() == [token for ids in expected for token in ids]
    assert part.lengths == list(map(len, expected))
    assert part.padded_length == max(map(len, expected))


def texts_of(tokenizer: PreTrainedTokenizerBase, part: TokenBatch) -> list[str]:
    return tokenizer.batch_decode(part.ids.split(part.lengths), skip_special_tokens=True)


def test_a_batch_is_its_texts_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [
        example("a", [["who?"], []]),
        example("b", None),
        example("c", [["when, where?", "why? " + "왜 " * 60], ["how?"]]),
    ]
    batch = TrainCollator(tokenizer, DataArguments([], query_max_len=9, passage_max_len=40))(examples)
    assert_sequences(batch["query"], [alone(tokenizer, e.query, 9) for e in examples])
    assert_sequences(batch["passage"], [alone(tokenizer, t, 40) for e in examples for t in e.passages])
    questions = ["who?", "when, where?", "why? " + "왜 " * 60, "how?"]
    assert_sequences(batch["neg_q"], [alone(tokenizer, text, 40) for text in questions])
    assert batch["owner"].tolist() == [1, 7, 7, 8], "i·G + j, with missing ones absent"
    assert batch["owner"].dtype == torch.int64
    assert batch["query"].padded_length == 9
    assert batch["passage"].padded_length == batch["neg_q"].padded_length == 40
    assert batch["rows"] == ["rivers.jsonl:a", "rivers.jsonl:b", "rivers.jsonl:c"]
    assert batch["teacher_scores"] is None


@pytest.mark.parametrize("neg_q", [None, [[], []]])
def test_no_query_at_all_gives_none(tokenizer: PreTrainedTokenizerBase, neg_q: list[list[str]] | None) -> None:
    assert TrainCollator(tokenizer, DataArguments([]))([example("a", neg_q), example("b", None)])["neg_q"] is None


def test_neg_q_can_be_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [example("a", [["who?"], ["how?"]])]
    full, without = (
        TrainCollator(tokenizer, DataArguments([]), with_neg_q=wanted)(examples) for wanted in (True, False)
    )
    assert full["neg_q"] is not None
    assert without["neg_q"] is None
    assert torch.equal(full["passage"].ids, without["passage"].ids)


def test_teacher_scores_keep_the_order_of_passages(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = TrainCollator(tokenizer, DataArguments([]))(
        [example("a", None, [0.9, 0.3, -1.5]), example("b", None, [8.0, 7.0, 0.0])]
    )
    expected = torch.tensor([[0.9, 0.3, -1.5], [8.0, 7.0, 0.0]])
    assert torch.equal(batch["teacher_scores"], expected)
    assert batch["teacher_scores"].dtype == torch.float32


def test_the_tokenizer_keeps_no_trace(tokenizer: PreTrainedTokenizerBase) -> None:
    """Truncation set for a batch must not cut what is tokenized after it."""
    long = "강 " * 300
    before = tokenizer(long)["input_ids"]
    TrainCollator(tokenizer, DataArguments([], query_max_len=5, passage_max_len=7))([example("a", [["who?"], []])])
    assert tokenizer(long)["input_ids"] == before


def write_lakes(path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(24):
        negatives = [f"lake {i}.{k} is {k + 3} metres deep" for k in range(5)]
        queries: list[Any] = [f"how deep is lake {i}.{k}?" for k in range(5)]
        queries[1] = ""
        queries[2] = [f"how deep is lake {i}.2?", f"depth of lake {i}.2?"]
        rows.append({"query": f"where is lake {i}?", "pos": [f"lake {i} is north"], "neg": negatives, "neg_q": queries})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def batches(dataset: TrainDataset, tokenizer: PreTrainedTokenizerBase, workers: int) -> list[dict[str, Any]]:
    sampler = TaskBatchSampler(dataset, batch_size=4, seed=3)
    collator = TrainCollator(tokenizer, DataArguments([], query_max_len=32, passage_max_len=32))
    context = "fork" if workers else None
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers, multiprocessing_context=context
    )
    return list(loader)


def test_loader_with_workers_gives_the_same_tensors(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = DataArguments([], train_group_size=4, same_task_within_batch=True, cache_path=str(tmp_path / "cache"))
    dataset = opened([write_lakes(tmp_path / "lakes.jsonl")], config)
    one, two = (batches(dataset, tokenizer, workers) for workers in (0, 2))
    assert len(one) == 6
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        assert left["rows"] == right["rows"]
        for part in ("query", "passage", "neg_q"):
            assert torch.equal(left[part].ids, right[part].ids)
            assert left[part].lengths == right[part].lengths
        assert torch.equal(left["owner"], right["owner"])


def test_every_neg_q_names_its_own_lake(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """From file to tensor: what ``owner`` points at is the passage that the query asks about."""
    config = DataArguments([], train_group_size=4, cache_path=str(tmp_path / "cache"))
    dataset = opened([write_lakes(tmp_path / "lakes.jsonl")], config)
    asked = 0
    for batch in batches(dataset, tokenizer, workers=0):
        passages = texts_of(tokenizer, batch["passage"])
        queries = texts_of(tokenizer, batch["neg_q"])
        answered = [passages[i].strip().split(" is ")[0] for i in batch["owner"].tolist()]
        for query, lake in zip(queries, answered, strict=True):
            assert query.strip(" ?").endswith(lake)
        expected = []
        for row, text in enumerate(passages):
            lake = text.strip().split(" is ")[0]
            expected += [row] * {"1": 0, "2": 2}.get(lake.partition(".")[2], 1) if row % 4 else []
        assert batch["owner"].tolist() == expected
        asked += len(queries)
    assert asked > 24
