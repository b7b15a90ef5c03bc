"""Checkpoints: what is saved is what loads, whatever the layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from modeling.checkpoints import apart, same_weights, states
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from FlagEmbedding.modeling.backbone import (
    insert_experts,
    load_backbone,
    load_trained_state,
    moe_layers,
    save_checkpoint,
)
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.heads import load_heads, save_heads
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.utils.errors import DataError, UsageError

FAMILIES = ["tiny_model_dir", "tiny_roberta_dir", "tiny_bert_dir"]


class LoopExperts(nn.Module):
    """The published layer written as loops, for a model that transformers itself computes around it."""

    def __init__(self, weights: dict[str, Tensor], per_token: int) -> None:
        super().__init__()
        self.weights, self.per_token = weights, per_token

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            logits = self.weights["gate.weight"] @ token
            chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: self.per_token]
            shares = torch.softmax(torch.stack([logits[e] for e in chosen]), dim=0)
            outputs = [self.weights[f"experts.{e}.weight"] @ token + self.weights[f"experts.{e}.bias"] for e in chosen]
            rows.append(sum(share * output for share, output in zip(shares, outputs, strict=True)))
        return torch.stack(rows).reshape(*x.shape[:-1], -1)


# ---- dense ----


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_loads_like_transformers_and_saves_again(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(family)
    ours = load_backbone(folder)
    theirs = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert same_weights(ours, theirs)
    assert torch.equal(states(ours), states(theirs))
    save_checkpoint(apart(ours), tmp_path / "out")
    again = load_backbone(tmp_path / "out")
    assert same_weights(ours, again)
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    assert config["architectures"] == [type(theirs).__name__]
    assert not {"auto_map", "transformers_weights"} & set(config)
    assert not list((tmp_path / "out").glob("*.py"))


def test_checkpoint_of_a_language_model_in_a_pickle(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As older hub repositories are: prefixed keys, a head, a pooler, stored position ids, pytorch_model.bin."""
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    state = {f"roberta.{key}": value for key, value in load_file(tiny_model_dir / "model.safetensors").items()}
    state["roberta.embeddings.position_ids"] = torch.arange(130)[None]
    state["roberta.pooler.dense.weight"] = torch.randn(32, 32)
    state["lm_head.bias"] = torch.randn(400)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert same_weights(load_backbone(tmp_path), load_backbone(tiny_model_dir))


@pytest.mark.parametrize("folder_fixture", ["tiny_model_dir", "tiny_moe_dir"])
def test_shards(folder_fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = load_backbone(request.getfixturevalue(folder_fixture))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same_weights(load_backbone(tmp_path), model)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=f"lacks {shard.name}, one of"):
        load_backbone(tmp_path)


def test_half_precision(tiny_moe_dir: Path) -> None:
    model = load_backbone(tiny_moe_dir, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_another_configuration(tiny_model_dir: Path, tiny_moe_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.hidden_dropout_prob = 0.25
    for folder, experts in ((tiny_model_dir, 0), (tiny_moe_dir, 2)):
        model = load_backbone(folder, config=config)
        assert model.config.hidden_dropout_prob == model.encoder.layer[0].output.dropout.p == 0.25
        assert len(moe_layers(model)) == experts
        assert same_weights(model, load_backbone(folder))
    assert getattr(config, "moe", None) is None  # the caller's object is not touched


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hub_id_from_the_local_cache(weights: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The cache's own layout; the tests run offline."""
    repository = tmp_path / "models--Org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40, "utf-8")
    shutil.copy(tiny_model_dir / "config.json", snapshot)
    state = load_file(tiny_model_dir / "model.safetensors")
    if weights.endswith(".bin"):
        torch.save(state, snapshot / weights)
    else:
        save_file(state, snapshot / weights, metadata={"format": "pt"})
    model = load_backbone("Org/name", cache_dir=str(tmp_path))
    assert same_weights(model, load_backbone(tiny_model_dir))


# ---- experts ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["intermediate", "output"])
def test_upcycled_saved_and_loaded(family: str, place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(family)
    settings = MoEConfig(moe=place, only_train=place, num_experts=3, num_experts_per_tok=2)
    model = load_backbone(folder, moe=settings)
    for layer in moe_layers(model):
        assert layer.gate.bias is None
        assert layer.gate.weight.shape == (3, 32 if place == "intermediate" else 48)
        assert len({expert.weight.data_ptr() for expert in layer.experts}) == 3
    save_checkpoint(apart(model), tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert f"encoder.layer.1.{place}.dense.experts.2.bias" in keys
    assert f"encoder.layer.0.{place}.dense.gate.weight" in keys
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    stored = {name: config[name] for name in ("moe", "num_experts", "num_experts_per_tok", "only_train")}
    assert stored == {"moe": place, "num_experts": 3, "num_experts_per_tok": 2, "only_train": place}
    assert config["model_type"] == AutoConfig.from_pretrained(folder).model_type

    for request_ in (None, MoEConfig(), settings, MoEConfig(moe=place)):
        again = load_backbone(tmp_path, moe=request_)
        assert same_weights(again, model)
        assert type(again) is type(model)
        assert torch.equal(states(again), states(model))


def test_training_goes_on_from_a_moe_checkpoint(tiny_moe_dir: Path, tmp_path: Path) -> None:
    model = load_backbone(tiny_moe_dir, moe=MoEConfig(router_gradient="straight_through", router_jitter=0.1))
    assert {(layer.router_gradient, layer.router_jitter) for layer in moe_layers(model)} == {("straight_through", 0.1)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(6, 300, (4, 9))
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0, :4].sum().backward()
    optimizer.step()
    gate = "encoder.layer.0.intermediate.dense.gate.weight"
    assert not torch.equal(model.state_dict()[gate], before[gate])
    save_checkpoint(model, tmp_path)
    assert same_weights(load_backbone(tmp_path), model)


@pytest.mark.parametrize(("place", "experts", "per_token"), [("intermediate", 2, 1), ("output", 3, 2)])
def test_published_layout(place: str, experts: int, per_token: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    """config.json and keys as the published code wrote them; the numbers equal loops inside transformers' model."""
    base = AutoConfig.from_pretrained(tiny_model_dir).to_dict()
    base = {key: value for key, value in base.items() if key != "dtype"}
    published = base | {
        "_name_or_path": "BAAI/bge-m3",
        "architectures": ["XLMRobertaModel"],
        "torch_dtype": "float32",
        "transformers_version": "4.45.2",
        "moe": place,
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "only_train": place,
    }
    (tmp_path / "config.json").write_text(json.dumps(published), "utf-8")
    generator = torch.Generator().manual_seed(2)
    state = {}
    for key, value in load_file(tiny_model_dir / "model.safetensors").items():
        if f".{place}.dense." in key and ".attention." not in key:
            stem, kind = key.rsplit(".", 1)
            for e in range(experts):
                state[f"{stem}.experts.{e}.{kind}"] = value + torch.randn(value.shape, generator=generator) * 0.1
            if kind == "weight":
                state[f"{stem}.gate.weight"] = torch.randn(experts, value.shape[1], generator=generator)
        else:
            state[key] = value
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    heads = {"colbert": nn.Linear(32, 32), "sparse": nn.Linear(32, 1)}
    for name, head in heads.items():
        torch.save(head.state_dict(), tmp_path / f"{name}_linear.pt")

    expected = AutoModel.from_pretrained(tiny_model_dir, add_pooling_layer=False).eval()
    for number, layer in enumerate(expected.encoder.layer):
        prefix = f"encoder.layer.{number}.{place}.dense."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        getattr(layer, place).dense = LoopExperts(own, per_token)
    ours = load_backbone(tmp_path)
    torch.testing.assert_close(states(ours), states(expected), rtol=0, atol=1e-5)
    colbert, sparse, found = load_heads(tmp_path, 32)
    assert found
    assert torch.equal(colbert.weight, heads["colbert"].weight)
    assert torch.equal(sparse.bias, heads["sparse"].bias)


# ---- saving ----


def wrapped(folder: Path, moe: MoEConfig | None = None) -> M3Encoder:
    torch.manual_seed(6)
    return M3Encoder(load_backbone(folder, moe=moe), nn.Linear(32, 16), nn.Linear(32, 1), pooling="mean")


def test_whole_checkpoint_of_an_encoder(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder = wrapped(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    save_checkpoint(encoder, tmp_path, tokenizer=tokenizer)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    pooling = json.loads((tmp_path / "1_Pooling/config.json").read_text("utf-8"))
    assert pooling["pooling_mode_mean_tokens"] is True
    assert pooling["pooling_mode_cls_token"] is False
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"] == 128
    state = torch.load(tmp_path / "colbert_linear.pt", weights_only=True)
    assert torch.equal(state["weight"], encoder.colbert_linear.weight)
    assert AutoTokenizer.from_pretrained(tmp_path)("한강").input_ids == tokenizer("한강").input_ids

    other = wrapped(tiny_model_dir)
    apart(other)
    load_trained_state(other, tmp_path)
    assert same_weights(other, encoder)


def test_state_gathered_elsewhere(tiny_moe_dir: Path, tmp_path: Path) -> None:
    encoder = wrapped(tiny_moe_dir)
    gathered = {key: value + 1 for key, value in encoder.state_dict().items()}
    save_checkpoint(encoder, tmp_path, state_dict=gathered)
    load_trained_state(encoder, tmp_path)
    assert all(torch.equal(value, gathered[key]) for key, value in encoder.state_dict().items())


def test_continuing_needs_the_same_model(tiny_model_dir: Path, tiny_moe_dir: Path, tmp_path: Path) -> None:
    save_checkpoint(wrapped(tiny_model_dir), tmp_path)
    with pytest.raises(DataError, match="another model") as caught:
        load_trained_state(wrapped(tiny_moe_dir), tmp_path)
    assert "\n" not in str(caught.value)


def test_saving_over_an_older_checkpoint_leaves_nothing_that_contradicts_it(
    tiny_model_dir: Path, tiny_moe_dir: Path, tmp_path: Path
) -> None:
    save_checkpoint(wrapped(tiny_moe_dir), tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}", "utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    for name in ("2_Dense/config.json", "2_Dense/model.safetensors", "3_Dense/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("an older checkpoint's, or somebody's")
    assert list(tmp_path.glob("*.py"))
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path, normalize=False)
    assert not [*tmp_path.glob("*.py"), *tmp_path.glob("*.pt"), *tmp_path.glob("*.bin")]
    assert (tmp_path / "trainer_state.json").is_file()
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["1_Pooling", "3_Dense"]
    assert len(json.loads((tmp_path / "modules.json").read_text("utf-8"))) == 2
    assert same_weights(load_backbone(tmp_path), load_backbone(tiny_model_dir))


def test_a_save_that_fails_leaves_the_old_checkpoint(tiny_moe_dir: Path, tmp_path: Path) -> None:
    class FullDisk:
        model_max_length = 128

        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("half", "utf-8")
            raise OSError("no space left on device")

    model = load_backbone(tiny_moe_dir)
    save_checkpoint(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(apart(model), tmp_path, tokenizer=FullDisk())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".saving")]


# ---- heads ----


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    colbert, sparse, found = load_heads(tmp_path, 32)
    assert not found
    assert (colbert.out_features, sparse.out_features) == (32, 1)
    assert load_heads(None, 32, colbert_dim=8)[0].out_features == 8
    save_heads(tmp_path, {"colbert": nn.Linear(32, 8).state_dict()})
    with pytest.raises(DataError, match=r"holds colbert_linear.pt but no sparse_linear.pt"):
        load_heads(tmp_path, 32)
    save_heads(tmp_path, {"sparse": nn.Linear(32, 1).state_dict()})
    assert load_heads(tmp_path, 32)[0].out_features == 8
    with pytest.raises(UsageError, match="--colbert_dim 16 contradicts"):
        load_heads(tmp_path, 32, colbert_dim=16)
    with pytest.raises(DataError, match="reads states of 32 dimensions, the encoder gives 64"):
        load_heads(tmp_path, 64)
    torch.save(nn.Linear(32, 8), tmp_path / "colbert_linear.pt")  # a pickled module: code, not weights
    with pytest.raises(DataError, match="cannot be read as the weights of a head"):
        load_heads(tmp_path, 32)
    torch.save([1], tmp_path / "colbert_linear.pt")
    with pytest.raises(DataError, match="expected the tensors weight and bias"):
        load_heads(tmp_path, 32)


def test_experts_cannot_be_inserted_twice(tiny_moe_dir: Path) -> None:
    with pytest.raises(UsageError, match="needs an encoder with"):
        insert_experts(load_backbone(tiny_moe_dir), MoEConfig(moe="intermediate", num_experts=2))
