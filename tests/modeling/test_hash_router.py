"""A router by token ids: both engines, training, the file that travels with a checkpoint, fold, graph, merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from FlagEmbedding.export.onnx_graph import write_graph
from FlagEmbedding.finetune.arguments import MoEConfig
from FlagEmbedding.inference.embedder import FlagModel
from FlagEmbedding.merge.__main__ import main as merge_main
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, select_trainable
from FlagEmbedding.modeling.encoder import EngineConfig, M3Encoder
from FlagEmbedding.modeling.folding import fold_experts
from FlagEmbedding.modeling.moe import record_routing
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.errors import UsageError

HASH = {"moe": "intermediate", "num_experts": 3, "router": "hash"}
TEXTS = ["The Han river runs through Seoul.", "A castle by the sea.", "Snow.", "Which river runs through the north?"]


def expert_of(token: int, experts: int = 3) -> int:
    """Knuth's multiplicative hash in plain integers: the upper half of 32 bits."""
    return ((token * 2654435761 & 0xFFFFFFFF) >> 16) % experts


def apart(backbone: torch.nn.Module) -> None:
    """Experts that differ, so that a wrong one shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in moe_layers(backbone):
            for parameter in layer.experts.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def trained(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of run.py with gradient caching."""
    folder = tmp_path_factory.mktemp("hash")
    write_rows(folder / "data/a.jsonl", rows(12))
    options = {"max_steps": 2, "grad_cache": True, "slab_tokens": 60, "learning_rate": 2e-2, "weight_decay": 0.1}
    answer = run_training(train_words(tiny_model_dir, folder / "data", folder / "out", **options, **HASH))
    assert "routing stays random" not in answer.stderr
    (last,) = log_lines(folder / "out")[-1:]
    assert last["router_changed"] == 0 and last["router_entropy"] == 0
    return folder / "out"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("place", ["intermediate", "output"])
def test_every_way_of_computing_gives_the_same(place: str, pooling: str, tiny_model_dir: Path) -> None:
    """Engines, slabs, gradient caching and recomputed layers: vectors and gradients; the choice is that of the ids."""
    backbone = load_backbone(tiny_model_dir, moe=MoEConfig(place, num_experts=3, router="hash")).double()
    apart(backbone)
    select_trainable(backbone, None)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = TokenBatch.from_lists(tokenizer(TEXTS)["input_ids"])
    found = []
    for engine in (
        EngineConfig("padded"), EngineConfig(), EngineConfig(slab_tokens=12),
        EngineConfig(slab_tokens=12, grad_cache=True), "recomputed",
    ):  # fmt: skip
        given = EngineConfig(slab_tokens=12) if engine == "recomputed" else engine
        encoder = M3Encoder(backbone, pooling=pooling, engine=given).train()
        if engine == "recomputed":
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        encoder.zero_grad()
        with record_routing(backbone) as tape:
            dense = encoder.encode([tokens], [{"dense"}])[0].dense
        dense.square().mul(torch.arange(1.0, 33)).sum().backward()
        assert all(layer.gate.weight.grad is None for layer in moe_layers(backbone))
        chosen = torch.bincount(torch.cat([call.experts for call in tape.layers[0]])[:, 0], minlength=3)
        own = None if engine == "recomputed" else chosen.tolist()  # which records again
        found.append((dense.detach(), [p.grad.clone() for p in backbone.parameters() if p.requires_grad], own))
    expected = torch.bincount(torch.tensor([expert_of(i) for i in tokens.ids.tolist()]), minlength=3)
    assert (expected > 0).sum() > 1
    for dense, gradients, chosen in found:
        torch.testing.assert_close(dense, found[0][0], rtol=0, atol=1e-10)
        assert chosen is None or chosen == expected.tolist()
        for ours, theirs in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_a_checkpoint_says_its_router_and_serves_everywhere(trained: Path, tmp_path: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert (config["moe"], config["num_experts"], config["router"]) == ("intermediate", 3, "hash")
    state = load_file(trained / "model.safetensors")
    assert not any(value.any() for name, value in state.items() if name.endswith("gate.weight")), "nobody trains a gate"
    vectors = FlagModel(str(trained)).encode(TEXTS)
    assert abs(FlagModel(str(trained), engine="padded").encode(TEXTS) - vectors).max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(trained)
    remote = AutoModel.from_pretrained(trained, trust_remote_code=True).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = remote(**batch).last_hidden_state
        with pytest.raises(ValueError, match="give input_ids"):
            remote(inputs_embeds=remote.embeddings.word_embeddings(batch["input_ids"]))
    theirs = torch.nn.functional.normalize(states[:, 0], dim=-1).numpy()
    assert abs(theirs - vectors).max() < 1e-5

    backbone = load_backbone(trained)
    encoder = M3Encoder(backbone, engine=EngineConfig("padded")).eval()
    write_graph(encoder, ["dense"], tmp_path / "graph/model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "graph/model.onnx"))
    fed = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    assert abs(session.run(["dense"], fed)[0] - vectors).max() < 1e-5
    fold_experts(backbone, [[1 / 3] * 3] * 2)
    assert not hasattr(backbone.config, "router") and not moe_layers(backbone)


def test_it_is_trained_further_merged_and_not_taken_for_another(
    trained: Path, tiny_moe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "data/a.jsonl", rows(8))
    words = train_words(trained, tmp_path / "data", tmp_path / "out", max_steps=1, only_train="intermediate")
    run_training(words)
    assert json.loads((tmp_path / "out/config.json").read_text())["router"] == "hash"
    for more, message in (
        ({"router_aux_loss_coef": 0.1}, "--router_aux_loss_coef 0.1 has no effect with a router by hash"),
        ({"activation_checkpointing": True, "engine": "padded"}, "without the token ids that a router by hash reads"),
    ):
        answer = run_training([*words, *(w for k, v in more.items() for w in (f"--{k}", str(v)))], check=False)
        assert answer.returncode == 2 and message in answer.stderr, answer.stderr
    for method in ("linear", "slerp"):
        merged = tmp_path / method
        assert merge_main([str(trained), str(tmp_path / "out"), "--output_dir", str(merged), "--method", method]) == 0
        assert json.loads((merged / "config.json").read_text())["router"] == "hash"
        assert all(value.isfinite().all() for value in load_file(merged / "model.safetensors").values())
    other = shutil.copytree(trained, tmp_path / "learned")
    fields = json.loads((other / "config.json").read_text())
    fields.pop("router")
    (other / "config.json").write_text(json.dumps(fields))
    assert merge_main([str(trained), str(other), "--output_dir", str(tmp_path / "no")]) == 2
    assert "router hash" in capsys.readouterr().err
    with pytest.raises(UsageError, match="and --router hash, contradicts"):
        load_backbone(other, moe=MoEConfig("intermediate", num_experts=3, router="hash"))
    assert "router" not in json.loads((tiny_moe_dir / "config.json").read_text()), "the published four, no more"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"router": "hash"}, "--router hash has no effect without --moe"),
        ({"moe": "output", "router": "hash"}, "--router hash has no effect with one expert"),
        ({**HASH, "num_experts_per_tok": 2}, "sends each token to one expert"),
        ({**HASH, "router_gradient": "straight_through"}, "--router_gradient has no effect with --router hash"),
        ({**HASH, "router_jitter": 0.1}, "--router_jitter has no effect with --router hash"),
        ({**HASH, "router": "random"}, "--router must be learned or hash, got 'random'"),
    ],
)
def test_refused(values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MoEConfig(**values)
