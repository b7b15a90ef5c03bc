"""LoRA by PEFT: the packed engine against PEFT's own model, what is saved, what an adapter's folder loads as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from FlagEmbedding import FlagModel
from FlagEmbedding.finetune.arguments import ModelArguments
from FlagEmbedding.finetune.biencoder import BiEncoder
from FlagEmbedding.losses.objective import ObjectiveArguments
from FlagEmbedding.modeling.adapter_options import LoraOptions
from FlagEmbedding.modeling.adapters import load_adapter_state, targets
from FlagEmbedding.modeling.backbone import load_backbone, load_trained_state
from FlagEmbedding.modeling.options import EngineConfig, MoEConfig
from FlagEmbedding.modeling.stored import StoredTensors
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.identity import model_fingerprint

peft = pytest.importorskip("peft")
TEXTS = ["When do people visit the river of Seoul?", "The tower of Shiraz", "a", "number 5 among its kind, in month 3"]
EXPERTS = MoEConfig("intermediate", num_experts=3)


def bi_encoder(base: Path, lora: LoraOptions, experts: MoEConfig | None = None, **engine: Any) -> BiEncoder:
    """A model to train whose adapters are no longer the zeros that they begin as."""
    torch.manual_seed(3)
    arguments = ModelArguments(str(base))
    objective = ObjectiveArguments(penalty_weight=0.0, temperature=0.1)
    model = BiEncoder(arguments, experts or MoEConfig(), objective, EngineConfig(**engine), lora=lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "gate" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def loss_of(vectors: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-1, 1, vectors.numel(), dtype=vectors.dtype).view_as(vectors)
    return (weights * vectors).sum()


def encoded(model: BiEncoder) -> torch.Tensor:
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    output = model(query=dict(batch))
    assert output.q_reps is not None
    return output.q_reps


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        ({"lora_target": ["attention"]}, None),
        ({"lora_target": ["all"], "use_rslora": True}, None),
        ({"lora_target": ["ffn", "query"], "use_dora": True}, None),
        ({"lora_target": ["all"]}, EXPERTS),
        ({"lora_target": ["ffn"], "use_dora": True}, EXPERTS),
    ],
)
@pytest.mark.parametrize("engine", [{}, {"grad_cache": True, "slab_tokens": 12}])
def test_packed_equals_peft(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any], experts: MoEConfig | None, engine: dict[str, Any]
) -> None:
    """Outputs, gradients and the merged checkpoint against PEFT's own model, padded, in 1e-6."""
    ours = bi_encoder(tiny_model_dir, LoraOptions(lora_r=3, lora_alpha=5, **options), experts, **engine)
    vectors = encoded(ours)
    loss_of(vectors).backward()
    ours.save(str(tmp_path / "tuned"))

    base = load_backbone(tiny_model_dir, moe=experts)
    if experts is not None:  # the gates are new, so PEFT's model begins with ours
        gates = {k: v for k, v in ours.model.state_dict().items() if k.endswith("gate.weight")}
        base.load_state_dict(gates, strict=False)
    reference = peft.PeftModel.from_pretrained(base, str(tmp_path / "tuned/adapter"), is_trainable=True).train()
    batch = ours.tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = torch.nn.functional.normalize(reference(**batch).last_hidden_state[:, 0], dim=-1)
    loss_of(expected).backward()

    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    theirs = {name.replace(".modules_to_save.default", ""): p.grad for name, p in reference.named_parameters()}
    compared = 0
    for name, parameter in ours.model.named_parameters():
        gradient = theirs.get(f"base_model.model.{name}")
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
            compared += bool(gradient.any())
    assert compared >= 4
    merged = FlagModel(str(tmp_path / "tuned"))
    np.testing.assert_allclose(merged.encode(TEXTS), expected.detach().numpy(), rtol=0, atol=1e-6)
    assert not any("lora" in key for key in load_backbone(tmp_path / "tuned").state_dict())


@pytest.mark.parametrize("made", ["ours", "peft"])
def test_an_adapter_alone_loads_as_the_merged_checkpoint(tiny_model_dir: Path, tmp_path: Path, made: str) -> None:
    model = bi_encoder(tiny_model_dir, LoraOptions(lora_r=2, lora_target=["attention"]))
    model.save(str(tmp_path / "merged"))
    model.adapter = type(model.adapter)(str(tiny_model_dir), alone=True)  # type: ignore[misc,arg-type]
    folder = tmp_path / "alone"
    if made == "ours":
        model.save(str(folder))
    else:  # PEFT's own two files, no tokenizer and no modules
        reference = peft.PeftModel.from_pretrained(
            AutoModel.from_pretrained(tiny_model_dir), tmp_path / "merged/adapter"
        )
        reference.save_pretrained(folder)
    assert not (folder / "config.json").exists()
    assert not (folder / "model.safetensors").exists()
    merged = FlagModel(str(tmp_path / "merged"))
    expected = merged.encode(TEXTS)
    assert np.abs(expected - FlagModel(str(tiny_model_dir)).encode(TEXTS)).max() > 1e-3
    np.testing.assert_array_equal(FlagModel(str(folder)).encode(TEXTS), expected)
    name = "encoder.layer.0.attention.self.query.weight"
    assert torch.equal(StoredTensors(folder).get(name), StoredTensors(tmp_path / "merged").get(name))
    # As the report does, which compares the base with what was saved.
    plain = bi_encoder(tiny_model_dir, LoraOptions())
    load_trained_state(plain, folder)
    assert torch.equal(plain.model.state_dict()[name], StoredTensors(folder).get(name))
    # An index must not be taken for that of the same adapter with another strength.
    before = model_fingerprint(folder)
    said = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(said | {"lora_alpha": 9}), "utf-8")
    assert model_fingerprint(folder) != before


def test_a_folder_saved_again_in_the_other_form_holds_one_form(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = bi_encoder(tiny_model_dir, LoraOptions(lora_r=2, lora_target=["attention"]))
    model.save(str(tmp_path))
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    model.adapter = type(model.adapter)(str(tiny_model_dir), alone=True)  # type: ignore[misc,arg-type]
    model.save(str(tmp_path))
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "model.safetensors").exists()
    model.adapter = None
    model.save(str(tmp_path))
    assert (tmp_path / "config.json").is_file()
    assert not (tmp_path / "adapter_config.json").exists()


def test_other_libraries_read_the_adapter(tiny_moe_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers and sentence-transformers find the base by themselves; gates go with the experts' adapters."""
    model = bi_encoder(tiny_model_dir, LoraOptions(lora_r=2, lora_save="adapter"))
    model.save(str(tmp_path / "dense"))
    expected = FlagModel(str(tmp_path / "dense")).encode(TEXTS)
    plain = AutoModel.from_pretrained(tmp_path / "dense").eval()
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(plain(**batch).last_hidden_state[:, 0], dim=-1)
    np.testing.assert_allclose(vectors.numpy(), expected, rtol=0, atol=1e-6)
    library = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    np.testing.assert_allclose(library.encode(TEXTS), expected, rtol=0, atol=1e-6)

    experts = bi_encoder(tiny_moe_dir, LoraOptions(lora_r=2, lora_target=["ffn"], lora_save="adapter"))
    experts.save(str(tmp_path / "moe"))
    loaded = load_backbone(tmp_path / "moe")
    gate = "encoder.layer.1.intermediate.dense.gate.weight"
    assert torch.equal(loaded.state_dict()[gate], experts.model.state_dict()[gate])
    assert not torch.equal(loaded.state_dict()[gate], load_backbone(tiny_moe_dir).state_dict()[gate])
    np.testing.assert_allclose(
        FlagModel(str(tmp_path / "moe")).encode(TEXTS), encoded(experts.eval()).detach().numpy(), rtol=0, atol=1e-6
    )


def test_broken_adapters_are_refused_in_one_line(tiny_model_dir: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    model = bi_encoder(tiny_model_dir, LoraOptions(lora_r=2, lora_target=["attention"], lora_save="adapter"))
    model.save(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text("utf-8"))

    def refused(**changes: Any) -> str:
        file.write_text(json.dumps(said | changes), "utf-8")
        with pytest.raises((DataError, UsageError)) as error:
            load_backbone(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "names no base" in refused(base_model_name_or_path=None)
    assert "names no base" in refused(base_model_name_or_path=str(tmp_path))
    assert "neither a checkpoint folder nor a hub id" in refused(base_model_name_or_path=str(tmp_path / "gone/x/y"))
    assert "does not go into its base" in refused(r=4)
    assert "does not go into its base" in refused(target_modules=["query", "key", "dense"])
    file.write_text("{", "utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        load_backbone(tmp_path)
    other = bi_encoder(tiny_model_dir, LoraOptions(lora_r=3, lora_target=["attention"]))
    file.write_text(json.dumps(said), "utf-8")
    with pytest.raises(DataError, match="other adapters"):
        load_adapter_state(other.model, tmp_path)
    with pytest.raises(DataError, match="holds no adapter_model"):
        load_adapter_state(other.model, tiny_model_dir)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        load_adapter_state(model.model, tmp_path)
    with pytest.raises(DataError, match="does not go into its base"):
        load_backbone(tmp_path)


def test_targets(tiny_model_dir: Path, tiny_moe_dir: Path) -> None:
    dense, moe = load_backbone(tiny_model_dir), load_backbone(tiny_moe_dir)
    attention, ffn = targets(dense, ["attention"]), targets(dense, ["ffn"])
    assert len(attention) == 8
    assert ffn == [f"encoder.layer.{n}.{part}.dense" for n in (0, 1) for part in ("intermediate", "output")]
    assert sorted(targets(dense, ["all"])) == sorted(attention + ffn)
    assert targets(dense, ["query"]) == [f"encoder.layer.{n}.attention.self.query" for n in (0, 1)]
    assert targets(dense, ["all"], "output") == [f"encoder.layer.{n}.output.dense" for n in (0, 1)]
    assert not any(name.endswith("gate") for name in targets(moe, ["all"]))
    assert any("experts" in name for name in targets(moe, ["all"], "intermediate"))
    with pytest.raises(UsageError, match="--lora_target quary: no linear layer"):
        targets(dense, ["query", "quary"])
    with pytest.raises(UsageError, match="leaves no layer"):
        targets(dense, ["attention"], "output")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": -1}, "--lora_r must be 0"),
        ({"lora_alpha": 8}, "--lora_alpha has no effect without --lora_r"),
        ({"use_dora": True}, "--use_dora has no effect without --lora_r"),
        ({"lora_target": ["ffn"]}, "--lora_target has no effect without --lora_r"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha must be at least 1"),
        ({"lora_r": 4, "lora_dropout": 1.0}, "--lora_dropout is a chance"),
        ({"lora_r": 4, "lora_target": [""]}, "--lora_target: expected"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoraOptions(**options)
