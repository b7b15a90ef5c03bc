"""``--plan`` against the run that it speaks of: its figures are the run's, its refusals too, and nothing is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune.dev_data import write_dev
from finetune.helpers import TOGETHER, rows, run_training, train_words, write_rows
from safetensors.torch import load_file

from FlagEmbedding import FlagModel
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.finetune.data import counts
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.plan import plan
from FlagEmbedding.finetune.probe import KeptBytes
from FlagEmbedding.modeling.tokens import TokenBatch

MOE: dict[str, Any] = {
    "moe": "intermediate", "num_experts": 2, "only_train": "intermediate", "router_gradient": "straight_through",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "b.jsonl", rows(9))
    return write_rows(folder / "a.jsonl", rows(14)).parent


def files(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*") if p.suffix != ".lock"}


def printed(words: list[str], launcher: list[str] | None = None) -> dict[str, str]:
    """The lines of the block by their names."""
    out = run_training([*words, "--plan"], launcher).stdout
    (text,) = re.findall(r"the run would be:\n((?:  .*\n)+)", out)
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines())


def number(text: str) -> int:
    return int(re.findall(r"[\d,]+", text)[0].replace(",", ""))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What a run encodes: lengths by role, and passages in the softmax."""
    found: dict[str, list[Any]] = {"negatives": [], "roles": []}
    forward = BiEncoder.forward

    def look(model: BiEncoder, *args: Any, **kwargs: Any) -> Any:
        output = forward(model, *args, **kwargs)
        found["negatives"].append(output.scores.shape[1] - 1)
        found["roles"].append({k: v.lengths for k, v in kwargs.items() if isinstance(v, TokenBatch)})
        return output

    monkeypatch.setattr(BiEncoder, "forward", look)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {**MOE, "max_steps": None, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": 9, "penalty_weight": 0, "query_max_len": 9, "passage_max_len": 20, "save_strategy": "no"},
        {"max_steps": 2, "penalty_weight": 0, "neg_q_as_rows": True, "ema_decay": 0.9, "mask_twins": True},
        {"unified_finetuning": True, "max_steps": 2, "eval_rows": 4, "eval_steps": 1, "train_group_size": 2},
    ],
)
def test_the_figures_are_those_of_the_run(
    options: dict[str, Any], tiny_model_dir: Path, data: Path, tmp_path: Path, seen: dict[str, list[Any]]
) -> None:
    output = tmp_path / "out"
    words = train_words(tiny_model_dir, data, output, **options, cache_path=tmp_path / "cache")
    before = files(tmp_path)
    said = printed(words)
    assert files(tmp_path) == before and not output.exists()
    for each in seen.values():
        each.clear()
    run_training(words)
    state = json.loads((output / "trainer_state.json").read_text())
    tensors = load_file(output / "model.safetensors")
    whole = sum(t.numel() for t in tensors.values())
    whole += sum(t.numel() for p in output.glob("*_linear.pt") for t in torch.load(p, weights_only=True).values())
    trained = sum(t.numel() for k, t in tensors.items() if ".intermediate.dense." in k) if "moe" in options else whole
    assert said["trained"] == f"{trained:,} of {whole:,} parameters"
    assert number(said["steps"]) == state["global_step"]
    assert float(said["epochs"]) == pytest.approx(state["epoch"], abs=0.006)
    total = sum(sum(lengths) for batch in seen["roles"] for lengths in batch.values())
    assert state["num_input_tokens_seen"] == total > 0
    assert said["tokens in all"] == f"{total:,}, {round(total / state['global_step']):,} per step (counted)"
    fewest, most = min(seen["negatives"]), max(seen["negatives"])
    assert said["negatives"].startswith(f"{most}" if fewest == most else f"{fewest} to {most}")
    padded = sum(len(lengths) * max(lengths) for batch in seen["roles"] for lengths in batch.values())
    assert said["padding"].startswith(f"{1 - total / padded:.1%}")
    assert ("router" in said) == ("moe" in options)
    # An AdamW keeps two numbers for every one it trains, and counts its steps.
    mib = 4 * trained / 2**20
    assert f"gradients {mib:.1f} MiB, optimizer {2 * mib:.1f} MiB" in said["memory"]
    assert f"weights {4 * whole / 2**20:.1f} MiB" in said["memory"]
    assert (f", averaged weights and guide {mib:.1f} MiB" in said["memory"]) == ("ema_decay" in options)


def test_what_is_cut(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", query_max_len=5, passage_max_len=400)
    cut = printed(words)["cut"]
    assert cut == (
        "100.0% of the queries (--query_max_len 5), 0.0% of the passages (--passage_max_len 128), 0.0% of the queries "
        "of negatives (--passage_max_len 128)"  # what the model reads
    )


def test_a_long_run_is_estimated(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", max_steps=None, num_train_epochs=50)
    monkeypatch.setattr(counts, "MOST_ROWS", 10**6)
    exact = plan(parse_arguments(words))
    monkeypatch.setattr(counts, "MOST_ROWS", 12)
    rough = plan(parse_arguments(words))
    assert exact.counts.counted and not rough.counts.counted and rough.counts.looked_at == 6
    assert rough.tokens != exact.tokens and rough.tokens == pytest.approx(exact.tokens, rel=0.05)
    assert f"estimated from 6 of {exact.counts.every:,} batches" in rough.text()


def test_margins_and_steps_under_the_base(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Margins by the published face of the encoder; three steps move no weight of the base."""
    before = files(tiny_model_dir)
    words = train_words(
        tiny_model_dir, data / "a.jsonl", tmp_path / "out", train_group_size=5, sentence_pooling_method="mean",
        query_instruction_for_retrieval="find: ",
    )  # fmt: skip
    found = plan(parse_arguments(words))
    model = FlagModel(
        str(tiny_model_dir), pooling_method="mean", query_instruction_for_retrieval="find: ", passage_max_length=48,
        query_max_length=24,
    )  # fmt: skip
    expected = []
    for row in rows(14):
        query, passages = model.encode_queries([row["query"]]), model.encode_corpus([*row["pos"], *row["neg"]])
        scores = (query @ passages.T)[0]
        expected.append(sorted(scores[0] - scores[1:]))
    np.testing.assert_allclose(np.sort(found.base.margins, axis=1), expected, atol=1e-5)
    low = float(np.median([own[0] for own in expected]))
    assert f"14 rows: median {low:+.3f}, 80 % from" in found.text()
    assert files(tiny_model_dir) == before and found.cost.seconds > 0


def test_a_checkpoint_that_the_run_would_go_on_from(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = train_words(tiny_model_dir, data, output, max_steps=4, save_strategy="steps", save_steps=3)
    run_training(words)
    before = files(output)
    more = [*words, "--resume_from_checkpoint", str(output / "checkpoint-3")]
    assert "for 1 steps of" in printed(more)["time"]
    refused = ([*words], [*more, "--learning_rate", "0.5"], [*words, "--resume_from_checkpoint", str(tmp_path)])
    for each in refused:
        assert same_refusal(each)
    printed([*words, "--overwrite_output_dir", "True"])  # which would remove what is there
    assert files(output) == before


def same_refusal(words: list[str]) -> str:
    """The one line that a run and its plan are refused with."""
    answers = [run_training([*words, *more], check=False) for more in ([], ["--plan"])]
    lines = [[line for line in answer.stderr.splitlines() if line.startswith("error: ")] for answer in answers]
    assert [answer.returncode for answer in answers] == [2, 2] and lines[0] == lines[1] and len(lines[0]) == 1
    assert not any("Traceback" in answer.stderr for answer in answers)
    return lines[0][0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"fix_encoder": True}, "--fix_encoder"),
        ({"model_name_or_path": "/nowhere/at/all"}, "neither a checkpoint folder nor a hub id"),
        ({"router_z_loss_coef": 0.1}, "has no effect without experts"),
        ({"query_max_len": 2}, "special tokens take"),
        ({"eval_rows": 1000}, "holds out all"),
        ({"knowledge_distillation": True}, "no row of the training data has them"),
        ({"learning_rate": 1e30, "max_steps": 3}, "the loss is nan at step 2"),
    ],
)
def test_refusals_are_those_of_the_run(
    options: dict[str, Any], part: str, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    assert part in same_refusal(train_words(tiny_model_dir, data, tmp_path / "out", **options))


def test_a_collection_that_is_missing_and_one_that_is_there(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", eval_data_dir=tmp_path / "dev", eval_steps=1)
    words += ["--eval_languages", "ko"]
    same_refusal(words)
    write_dev(tmp_path / "dev", "ko", 20)
    assert "and the evaluations beside them" in printed(words)["time"] and not (tmp_path / "out").exists()


def test_no_negatives_are_mined_for_a_plan(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Three steps are more than an epoch here; the run itself mines after each."""
    write_rows(tmp_path / "rows/a.jsonl", rows(4))
    words = train_words(
        tiny_model_dir, tmp_path / "rows", tmp_path / "out", refresh_negatives_every_n_epochs=1, max_steps=None,
        num_train_epochs=3, refresh_range_for_sampling="0-9",
    )  # fmt: skip
    answer = run_training([*words, "--plan"])
    assert "with the negatives of now" in answer.stdout and "mining negatives again" not in answer.stderr
    assert re.search(r"steps +6, 2 per epoch", answer.stdout)


def test_two_processes_with_shared_negatives(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(
        tiny_model_dir, data, tmp_path / "out", negatives_cross_device=True, same_task_within_batch=None
    )
    said = printed(words, TOGETHER)
    assert said["negatives"].startswith(f"{2 * 2 * 3 - 1} in the softmax per query: 2 of its own row")
    assert said["step"].startswith("4 queries: 2 at a time x 2 process(es)") and not (tmp_path / "out").exists()


def test_bytes_kept_for_the_backward_pass() -> None:
    weight = torch.ones(10, requires_grad=True)
    kept = KeptBytes({weight.untyped_storage().data_ptr()})
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        product = torch.arange(10.0) * weight  # keeps the numbers; the weight lies in memory anyway
        assert kept.most == 40
        loss = product.exp().exp().sum()  # keeps both of its results
        assert kept.most == 120
    loss.backward()
    assert kept.now == 0 and kept.most == 120
    assert weight.grad is not None and bool(torch.isfinite(weight.grad[0]))


def test_gradient_caching_keeps_less(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    def kept(**options: Any) -> int:
        words = train_words(tiny_model_dir, data, tmp_path / "out", per_device_train_batch_size=4, **options)
        return plan(parse_arguments(words)).cost.activations

    whole = kept()
    assert kept(grad_cache=True, slab_tokens=64) < 0.5 * whole
