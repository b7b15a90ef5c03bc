"""One model used by several threads: every call gives the bits that it gives alone."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from FlagEmbedding import BGEM3FlagModel, FlagModel
from FlagEmbedding.inference.scores import colbert_score
from FlagEmbedding.modeling.slabs import Layout, each_on_one_thread
from FlagEmbedding.modeling.tokens import TokenBatch

TEXTS = [("river " * (7 * i % 90)) + "강은 서울을 지나 서해로 흘러든다." * (i % 3) for i in range(24)]
EVERYTHING = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
Call = Callable[[], Any]


@pytest.fixture(autouse=True)
def two_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def calls(model: Any, **words: Any) -> list[Call]:
    """Calls of every verb that cut at different lengths, some of one slab, some of several."""
    found: list[Call] = [
        lambda: model.encode_queries(TEXTS[:3], max_length=5, **words),
        lambda: model.encode_corpus(TEXTS, max_length=100, **words),
        lambda: model.encode(TEXTS[::2], max_length=40, batch_size=2, **words),
        lambda: model.encode(TEXTS[7], max_length=12, **words),
    ]
    if isinstance(model, BGEM3FlagModel):
        pairs = list(zip(TEXTS[:6], TEXTS[12:18], strict=True))
        found.append(lambda: model.compute_score(pairs, max_query_length=6, max_passage_length=90))
    return found


def bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    return [bits(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("kind", "fixture", "words", "settings"),
    [
        (FlagModel, "tiny_heads_dir", {}, {}),
        (FlagModel, "tiny_heads_dir", {}, {"dtype": "bf16"}),
        (FlagModel, "tiny_heads_dir", {}, {"devices": ["cpu", "cpu"]}),
        (FlagModel, "tiny_moe_dir", {}, {}),
        (FlagModel, "tiny_moe_dir", {}, {"engine": "padded"}),
        (BGEM3FlagModel, "tiny_heads_dir", EVERYTHING, {}),
    ],
)
def test_four_threads_get_what_one_gets(
    kind: type[Any], fixture: str, words: dict[str, Any], settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = kind(str(request.getfixturevalue(fixture)), **settings)
    verbs = calls(model, **words)
    alone = [bits(call()) for call in verbs]
    start = threading.Barrier(4)

    def work(own: int) -> list[tuple[int, Any]]:
        start.wait()
        order = itertools.islice(itertools.cycle(range(len(verbs))), own, own + 2 * len(verbs))
        return [(number, bits(verbs[number]())) for number in order]

    with ThreadPoolExecutor(4) as pool:
        for number, found in itertools.chain.from_iterable(pool.map(work, range(4))):
            assert found == alone[number], f"call {number} gives something else beside others"


def test_a_colbert_score_has_the_same_bits_on_any_number_of_threads() -> None:
    generator = np.random.default_rng(0)
    reps = [generator.standard_normal((n, 64), dtype=np.float32) for n in range(3, 200, 7)]
    found = []
    for number in (1, 2, 4):
        torch.set_num_threads(number)
        found.append([colbert_score(q, p).item() for q, p in itertools.pairwise(reps)])
        assert torch.get_num_threads() == number
    assert found[0] == found[1] == found[2]


def test_a_slab_stays_on_one_thread_while_others_set_their_number() -> None:
    """torch takes the process's number of threads over at a thread's first computation, after the pool has begun."""
    numbers, entered, other_is_done = [], threading.Event(), threading.Event()

    def count(slab: TokenBatch, _: Layout) -> TokenBatch:
        entered.set()
        other_is_done.wait(20)
        numbers.append(torch.get_num_threads())
        return slab

    def other() -> None:
        entered.wait(20)
        torch.set_num_threads(2)
        other_is_done.set()

    beside = threading.Thread(target=other)
    beside.start()
    cpu = torch.device("cpu")
    each_on_one_thread(count, [TokenBatch.from_lists([[1, 2]])] * 2, [Layout([2], cpu)] * 2, cpu)
    beside.join()
    assert numbers == [1, 1]
    assert torch.get_num_threads() == 2


def test_a_model_with_running_workers_is_copied_and_stored(tiny_heads_dir: Path) -> None:
    model = FlagModel(str(tiny_heads_dir), workers=1)
    expected = model.encode(TEXTS)
    with ThreadPoolExecutor(2) as pool:  # the workers are shared, and started once
        assert all(np.array_equal(found, expected) for found in pool.map(model.encode, [TEXTS, TEXTS]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(other.encode(TEXTS), expected)
        other._encoders[0].pool.close()
    model._encoders[0].pool.close()
