"""BGEM3Model against the loop-written float64 reference: value and gradients, both engines, every objective."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from finetune.reference import objective
from transformers import AutoModel, AutoTokenizer

from FlagEmbedding import BGEM3Model
from FlagEmbedding.losses.objective import ObjectiveArguments
from FlagEmbedding.modeling.encoder import EngineConfig
from FlagEmbedding.utils.errors import UsageError

QUERIES = ["How long is the river?", "한강의 길이는?", "گنجایش رود چقدر است؟"]
PASSAGES = [
    "The Han river runs through Seoul and reaches the Yellow Sea.",
    "Fermentation turns cabbage into kimchi.",
    "गंगा नदी हिमालय से निकलकर बंगाल की खाड़ी में गिरती है।",
    "한강은 서울을 지나 서해로 흘러든다. 길이는 약 오백 킬로미터이다.",
    "A short one.",
    "How the cell divides, and why.",
    "رود کارون پرآب‌ترین رود ایران است.",
    "River Thames, London, England.",
    "Rivers, rivers and rivers again: the river runs.",
]
NEGATIVE_QUERIES = [
    "What is kimchi made of?",
    "गंगा कहाँ गिरती है?",
    "Which passage is short?",
    "Where is London?",
    "cell",
]


def tokenize(tokenizer, texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def batch_for(folder: Path, batch_size: int, group: int, owners: list[int] | None, teacher: bool):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    query = tokenize(tokenizer, QUERIES[:batch_size])
    passage = tokenize(tokenizer, PASSAGES[: batch_size * group])
    neg_q = None
    if owners:
        neg_q = tokenize(tokenizer, NEGATIVE_QUERIES[: len(owners)])
        neg_q["owner"] = torch.tensor(owners)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(batch_size, group, generator=generator) * 2 if teacher else None
    return query, passage, neg_q, scores


def reference_for(folder: Path, model: BGEM3Model, batch, pooling, normalize, unified, self_distill, weight):
    backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False).double().train()
    tokenizer = model.tokenizer
    skipped = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    query, passage, neg_q, scores = batch
    loss = objective(
        model, query, passage, neg_q, scores, pooling=pooling, normalize=normalize, temperature=0.05, unified=unified,
        self_distill=self_distill, penalty_weight=weight, skipped=skipped, backbone=backbone,
    )  # fmt: skip
    return loss, backbone


def make(folder: Path, engine: str = "packed", **changes) -> BGEM3Model:
    torch.manual_seed(5)  # the router and the heads are new
    settings = {"temperature": 0.05, "unified_finetuning": False, "engine": EngineConfig(engine=engine, slab_tokens=64)}
    model = BGEM3Model(str(folder), **{**settings, **changes})
    for head in (model.colbert_linear, model.sparse_linear):
        if head is not None:  # new heads weigh all tokens alike: which of equal ones is the greatest is open
            head.reset_parameters()
    return model.double().train()


CASES = [
    # (batch, group, pooling, normalize, unified, self-distillation, teacher, owners)
    (1, 3, "cls", True, False, False, False, None),
    (1, 3, "cls", True, False, False, False, [1, 2]),
    (3, 3, "cls", True, False, False, False, [1, 2, 4, 5, 7]),
    (3, 3, "mean", True, False, False, False, [1, 4, 4, 8]),
    (2, 4, "cls", False, False, False, False, [1, 3, 6]),
    (3, 1, "cls", True, False, False, False, None),
    (2, 3, "cls", True, True, False, False, [1, 2, 4, 5]),
    (2, 3, "mean", True, True, True, False, [2, 2, 5]),
    (2, 3, "cls", False, True, True, False, None),
    (2, 3, "cls", True, False, False, True, [1, 2, 4, 5]),
    (2, 3, "cls", True, True, False, True, None),
    (2, 4, "cls", True, True, True, True, [1, 6]),
]


@pytest.mark.parametrize(("case", "engine"), list(itertools.product(CASES, ["packed", "padded"])))
def test_loss_and_gradients_equal_the_loops(case, engine, tiny_model_dir: Path) -> None:
    batch_size, group, pooling, normalize, unified, self_distill, teacher, owners = case
    model = make(
        tiny_model_dir, engine, normlized=normalize, sentence_pooling_method=pooling, unified_finetuning=unified,
        use_self_distill=self_distill,
    )  # fmt: skip
    batch = batch_for(tiny_model_dir, batch_size, group, owners, teacher)
    query, passage, neg_q, scores = batch
    output = model(query, passage, scores, neg_q)
    output.loss.backward()

    heads = {name: p.grad for name, p in model.named_parameters() if name.startswith(("colbert", "sparse"))}
    model.zero_grad()
    expected, backbone = reference_for(tiny_model_dir, model, batch, pooling, normalize, unified, self_distill, 0.1)
    # The teacher's softmax is taken in the precision of its scores (float32), as published.
    precision = 1e-6 if teacher else 1e-9
    assert abs(float(output.loss) - float(expected)) < precision
    expected.backward()
    for name, gradient in heads.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-6, atol=precision)

    again = make(
        tiny_model_dir, engine, normlized=normalize, sentence_pooling_method=pooling, unified_finetuning=unified,
        use_self_distill=self_distill,
    )  # fmt: skip
    again(query, passage, scores, neg_q).loss.backward()
    ours = {name.removeprefix("model."): p.grad for name, p in again.named_parameters() if name.startswith("model.")}
    moved = 0
    for name, parameter in backbone.named_parameters():
        if parameter.grad is None:
            continue
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-6, atol=precision)
        moved += bool(parameter.grad.abs().max() > 1e-6)
    assert moved > 10


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_float32_agrees_with_the_loops(engine: str, tiny_model_dir: Path) -> None:
    model = make(tiny_model_dir, engine).float()
    batch = batch_for(tiny_model_dir, 3, 3, [1, 2, 4, 5, 7], False)
    output = model(batch[0], batch[1], None, batch[2])
    expected, _ = reference_for(tiny_model_dir, model.double(), batch, "cls", True, False, False, 0.1)
    assert abs(float(output.loss) - float(expected)) < 1e-5


def test_self_distillation_waits_for_its_start(tiny_model_dir: Path) -> None:
    batch = batch_for(tiny_model_dir, 2, 3, None, False)
    settings = {"unified_finetuning": True, "use_self_distill": True, "self_distill_start_step": 1}
    model = make(tiny_model_dir, **settings)
    plain = make(tiny_model_dir, unified_finetuning=True)(*batch[:2]).loss
    losses = [float(model(*batch[:2]).loss.detach()) for _ in range(3)]
    distilled = make(tiny_model_dir, **{**settings, "self_distill_start_step": -1})(*batch[:2]).loss
    assert losses[:2] == pytest.approx([float(plain)] * 2, abs=1e-12)
    assert losses[2] == pytest.approx(float(distilled), abs=1e-12)
    assert abs(losses[2] - losses[1]) > 1e-3


def test_only_forwards_of_training_count(tiny_model_dir: Path) -> None:
    """``--self_distill_start_step`` counts what was trained on, not what was looked at in between."""
    batch = batch_for(tiny_model_dir, 2, 3, None, False)
    model = make(tiny_model_dir)
    for mode, expected in ((True, 1), (False, 1), (True, 2)):
        model.train(mode)(*batch[:2])
        assert model.step == expected
    model.train()(query=batch[0])
    assert model.step == 2, "a forward without an objective is none"


def test_the_published_constructor_hands_on_every_keyword(tiny_model_dir: Path) -> None:
    model = BGEM3Model(
        str(tiny_model_dir), normlized=False, sentence_pooling_method="mean", negatives_cross_device=True,
        temperature=0.5, enable_sub_batch=False, use_self_distill=True, colbert_dim=8, self_distill_start_step=4,
        moe="output", num_experts=3, num_experts_per_tok=2, penalty_weight=0.3, router_gradient="straight_through",
        router_aux_loss_coef=0.01, router_z_loss_coef=0.02, fix_position_embedding=True,
    )  # fmt: skip
    assert model.objective == ObjectiveArguments(
        penalty_weight=0.3, temperature=0.5, negatives_cross_device=True, unified_finetuning=True,
        use_self_distill=True, self_distill_start_step=4, router_aux_loss_coef=0.01, router_z_loss_coef=0.02,
    )  # fmt: skip
    assert (model.normlized, model.sentence_pooling_method, model.temperature) == (False, "mean", 1.0)
    assert model.engine == EngineConfig(enable_sub_batch=False)
    assert model.colbert_linear.out_features == 8
    config = model.model.config
    assert (config.moe, config.num_experts, config.num_experts_per_tok) == ("output", 3, 2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embeddings.position_embeddings.weight"}
    heads = BGEM3Model(str(tiny_model_dir), fix_encoder=True)
    trained = {name.partition(".")[0] for name, parameter in heads.named_parameters() if parameter.requires_grad}
    assert trained == {"colbert_linear", "sparse_linear"}
    experts = BGEM3Model(str(tiny_model_dir), only_train="intermediate", unified_finetuning=False)
    trained = {name for name, parameter in experts.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"model.encoder.layer.{i}.intermediate.dense.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    kept = BGEM3Model(str(tiny_model_dir), engine=EngineConfig(slab_tokens=7, enable_sub_batch=False))
    assert kept.engine == EngineConfig(slab_tokens=7, enable_sub_batch=False)


def test_neg_q_without_owner_pairs_in_order(tiny_model_dir: Path) -> None:
    query, passage, neg_q, _ = batch_for(tiny_model_dir, 2, 3, [1, 2, 4, 5], False)
    model = make(tiny_model_dir)
    with_owner = model(query, passage, None, neg_q).loss
    without = model(query, passage, None, {k: v for k, v in neg_q.items() if k != "owner"}).loss
    assert float(with_owner) == float(without)
    short = {key: value[:3] for key, value in neg_q.items() if key != "owner"}
    with pytest.raises(UsageError, match="4 negatives, got 3"):
        model(query, passage, None, short)


def test_penalty_weight_zero_is_plain_contrastive(tiny_model_dir: Path) -> None:
    query, passage, neg_q, _ = batch_for(tiny_model_dir, 2, 3, [1, 2, 4, 5], False)
    plain = make(tiny_model_dir)(query, passage).loss
    off = make(tiny_model_dir, penalty_weight=0.0)(query, passage, None, neg_q)
    assert float(plain) == float(off.loss)
    assert "penalty" not in off.terms


def test_one_role_alone_gives_its_vectors_and_no_loss(tiny_model_dir: Path) -> None:
    query, _, _, _ = batch_for(tiny_model_dir, 2, 3, None, False)
    output = make(tiny_model_dir)(query=query)
    assert output.loss is None
    assert output.q_reps.shape == (2, 32)
    assert output.p_reps is None


@pytest.mark.parametrize("place", ["intermediate", "output"])
def test_router_learns_with_straight_through_and_not_without(place: str, tiny_model_dir: Path) -> None:
    query, passage, neg_q, _ = batch_for(tiny_model_dir, 2, 3, [1, 2, 4, 5], False)
    outputs = {}
    for gradient in ("none", "straight_through"):
        model = make(tiny_model_dir, moe=place, only_train=place, num_experts=2, router_gradient=gradient)
        torch.manual_seed(17)
        for parameter in model.model.parameters():
            if parameter.requires_grad:  # experts apart, so that the choice matters
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        output = model(query, passage, None, neg_q)
        output.loss.backward()
        gates = [p.grad for n, p in model.named_parameters() if n.endswith("gate.weight")]
        outputs[gradient] = float(output.loss)
        largest = max(0.0 if g is None else float(g.abs().max()) for g in gates)
        assert (largest > 1e-6) == (gradient == "straight_through")
    assert outputs["none"] == outputs["straight_through"]


def test_auxiliary_losses_are_logged_scaled_and_unscaled(tiny_moe_dir: Path) -> None:
    query, passage, _, _ = batch_for(tiny_moe_dir, 2, 3, None, False)
    unweighted = make(tiny_moe_dir)
    unweighted.all_rows = True  # as with weights, route every token in the last layer
    plain = unweighted(query, passage)
    weighted = make(tiny_moe_dir, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)(query, passage)
    terms = weighted.terms
    assert float(terms["router_aux_loss"]) == pytest.approx(float(plain.terms["router_aux_loss"]))
    assert float(terms["router_aux_loss_scaled"]) == pytest.approx(0.5 * float(terms["router_aux_loss"]))
    expected = float(plain.loss) + 0.5 * float(terms["router_aux_loss"]) + 0.25 * float(terms["router_z_loss"])
    assert float(weighted.loss) == pytest.approx(expected)


def test_padding_changes_neither_loss_nor_router_terms(tiny_moe_dir: Path) -> None:
    query, passage, neg_q, _ = batch_for(tiny_moe_dir, 2, 3, [1, 2, 4, 5], False)
    for engine in ("packed", "padded"):
        model = make(tiny_moe_dir, engine, router_aux_loss_coef=0.5, router_z_loss_coef=0.5)
        wide = {}
        for name, features in (("query", query), ("passage", passage)):
            extra = features["input_ids"].new_full((features["input_ids"].shape[0], 7), model.tokenizer.pad_token_id)
            wide[name] = {
                "input_ids": torch.cat([features["input_ids"], extra], 1),
                "attention_mask": torch.cat([features["attention_mask"], torch.zeros_like(extra)], 1),
            }
        narrow = model(query, passage, None, neg_q)
        padded = model(wide["query"], wide["passage"], None, neg_q)
        assert float(narrow.loss) == pytest.approx(float(padded.loss), abs=1e-10)
        for name in ("router_aux_loss", "router_z_loss"):
            assert float(narrow.terms[name]) == pytest.approx(float(padded.terms[name]), abs=1e-6)


def test_router_terms_do_not_depend_on_the_engine(tiny_moe_dir: Path) -> None:
    query, passage, neg_q, _ = batch_for(tiny_moe_dir, 2, 3, [1, 2, 4, 5], False)
    outputs = [
        make(tiny_moe_dir, engine, router_aux_loss_coef=0.5, router_z_loss_coef=0.5)(query, passage, None, neg_q)
        for engine in ("packed", "padded")
    ]
    assert float(outputs[0].loss) == pytest.approx(float(outputs[1].loss), abs=1e-9)
    assert float(outputs[0].terms["router_aux_loss"]) > 0.5
