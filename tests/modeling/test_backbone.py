"""Checkpoints: what is saved is what loads, whatever the layout; what does not fit is one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from FlagEmbedding.modeling.backbone import (
    insert_experts,
    load_backbone,
    load_trained_state,
    moe_layers,
    save_checkpoint,
    select_trainable,
)
from FlagEmbedding.modeling.encoder import M3Encoder
from FlagEmbedding.modeling.heads import load_heads, save_heads
from FlagEmbedding.modeling.moe import MoEConfig
from FlagEmbedding.utils.errors import DataError, UsageError, UserError

FAMILIES = ["tiny_model_dir", "tiny_roberta_dir", "tiny_bert_dir"]


def states(model: nn.Module) -> Tensor:
    """Hidden states of fixed rows, one of them padded."""
    ids = torch.randint(6, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


def apart(model: nn.Module) -> nn.Module:
    """Move every weight, so that experts differ and nothing equals its initialisation."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8")) | fields
    config = {key: value for key, value in config.items() if value != "REMOVE"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


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


# ---- what does not fit ----


def without(folder: Path, key: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[key]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def extra(folder: Path, key: str) -> None:
    state = load_file(folder / "model.safetensors") | {key: torch.zeros(3)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


MOE = "tiny_moe_dir"
DENSE = "tiny_model_dir"
REFUSED: list[tuple[str, str, Callable[[Path], None], MoEConfig | None, str]] = [
    ("contradicting place", MOE, lambda f: None, MoEConfig(moe="output", num_experts=2),
     "--moe output with 2 experts, 1 per token, contradicts .* 2 experts in intermediate"),
    ("contradicting number", MOE, lambda f: None, MoEConfig(moe="intermediate", num_experts=4),
     "--moe intermediate with 4 experts, 1 per token, contradicts"),
    ("contradicting choice", MOE, lambda f: None, MoEConfig(moe="intermediate", num_experts=2, num_experts_per_tok=2),
     "contradicts"),
    ("experts, no fields", MOE, lambda f: edit_config(f, moe="REMOVE"), None,
     "holds weights of 2 experts in intermediate, but its config.json does not say so"),
    ("fields, no experts", DENSE, lambda f: edit_config(f, moe="output", num_experts=2, num_experts_per_tok=1), None,
     "says 2 experts in output, but the folder holds weights of dense layers"),
    ("other number", MOE, lambda f: edit_config(f, num_experts=3), None, "says 3 experts .* weights of 2 experts"),
    ("other place", MOE, lambda f: edit_config(f, moe="output"), None, "in output, but .* experts in intermediate"),
    ("number missing", MOE, lambda f: edit_config(f, num_experts="REMOVE"), None, "lacks num_experts$"),
    ("foo in the config", DENSE, lambda f: edit_config(f, moe="foo", num_experts=1, num_experts_per_tok=1), None,
     "config.json: moe must be intermediate, output or left out, got 'foo'"),
    ("weight missing", DENSE, lambda f: without(f, "encoder.layer.1.output.dense.weight"), None,
     "lacks encoder.layer.1.output.dense.weight"),
    ("gate missing", MOE, lambda f: without(f, "encoder.layer.1.intermediate.dense.gate.weight"), None,
     "lacks encoder.layer.1.intermediate.dense.gate.weight"),
    ("weight left over", DENSE, lambda f: extra(f, "encoder.layer.2.output.dense.bias"), None,
     "beyond what config.json describes, encoder.layer.2.output.dense.bias"),
    ("other width", DENSE, lambda f: edit_config(f, intermediate_size=64), None, "weights do not fit config.json"),
    ("no weights", DENSE, lambda f: (f / "model.safetensors").unlink(), None, "holds no weights"),
    ("broken weights", DENSE, lambda f: (f / "model.safetensors").write_bytes(b"PK\x00broken"), None, "cannot be read"),
    ("no config", DENSE, lambda f: (f / "config.json").unlink(), None, "is no checkpoint: it holds no config.json"),
    ("unknown type", DENSE, lambda f: edit_config(f, model_type="foo"), None, "nothing that transformers knows"),
    ("not json", DENSE, lambda f: (f / "config.json").write_text("{"), None, "nothing that transformers knows"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "damage", "asked", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_in_one_line(
    base: str, damage: Callable[[Path], None], asked: MoEConfig | None, message: str,
    request: pytest.FixtureRequest, tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(base), folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(folder, moe=asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such-model-here", "/no/such/folder", "a b", "x" * 200])
def test_unknown_name_is_one_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"neither a checkpoint folder nor a hub id|the hub did not give") as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


def test_encoder_of_another_structure_is_refused(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)).save_pretrained(
        tmp_path
    )
    assert isinstance(load_backbone(tmp_path), PreTrainedModel)
    with pytest.raises(UsageError, match=r"--moe output needs an encoder with encoder.layer.\*.output.dense"):
        load_backbone(tmp_path, moe=MoEConfig(moe="output", num_experts=2))


# ---- what trains ----


@pytest.mark.parametrize("place", ["intermediate", "output"])
@pytest.mark.parametrize("experts", [0, 2])
def test_only_train(place: str, experts: int, tiny_model_dir: Path) -> None:
    moe = MoEConfig(moe=place, num_experts=experts) if experts else None
    backbone = load_backbone(tiny_model_dir, moe=moe)
    encoder = M3Encoder(backbone, nn.Linear(32, 32), nn.Linear(32, 1))
    select_trainable(encoder, place)
    kinds = [f"experts.{e}.{kind}" for e in range(experts) for kind in ("weight", "bias")] or ["weight", "bias"]
    kinds += ["gate.weight"] if experts else []
    expected = {f"model.encoder.layer.{i}.{place}.dense.{kind}" for i in range(2) for kind in kinds}
    expected |= {f"{head}_linear.{kind}" for head in ("colbert", "sparse") for kind in ("weight", "bias")}
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == expected
    bare = load_backbone(tiny_model_dir, moe=moe)
    select_trainable(bare, place)
    trained = {f"model.{name}" for name, parameter in bare.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in expected if name.startswith("model.")}


def test_frozen_encoder_and_positions(tiny_model_dir: Path) -> None:
    encoder = M3Encoder(load_backbone(tiny_model_dir), nn.Linear(32, 32), nn.Linear(32, 1))
    select_trainable(encoder, None, fix_position_embedding=True)
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embeddings.position_embeddings.weight"]
    select_trainable(encoder, None, fix_encoder=True)
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert {name.split("_")[0] for name in trained} == {"colbert", "sparse"}
    select_trainable(encoder, None)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    with pytest.raises(UsageError, match="nothing would train"):
        select_trainable(M3Encoder(load_backbone(tiny_model_dir)), None, fix_encoder=True)


@pytest.mark.parametrize("place", ["intermediate", "output"])
def test_recomputed_layers_give_the_same_gradients_above_frozen_ones(place: str, tiny_dropout_dir: Path) -> None:
    found = {}
    for recompute in (False, True):
        torch.manual_seed(4)
        settings = MoEConfig(moe=place, num_experts=2, router_gradient="straight_through", router_jitter=0.2)
        model = apart(load_backbone(tiny_dropout_dir, moe=settings)).train()
        select_trainable(model, place)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(6, 300, (3, 8), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(9)  # dropout and noise
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        output.square()[..., :3].sum().backward()
        found[recompute] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient)
        assert "gate" not in name or float(gradient.abs().max()) > 0


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
    assert list(tmp_path.glob("*.py"))
    save_checkpoint(load_backbone(tiny_model_dir), tmp_path, normalize=False)
    assert not [*tmp_path.glob("*.py"), *tmp_path.glob("*.pt"), *tmp_path.glob("*.bin")]
    assert (tmp_path / "trainer_state.json").is_file()
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
