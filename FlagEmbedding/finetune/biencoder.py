"""BGEM3Model: one encoder for queries, passages and the negatives' own queries, and the objective over them.

One ``forward`` encodes every role, so that distributed hooks fire once a step; the encoding itself (packed or padded
engine, gradient caching) is ``modeling.encoder``'s, and every loss is a pure function of ``losses``.

Shape legend: B queries, G passages each (``train_group_size``: 1 positive, then G − 1 negatives), M = B·G passages,
K negative queries, D dimensions. With ``negatives_cross_device`` all of them are gathered over the processes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import ModelOutput

from FlagEmbedding.finetune.gather import gather_owners, gather_representations
from FlagEmbedding.losses.contrastive import colbert_scores, dense_scores, sparse_scores
from FlagEmbedding.losses.objective import retrieval_objective
from FlagEmbedding.losses.penalty import apply_penalty, clp_penalty
from FlagEmbedding.losses.router import load_balance_loss, z_loss
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint, select_trainable
from FlagEmbedding.modeling.encoder import EngineConfig, M3Encoder, Representations
from FlagEmbedding.modeling.heads import load_heads
from FlagEmbedding.modeling.moe import MoEConfig, Routing, record_routing
from FlagEmbedding.modeling.tokens import TokenBatch
from FlagEmbedding.utils.distributed import all_gather_rows, world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

Features = Mapping[str, Tensor]


@dataclass
class EncoderOutput(ModelOutput):
    """What a forward gives.

    Attributes:
        loss: scalar, what is differentiated; None unless both queries and passages came.
        terms: the objective's named parts, scalars, for logging (unscaled; ``…_scaled`` where a weight applies).
        scores: dense similarities over the temperature, ``[B, M]`` (gathered under ``negatives_cross_device``).
        q_reps, p_reps: this process's dense vectors, ``[B, D]`` and ``[M, D]``.
        routing: per MoE layer, what the router decided for the tokens of this forward.
    """

    loss: Tensor | None = None
    terms: dict[str, Tensor] | None = None
    scores: Tensor | None = None
    q_reps: Tensor | None = None
    p_reps: Tensor | None = None
    routing: list[list[Routing]] | None = None


class BGEM3Model(M3Encoder):
    """The model that ``run.py`` trains. Constructor keywords and ``forward`` are the published ones.

    Args:
        model_name: hub id or folder; a MoE checkpoint describes itself.
        normlized: L2-normalise dense and colbert vectors (published spelling); False sets the temperature to 1.
        sentence_pooling_method: ``cls`` or ``mean``.
        negatives_cross_device: compute the loss over all processes' batches.
        temperature: τ.
        enable_sub_batch: padded engine only: slices chosen by length.
        unified_finetuning: dense, sparse and colbert together.
        use_self_distill: with unified fine-tuning, their sum teaches each.
        colbert_dim: width of colbert vectors; -1 is the hidden size.
        self_distill_start_step: forwards after which self-distillation counts.
        moe, only_train, num_experts, num_experts_per_tok: see ``modeling.moe.MoEConfig``.
        config: another configuration than the checkpoint's.
        penalty_weight: λ of the contrastive learning penalty.
        router_*: gradient, noise and auxiliary losses of the router.
        engine: how the encoder is computed.
        fix_encoder, fix_position_embedding: freeze these.

    Raises:
        UsageError: options that contradict each other or the checkpoint.
    """

    # The Trainer must divide by the accumulation steps itself: our loss is a mean over the micro-batch.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model_name: str,
        normlized: bool = True,
        sentence_pooling_method: str = "cls",
        negatives_cross_device: bool = False,
        temperature: float = 1.0,
        enable_sub_batch: bool = True,
        unified_finetuning: bool = True,
        use_self_distill: bool = False,
        colbert_dim: int = -1,
        self_distill_start_step: int = -1,
        moe: str | None = None,
        only_train: str | None = None,
        num_experts: int = 1,
        num_experts_per_tok: int = 1,
        config: Any = None,
        *,
        penalty_weight: float = 0.1,
        router_gradient: str = "none",
        router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
        router_jitter: float = 0.0,
        engine: EngineConfig | None = None,
        fix_encoder: bool = False,
        fix_position_embedding: bool = False,
        tokenizer_name: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        experts = MoEConfig(
            moe=moe,
            only_train=only_train,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            router_gradient=router_gradient,
            router_jitter=router_jitter,
        )
        backbone = load_backbone(model_name, moe=experts, config=config, cache_dir=cache_dir)
        colbert_linear = sparse_linear = None
        if unified_finetuning:
            folder = resolve_folder(model_name, cache_dir=cache_dir)
            colbert_linear, sparse_linear, found = load_heads(folder, backbone.config.hidden_size, colbert_dim)
            logger.info("sparse and colbert heads: %s", f"from {model_name}" if found else "new, to be trained")
        super().__init__(
            backbone,
            colbert_linear=colbert_linear,
            sparse_linear=sparse_linear,
            pooling=sentence_pooling_method,
            normalize=normlized,
            engine=engine,
            enable_sub_batch=enable_sub_batch,
        )
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or model_name, cache_dir=cache_dir)
        self.negatives_cross_device = negatives_cross_device
        self.temperature = temperature if normlized else 1.0
        self.unified_finetuning = unified_finetuning
        self.use_self_distill = use_self_distill and unified_finetuning
        self.self_distill_start_step = self_distill_start_step
        self.penalty_weight = penalty_weight
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.all_rows = router_aux_loss_coef > 0 or router_z_loss_coef > 0
        self.step = 0  # forwards while training; part of a checkpoint's state, since self-distillation counts them
        select_trainable(self, only_train, fix_encoder=fix_encoder, fix_position_embedding=fix_position_embedding)

    # The published names of two attributes.
    @property
    def normlized(self) -> bool:
        return self.normalize

    @property
    def sentence_pooling_method(self) -> str:
        return self.pooling

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute each layer in the backward; always the non-reentrant kind, which frozen layers need."""
        kwargs = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)
        else:  # transformers before it was renamed
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The older name of ``activation_checkpointing_enable``."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(
        self,
        query: Features | None = None,
        passage: Features | None = None,
        teacher_scores: Tensor | None = None,
        bi_directions: Any = None,
        neg_q: Features | None = None,
    ) -> EncoderOutput:
        """Encode the roles that are given and, with queries and passages, compute the objective.

        Args:
            query: ``input_ids`` and ``attention_mask``, ``[B, Lq]``.
            passage: the same, ``[B·G, Lp]``, every query's positive first, then its negatives.
            teacher_scores: ``[B, G]`` for knowledge distillation, or None.
            bi_directions: accepted as published; nothing depends on it there either.
            neg_q: ``input_ids`` and ``attention_mask``, ``[K, Ln]``, and ``owner`` ``[K]``: the passage row that
                each answers. Without ``owner``, K must be B·(G − 1), one for every negative in order.
        """
        roles = {"query": query, "passage": passage, "neg_q": neg_q if self.penalty_weight > 0 else None}
        batches = {name: TokenBatch.from_padded(features) for name, features in roles.items() if features is not None}
        full = {"dense", "sparse", "colbert"} if self.unified_finetuning else {"dense"}
        wants = [{"dense"} if name == "neg_q" else full for name in batches]
        with record_routing(self.model) as tape:
            encoded = dict(zip(batches, self.encode(list(batches.values()), wants), strict=True))
        output = EncoderOutput(routing=tape.layers or None)
        for name, attribute in (("query", "q_reps"), ("passage", "p_reps")):
            if name in encoded:
                setattr(output, attribute, encoded[name].dense)
        if query is None or passage is None:
            return output

        owner = None if neg_q is None or "neg_q" not in encoded else self._owners(neg_q, encoded)
        output.scores, output.terms = self._objective(encoded, teacher_scores, owner)
        output.loss = output.terms["loss"]
        if tape.layers:
            output.loss = self._add_router_terms(output.loss, output.terms, tape.layers)
        if self.training:
            self.step += 1
        return output

    def _owners(self, neg_q: Features, encoded: dict[str, Representations]) -> Tensor:
        if "owner" in neg_q:
            return neg_q["owner"]
        rows, queries = _dense(encoded["passage"]).shape[0], _dense(encoded["query"]).shape[0]
        expected = rows - queries
        given = _dense(encoded["neg_q"]).shape[0]
        if given != expected:
            raise UsageError(f"neg_q without 'owner' needs one row for each of the {expected} negatives, got {given}")
        group = rows // queries
        return torch.tensor([i for i in range(rows) if i % group], device=_dense(encoded["passage"]).device)

    def _objective(
        self, encoded: dict[str, Representations], teacher_scores: Tensor | None, owner: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The retrieval objective and the penalty: dense scores and the named terms, ``loss`` their sum."""
        queries, passages, negative_queries = encoded["query"], encoded["passage"], encoded.get("neg_q")
        if self.negatives_cross_device and world_size() > 1:
            if self.penalty_weight > 0:
                # A process without any neg_q still takes part in the gathering, with no rows.
                reference = _dense(passages)
                owner = gather_owners(owner, _dense(passages).shape[0], reference.device)
                rows = reference[:0] if negative_queries is None else _dense(negative_queries)
                negative_reps: Tensor | None = all_gather_rows(rows)
            else:
                negative_reps = None
            queries, passages = gather_representations(queries), gather_representations(passages)
            teacher_scores = None if teacher_scores is None else all_gather_rows(teacher_scores)
        else:
            negative_reps = None if negative_queries is None else _dense(negative_queries)

        q_reps, p_reps = _dense(queries), _dense(passages)
        group_size = p_reps.shape[0] // q_reps.shape[0]
        dense = dense_scores(q_reps, p_reps, self.temperature)
        sparse = colbert = None
        if self.unified_finetuning:
            sparse, colbert = self._sparse_scores(queries, passages), self._colbert_scores(queries, passages)
        terms = retrieval_objective(
            dense,
            sparse,
            colbert,
            group_size=group_size,
            teacher_targets=None if teacher_scores is None else torch.softmax(teacher_scores, dim=-1),
            self_distill=self.use_self_distill and self.step > self.self_distill_start_step,
        )
        loss = terms.pop("total")
        terms = {name if name != "contrastive" else "contrastive_loss": value for name, value in terms.items()}
        if negative_reps is not None and owner is not None and len(owner):
            terms["penalty"] = clp_penalty(p_reps, negative_reps, owner)
            loss = apply_penalty(loss, terms["penalty"], self.penalty_weight)
        terms["loss"] = loss
        return dense, terms

    def _sparse_scores(self, queries: Representations, passages: Representations) -> Tensor:
        tokenizer = self.tokenizer
        skipped = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        return sparse_scores(
            queries.tokens.ids,
            _present(queries.token_weights),
            queries.tokens.lengths,
            passages.tokens.ids,
            _present(passages.token_weights),
            passages.tokens.lengths,
            sorted(token for token in skipped if token is not None),
            self.temperature,
        )

    def _colbert_scores(self, queries: Representations, passages: Representations) -> Tensor:
        q_vectors, q_mask = queries.colbert_padded()
        p_vectors, _ = passages.colbert_padded()
        return colbert_scores(q_vectors, q_mask, p_vectors, self.temperature)

    def _add_router_terms(self, loss: Tensor, terms: dict[str, Tensor], layers: list[list[Routing]]) -> Tensor:
        """Balance and z-loss, averaged over layers; logged unscaled and scaled, added only where weighted."""
        logits = [torch.cat([routing.logits for routing in calls]) for calls in layers]
        experts = [torch.cat([routing.experts for routing in calls]) for calls in layers]
        parts = (
            (
                "router_aux_loss",
                self.router_aux_loss_coef,
                [load_balance_loss(*x) for x in zip(logits, experts, strict=True)],
            ),
            ("router_z_loss", self.router_z_loss_coef, [z_loss(x) for x in logits]),
        )
        for name, weight, per_layer in parts:
            terms[name] = torch.stack(per_layer).mean()
            if weight > 0:
                terms[f"{name}_scaled"] = weight * terms[name]
                loss = loss + terms[f"{name}_scaled"]
        terms["loss"] = loss
        return loss

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts, whether made here or loaded."""
        return bool(moe_layers(self.model))

    def save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the checkpoint: backbone, heads, tokenizer and what other libraries need to load it."""
        save_checkpoint(self, Path(output_dir), tokenizer=self.tokenizer, state_dict=state_dict)


def _dense(representations: Representations) -> Tensor:
    return _present(representations.dense)


def _present(value: Tensor | None) -> Tensor:
    if value is None:  # encode() was asked for it, so this is a fault of ours
        raise AssertionError("the encoder left out a representation it was asked for")
    return value
