"""Our checkpoints in other libraries' hands: the same numbers, or a refusal, never random layers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from FlagEmbedding.modeling.backbone import load_backbone, save_checkpoint
from FlagEmbedding.modeling.encoder import EngineConfig, M3Encoder
from FlagEmbedding.modeling.interchange import REMOTE_FILE
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.modeling.tokens import TokenBatch

SCRIPT = Path(__file__).with_name("load_elsewhere.py")
TEXTS: list[str] = next(
    ast.literal_eval(node.value)
    for node in ast.parse(SCRIPT.read_text("utf-8")).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEXTS"
)
# name of the checkpoint: (base, experts, pooling, normalize)
CHECKPOINTS = {
    "xlmr-dense": ("tiny_model_dir", None, "cls", True),
    "bert-dense": ("tiny_bert_dir", None, "mean", False),
    "xlmr-inter": ("tiny_model_dir", MoEConfig(moe="intermediate", num_experts=2), "cls", True),
    "roberta-output": ("tiny_roberta_dir", MoEConfig("output", None, 3, 2), "mean", True),
    "bert-inter": ("tiny_bert_dir", MoEConfig("intermediate", None, 4, 2, "straight_through"), "cls", False),
}
EXPERTS = [name for name, (_, experts, _, _) in CHECKPOINTS.items() if experts]


@pytest.fixture(scope="module")
def elsewhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, dict[str, M3Encoder]]:
    """What the other libraries computed, in a process without this package, and our encoders."""
    root = tmp_path_factory.mktemp("elsewhere")
    encoders = {}
    for name, (base, experts, pooling, normalize) in CHECKPOINTS.items():
        folder = request.getfixturevalue(base)
        torch.manual_seed(8)
        model = load_backbone(folder, moe=experts)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        encoder = M3Encoder(model, pooling=pooling, normalize=normalize, engine=EngineConfig("padded"))
        save_checkpoint(encoder, root / "checkpoints" / name, tokenizer=AutoTokenizer.from_pretrained(folder))
        encoders[name] = encoder
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(root / "checkpoints"), str(root / "results.json")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "results.json").read_text("utf-8")), encoders


def ours(encoder: M3Encoder, folder: Path) -> tuple[Tensor, Tensor]:
    """Hidden states of real tokens and dense vectors of ``TEXTS``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    tokens = TokenBatch.from_padded(batch)
    with torch.no_grad():
        hidden = encoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        (dense,) = encoder.encode([tokens], [{"dense"}])
    assert dense.dense is not None
    return hidden[batch["attention_mask"].bool()], dense.dense


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_same_vectors(name: str, elsewhere: tuple, request: pytest.FixtureRequest) -> None:
    results, encoders = elsewhere
    assert results["imported"] is False
    states, vectors = ours(encoders[name], request.getfixturevalue(CHECKPOINTS[name][0]))
    torch.testing.assert_close(torch.tensor(results[name]["states"]), states, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(results[name]["vectors"]), vectors, rtol=0, atol=1e-5)
    unit = torch.allclose(vectors.norm(dim=-1), torch.ones(len(TEXTS)), atol=1e-5)
    assert unit == CHECKPOINTS[name][3]


@pytest.mark.parametrize("name", EXPERTS)
def test_without_trust_it_stops_instead_of_inventing_layers(name: str, elsewhere: tuple) -> None:
    results, _ = elsewhere
    for library in ("AutoModel", "SentenceTransformer"):
        assert "trust_remote_code=True" in results[name][library]


@pytest.mark.parametrize("name", EXPERTS)
def test_a_copy_saved_by_sentence_transformers_is_whole_and_guarded(name: str, elsewhere: tuple) -> None:
    results, _ = elsewhere
    copied, vectors = torch.tensor(results[name]["copied"]), torch.tensor(results[name]["vectors"])
    assert float(F.cosine_similarity(copied, vectors).min()) > 0.999999
    assert "trust_remote_code" in results[name]["copied_guard"]


def test_the_travelling_file_needs_torch_and_transformers_alone() -> None:
    roots = set()
    for node in ast.walk(ast.parse(REMOTE_FILE.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(str(node.module).split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_heads_are_in_the_form_that_upstream_reads(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir), nn.Linear(32, 24), nn.Linear(32, 1))
    save_checkpoint(encoder, tmp_path)
    for head in (encoder.colbert_linear, encoder.sparse_linear):
        name = "colbert_linear" if head is encoder.colbert_linear else "sparse_linear"
        fresh = nn.Linear(32, head.out_features)
        fresh.load_state_dict(torch.load(tmp_path / f"{name}.pt", map_location="cpu", weights_only=True))
        assert torch.equal(fresh.weight, head.weight)
        assert torch.equal(fresh.bias, head.bias)
