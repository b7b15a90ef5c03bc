"""What the log says of the routers: sums over forwards of unequal size, and the tokens that changed their expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.helpers import rows, train_words, write_rows
from transformers import AutoTokenizer

from FlagEmbedding import BGEM3Model
from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.router_monitor import PROBE_PASSAGES, RouterMonitor
from FlagEmbedding.finetune.runner import build_trainer
from FlagEmbedding.losses import objective
from FlagEmbedding.losses.router import z_loss
from FlagEmbedding.modeling.backbone import moe_layers
from FlagEmbedding.modeling.tokens import TokenBatch

# Two layers of three experts, two chosen per token; the second layer sees fewer tokens.
FORWARDS = [[(4, 2), (2, 2)], [(1, 2), (1, 2)]]


def routing(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed))
    return logits, logits.topk(2, dim=-1).indices


@pytest.fixture(scope="module")
def model(tiny_moe_dir: Path) -> BGEM3Model:
    return BGEM3Model(str(tiny_moe_dir), unified_finetuning=False, router_jitter=0.5).train()


@pytest.fixture(scope="module")
def passages(tiny_moe_dir: Path) -> TokenBatch:
    texts = [f"The {name} river ends in the sea." for name in ("Han", "Geum", "Imjin", "Nakdong")] * 5
    return TokenBatch.from_lists(AutoTokenizer.from_pretrained(tiny_moe_dir)(texts)["input_ids"])


def test_load_and_entropy_are_over_all_tokens_since_the_last_line(model: BGEM3Model) -> None:
    monitor = RouterMonitor()
    forwards = [
        [routing(n, seed=10 * f + n + layer) for layer, (n, _) in enumerate(one)] for f, one in enumerate(FORWARDS)
    ]
    for _ in range(2):  # the second line starts from zero, and says the same of the same forwards
        for layers in forwards:
            monitor.observe(layers)
        summary = monitor.summary(model)
        for layer in range(2):
            logits = torch.cat([layers[layer][0] for layers in forwards])
            chosen = torch.cat([layers[layer][1] for layers in forwards]).flatten().tolist()
            assert summary["router_load"][layer] == pytest.approx(
                [chosen.count(e) / len(chosen) for e in range(3)], abs=1e-6
            )
            entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
            assert summary["router_entropy_per_layer"][layer] == pytest.approx(float(entropy), abs=1e-6)
        shares = [share for layer in summary["router_load"] for share in layer]
        assert (summary["router_load_min"], summary["router_load_max"]) == pytest.approx(
            (min(shares), max(shares)), abs=1e-6
        )
        assert summary["router_entropy"] == pytest.approx(sum(summary["router_entropy_per_layer"]) / 2, abs=1e-6)
        assert "router_changed" not in summary
    assert monitor.summary(model) == {}


def test_changed_is_measured_from_the_first_batch_without_noise(model: BGEM3Model, passages: TokenBatch) -> None:
    monitor = RouterMonitor()
    monitor.start_probe(model, passages)
    monitor.start_probe(model, passages.select([0]))  # the first batch stays the probe
    assert model.training, "as it was"
    monitor.observe([routing(3, 1), routing(3, 2)])
    still = monitor.summary(model)
    assert still["router_changed"] == 0.0, "neither dropout nor jitter changes the probe's routing"
    assert model.training
    with torch.no_grad():
        for layer in moe_layers(model.model):
            layer.gate.weight.copy_(-layer.gate.weight)
    monitor.start_probe(model, passages)  # the next batch: what counts is the routing before the first step
    monitor.observe([routing(3, 1), routing(3, 2)])
    turned = monitor.summary(model)
    assert turned["router_changed_per_layer"][0] == 1.0, "of two experts every token takes the other"
    assert turned["router_changed"] == pytest.approx(sum(turned["router_changed_per_layer"]) / 2, abs=1e-6)
    with torch.no_grad():
        for layer in moe_layers(model.model):
            layer.gate.weight.copy_(-layer.gate.weight)


def test_a_token_has_changed_when_any_of_its_experts_has(tiny_model_dir: Path, passages: TokenBatch) -> None:
    """Two of three chosen; the gate's rows move on by one: every pair becomes another that may share an expert."""
    torch.manual_seed(3)
    settings = {"unified_finetuning": False, "moe": "output", "num_experts": 3, "num_experts_per_tok": 2}
    model = BGEM3Model(str(tiny_model_dir), **settings)
    monitor = RouterMonitor()
    monitor.start_probe(model, passages)
    with torch.no_grad():
        gate = moe_layers(model.model)[0].gate
        gate.weight.copy_(gate.weight.roll(1, dims=0))
    monitor.observe([routing(3, 1), routing(3, 2)])
    assert monitor.summary(model)["router_changed_per_layer"][0] == 1.0


def test_a_checkpoint_carries_probe_and_sums(model: BGEM3Model, passages: TokenBatch, tmp_path: Path) -> None:
    monitor = RouterMonitor()
    monitor.save(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing to carry yet"
    monitor.start_probe(model, passages)
    monitor.observe([routing(4, 1), routing(2, 2)])
    monitor.save(tmp_path)
    other = RouterMonitor()
    other.load(tmp_path / "nowhere", torch.device("cpu"))
    other.load(tmp_path, torch.device("cpu"))
    for one in (monitor, other):
        one.observe([routing(3, 3), routing(1, 4)])
    assert other.summary(model) == monitor.summary(model) != {}
    (probe,) = tmp_path.iterdir()
    other.save(tmp_path)  # between two lines there is nothing to sum, and the probe is the same
    assert probe.stat().st_size > 0
    assert other._probe is not None and len(other._probe) == PROBE_PASSAGES


@pytest.mark.parametrize(
    ("words", "logged"),
    [
        ({"logging_steps": 3}, [3, 6]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4]),
        ({"logging_strategy": "epoch"}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_losses_without_a_weight_are_computed_where_they_are_logged(
    words: dict[str, Any], logged: list[int], tiny_moe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a run that logs each; of another only at its log lines, where they say the same."""
    computed: list[int] = []
    every_step: dict[int, float] = {}
    for options in ({"logging_steps": 1}, words):
        data = write_rows(tmp_path / "rows.jsonl", rows(12))
        settings = {"max_steps": 6, "cache_path": tmp_path / "cache", "overwrite_output_dir": True, **options}
        trainer = build_trainer(parse_arguments(train_words(tiny_moe_dir, data, tmp_path / "out", **settings)))

        def counted(logits: torch.Tensor, trainer: Any = trainer) -> torch.Tensor:
            computed.append(trainer.state.global_step + 1)
            return z_loss(logits)

        monkeypatch.setattr(objective, "z_loss", counted)
        computed.clear()
        trainer.train()
        assert computed == [step for step in (range(1, 7) if options is not words else logged) for _ in range(2)]
        lines = {line["step"]: line["router_z_loss"] for line in trainer.state.log_history if "router_load" in line}
        every_step = every_step or lines
        if "logging_strategy" not in words:
            assert lines == {step: every_step[step] for step in lines}
