"""BiEncoder: one encoder for queries, passages and the negatives' own queries, and the objective over them.

One ``forward`` encodes every role, so that distributed hooks fire once per step; the encoding itself (packed or padded
engine, gradient caching) is ``modeling.encoder``'s, and every loss is a pure function of ``losses``.

Shape legend: B queries, G passages each (``train_group_size``: 1 positive, then G − 1 negatives), M = B·G passages,
K negative queries, D dimensions. With ``negatives_cross_device`` all of them are gathered over the processes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from FlagEmbedding.finetune.arguments import ModelArguments
from FlagEmbedding.finetune.gather import Gathered, gather_batch
from FlagEmbedding.finetune.negatives import FalseNegatives, GuideModel, add_neg_q
from FlagEmbedding.losses.contrastive import colbert_scores, dense_scores, sparse_scores
from FlagEmbedding.losses.false_negatives import TextKeys
from FlagEmbedding.losses.matryoshka import Widths
from FlagEmbedding.losses.objective import ObjectiveArguments, Terms, add_router_losses, retrieval_objective
from FlagEmbedding.modeling.adapter_options import LoraOptions
from FlagEmbedding.modeling.adapters import AdapterSource, add_adapters
from FlagEmbedding.modeling.backbone import load_backbone, moe_layers, save_checkpoint, select_trainable
from FlagEmbedding.modeling.encoder import M3Encoder, Representations
from FlagEmbedding.modeling.heads import load_heads
from FlagEmbedding.modeling.interchange import choose, read_modules
from FlagEmbedding.modeling.moe import record_routing
from FlagEmbedding.modeling.options import EngineConfig, FfnPart, MoEConfig, Pooling, RouterGradient
from FlagEmbedding.modeling.pooling import check_method
from FlagEmbedding.modeling.projections import load_projections
from FlagEmbedding.modeling.tokenizer import load_tokenizer
from FlagEmbedding.modeling.tokens import TokenBatch, special_ids
from FlagEmbedding.utils.distributed import world_size
from FlagEmbedding.utils.errors import UsageError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# One role's sequences: flat as the collator hands them over, or padded as published.
Features = TokenBatch | Mapping[str, Tensor]


@dataclass
class EncoderOutput(ModelOutput):
    """What a forward gives; loss, terms and scores only where both queries and passages came."""

    loss: Tensor | None = None  # scalar, what is differentiated
    terms: dict[str, Tensor] | None = None  # its named parts, scalars (unscaled; ``…_scaled`` where a weight applies)
    scores: Tensor | None = None  # dense, over the temperature, [B, M] (gathered under ``negatives_cross_device``)
    q_reps: Tensor | None = None  # this process's dense vectors, [B, D]
    p_reps: Tensor | None = None  # [M, D]
    routing: list[tuple[Tensor, Tensor]] | None = None  # per MoE layer, logits [T, E] and chosen experts [T, K]


class BiEncoder(M3Encoder):
    """The model that is trained.

    Args:
        model: which checkpoint, how its vectors are made, what is frozen.
        experts: which layers become experts, what trains alone, how the router learns.
        objective: what is minimized. Without normalized vectors the temperature is 1.
        engine: how the encoder is computed.
        config: another configuration than ``model`` names.
        lora: adapters that train in the place of the weights; None: none.

    Attributes:
        adapter: with adapters, how they are saved.

    Raises:
        UsageError: options that contradict each other or the checkpoint.
    """

    # The Trainer must divide by the accumulation steps itself: our loss is a mean over the micro-batch.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: ModelArguments,
        experts: MoEConfig,
        objective: ObjectiveArguments,
        engine: EngineConfig | None = None,
        config: PreTrainedConfig | None = None,
        lora: LoraOptions | None = None,
    ) -> None:
        source, cache = model.model_name_or_path, model.cache_dir
        backbone = load_backbone(source, moe=experts, config=config or model.config_name, cache_dir=cache)
        colbert_linear = sparse_linear = None
        folder = resolve_folder(source, cache_dir=cache)
        if objective.unified_finetuning:
            colbert_linear, sparse_linear, found = load_heads(folder, backbone.config.hidden_size, model.colbert_dim)
            logger.info("sparse and colbert heads: %s", f"from {source}" if found else "new, to be trained")
        stored = read_modules(folder)
        asked = None if model.sentence_pooling_method is None else check_method(model.sentence_pooling_method)
        normalize = choose("normalize_embeddings", model.normalize_embeddings, stored.normalize, source)
        super().__init__(
            backbone,
            colbert_linear=colbert_linear,
            sparse_linear=sparse_linear,
            pooling=choose("sentence_pooling_method", asked, stored.pooling, source) or "cls",
            normalize=normalize is not False,
            engine=engine,
            projections=load_projections(stored.dense, backbone.config.hidden_size),
            instructions=stored.instructions,
        )
        if normalize is False and model.normalize_embeddings is None and objective.temperature != 1.0:
            logger.warning("%s does not normalize its vectors: the temperature is 1, as published", source)
        self.tokenizer = load_tokenizer(model.tokenizer_name or source, backbone, cache_dir=cache)
        self.skip_ids = special_ids(self.tokenizer)
        self.objective = objective
        self.temperature = objective.temperature if self.normalize else 1.0
        objective.check_widths(self.dimension)
        self.widths = Widths.of(objective, self.normalize)
        self._say_widths(source)
        self.all_rows = objective.has_router_loss
        self.all_terms = True  # False: router losses without a weight, which are only logged, are left out
        self.guide: GuideModel | None = None  # of --guide_model
        self.step = 0  # forwards while training; part of a checkpoint's state, since self-distillation counts them
        self.adapter: AdapterSource | None = None
        if lora is not None and lora.lora_r:
            self._adapt(lora, experts, source)
        else:
            select_trainable(self, experts.only_train, model.fix_encoder, model.fix_position_embedding)

    def _say_widths(self, source: str) -> None:
        """The widths in config.json, under the name that servers look for (vLLM: ``matryoshka_dimensions``)."""
        config: Any = self.model.config
        if self.widths is not None:
            config.matryoshka_dimensions = list(self.widths.dims)
            if self.widths.dims[0] < self.dimension:
                full, widest = self.dimension, self.widths.dims[0]
                logger.warning("--matryoshka_dims: whole vectors of %d are not trained, the widest is %d", full, widest)
        elif getattr(config, "matryoshka_dimensions", None):
            logger.warning(
                "%s was trained at widths %s; --matryoshka_dims keeps them", source, config.matryoshka_dimensions
            )
            config.matryoshka_dimensions = None

    def _adapt(self, lora: LoraOptions, experts: MoEConfig, source: str) -> None:
        """Adapters and heads train, ``Dense`` modules do not."""
        add_adapters(self.model, lora, experts.only_train)
        self.projections.requires_grad_(False)
        # A folder by its whole path: the adapter is loaded from elsewhere later.
        base = str(Path(source).resolve()) if Path(source).is_dir() else source
        self.adapter = AdapterSource(base, alone=lora.lora_save == "adapter")

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute each layer in the backward; always the non-reentrant kind, which frozen layers need."""
        if not self.model.supports_gradient_checkpointing:
            raise UsageError(f"--gradient_checkpointing: {type(self.model).__name__} has none; leave it out")
        renamed = hasattr(self.model, "activation_checkpointing_enable")  # in transformers 5
        enable = self.model.activation_checkpointing_enable if renamed else self.model.gradient_checkpointing_enable
        enable({**(activation_checkpointing_kwargs or {}), "use_reentrant": False}, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The older name of ``activation_checkpointing_enable``."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(
        self,
        query: Features | None = None,
        passage: Features | None = None,
        teacher_scores: Tensor | None = None,
        neg_q: Features | None = None,
        owner: Tensor | None = None,
        keys: TextKeys | None = None,
        guide_texts: Mapping[str, Sequence[str]] | None = None,
    ) -> EncoderOutput:
        """Encode the roles that are given and, with queries and passages, compute the objective.

        Args:
            query: B sequences, flat; or as published ``input_ids`` and ``attention_mask``, ``[B, Lq]``.
            passage: the same, B·G of them, every query's positive first, then its negatives.
            teacher_scores: ``[B, G]`` for knowledge distillation, or None.
            neg_q: K queries that negatives answer.
            owner: ``[K]`` int64, the passage that each answers (may also be ``neg_q["owner"]``). Without it K must be
                B·(G − 1), one for every negative in order.
            keys: the texts as numbers, for ``--mask_twins``.
            guide_texts: the plain texts of ``query`` and ``passage``, for ``--guide_model``.
        """
        if isinstance(neg_q, Mapping) and owner is None:
            owner = neg_q.get("owner")
        roles = {"query": query, "passage": passage, "neg_q": neg_q if self._encodes_neg_q else None}
        batches = {role: _flat(features) for role, features in roles.items() if features is not None}
        full = {"dense", "sparse", "colbert"} if self.objective.unified_finetuning else {"dense"}
        wants = [{"dense"} if role == "neg_q" else full for role in batches]
        with record_routing(self.model) as tape:
            encoded = dict(zip(batches, self.encode(list(batches.values()), wants), strict=True))
        layers = [
            (torch.cat([c.logits for c in calls]), torch.cat([c.experts for c in calls])) for calls in tape.layers
        ]
        q_reps, p_reps = (encoded[role].dense if role in encoded else None for role in ("query", "passage"))
        output = EncoderOutput(q_reps=q_reps, p_reps=p_reps, routing=layers or None)
        if query is None or passage is None:
            return output

        owner = self._owners(owner, encoded) if "neg_q" in encoded else None
        guided = None if self.guide is None or guide_texts is None else self.guide(guide_texts)
        false_negatives = FalseNegatives(self.objective, keys if self.objective.mask_twins else None, guided)
        output.scores, terms = self._objective(encoded, teacher_scores, owner, false_negatives)
        if output.routing:
            terms = add_router_losses(terms, output.routing, self.objective, unweighted=self.all_terms)
        output.terms, output.loss = terms, terms["loss"]
        if self.training:
            self.step += 1
        return output

    def _owners(self, owner: Tensor | None, encoded: dict[str, Representations]) -> Tensor:
        if owner is not None:
            return owner
        queries, passages, given = (len(_dense(encoded[role])) for role in ("query", "passage", "neg_q"))
        if given != passages - queries:
            raise UsageError(
                f"neg_q without 'owner' needs one query for each of the {passages - queries} negatives, got {given}"
            )
        group = passages // queries
        numbers = torch.arange(passages, device=_dense(encoded["passage"]).device)
        return numbers.view(queries, group)[:, 1:].reshape(-1)

    @property
    def _encodes_neg_q(self) -> bool:
        return self.objective.encodes_neg_q(self.objective.penalty_weight)

    def _objective(
        self, encoded: dict[str, Representations], teacher_scores: Tensor | None, owner: Tensor | None,
        false_negatives: FalseNegatives,
    ) -> tuple[Tensor, Terms]:  # fmt: skip
        """The retrieval objective and the penalty: dense scores and the named terms."""
        negative_reps = _dense(encoded["neg_q"]) if "neg_q" in encoded else None
        batch = Gathered(encoded["query"], encoded["passage"], negative_reps, owner, teacher_scores)
        if self.objective.negatives_cross_device and world_size() > 1:
            batch = gather_batch(batch, with_penalty=self._encodes_neg_q)
            false_negatives = false_negatives.shared(_dense(batch.queries).device)
        queries, passages, teacher_scores = batch.queries, batch.passages, batch.teacher_scores
        q_reps, p_reps = _dense(queries), _dense(passages)
        dense, widths = dense_scores(q_reps, p_reps, self.temperature), self.widths
        sparse = colbert = None
        if self.objective.unified_finetuning:
            sparse = sparse_scores(*_lexical(queries), *_lexical(passages), self.skip_ids, self.temperature)
            (q_vectors, q_mask), (p_vectors, _) = queries.colbert_padded(), passages.colbert_padded()
            colbert = colbert_scores(q_vectors, q_mask, p_vectors, self.temperature)
        group_size, taught = p_reps.shape[0] // q_reps.shape[0], teacher_scores is not None
        own = torch.arange(len(q_reps), device=q_reps.device) * group_size
        terms = retrieval_objective(
            dense,
            sparse,
            colbert,
            group_size=group_size,
            teacher_targets=self._targets(teacher_scores),
            self_distill=self.objective.use_self_distill and self.step > self.objective.self_distill_start_step,
            mask=false_negatives.mask(q_reps, p_reps, own, taught) if self.objective.masks else None,
            distill_loss=self.objective.distill_loss,
            by_width=None if widths is None else widths.scored(q_reps, p_reps, self.temperature),
        )
        if batch.negative_reps is not None and batch.owner is not None and len(batch.owner):
            vectors = (q_reps, p_reps, batch.negative_reps)
            terms = add_neg_q(terms, vectors, batch.owner, false_negatives, self.objective, self.temperature, widths)
        return dense, {**terms, **false_negatives.found}

    def _targets(self, teacher_scores: Tensor | None) -> Tensor | None:
        if teacher_scores is None:
            return None
        return torch.softmax(teacher_scores / self.objective.distill_temperature, dim=-1)

    @property
    def has_experts(self) -> bool:
        """True for a mixture of experts, whether made here or loaded."""
        return bool(moe_layers(self.model))

    @property
    def num_experts_per_tok(self) -> int | None:
        """Experts a token is sent to; None for a dense model."""
        return int(self.model.config.num_experts_per_tok) if self.has_experts else None

    @property
    def router(self) -> str:
        """``learned``, or what decides in its place (see ``MoEConfig``)."""
        return str(getattr(self.model.config, "router", "learned"))

    def save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the checkpoint: backbone, heads, tokenizer and what other libraries need to load it."""
        save_checkpoint(self, Path(output_dir), tokenizer=self.tokenizer, state_dict=state_dict)


class BGEM3Model(BiEncoder):
    """``BiEncoder`` under the published constructor keywords; each is explained in the group it belongs to.

    Args:
        model_name, config, tokenizer_name, cache_dir, normlized, sentence_pooling_method, colbert_dim, fix_encoder,
            fix_position_embedding: see ``ModelArguments`` (``normlized`` is the published spelling).
        moe, only_train, num_experts, num_experts_per_tok, router_gradient, router_jitter: see ``MoEConfig``.
        temperature, penalty_weight, negatives_cross_device, unified_finetuning, use_self_distill,
            self_distill_start_step, router_aux_loss_coef, router_z_loss_coef: see ``ObjectiveArguments``.
        engine: see ``EngineConfig``; ``enable_sub_batch`` False takes effect whatever ``engine`` says.
    """

    def __init__(
        self, model_name: str, normlized: bool | None = None, sentence_pooling_method: Pooling | None = None,
        negatives_cross_device: bool = False, temperature: float = 1.0, enable_sub_batch: bool = True,
        unified_finetuning: bool = True, use_self_distill: bool = False, colbert_dim: int = -1,
        self_distill_start_step: int = -1, moe: FfnPart | None = None, only_train: FfnPart | None = None,
        num_experts: int = 1, num_experts_per_tok: int = 1, config: PreTrainedConfig | str | None = None, *,
        penalty_weight: float = 0.1, router_gradient: RouterGradient = "none", router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0, router_jitter: float = 0.0, engine: EngineConfig | None = None,
        fix_encoder: bool = False, fix_position_embedding: bool = False, tokenizer_name: str | None = None,
        cache_dir: str | None = None,
    ) -> None:  # fmt: skip
        config_name, given = (config, None) if isinstance(config, str) else (None, config)
        model = ModelArguments(
            model_name_or_path=model_name, config_name=config_name, tokenizer_name=tokenizer_name, cache_dir=cache_dir,
            fix_position_embedding=fix_position_embedding, fix_encoder=fix_encoder,
            sentence_pooling_method=sentence_pooling_method, normalize_embeddings=normlized, colbert_dim=colbert_dim,
        )  # fmt: skip
        experts = MoEConfig(moe, only_train, num_experts, num_experts_per_tok, router_gradient, router_jitter)
        objective = ObjectiveArguments(
            penalty_weight=penalty_weight, temperature=temperature, negatives_cross_device=negatives_cross_device,
            unified_finetuning=unified_finetuning, use_self_distill=use_self_distill and unified_finetuning,
            self_distill_start_step=self_distill_start_step, router_aux_loss_coef=router_aux_loss_coef,
            router_z_loss_coef=router_z_loss_coef,
        )  # fmt: skip
        engine = engine or EngineConfig()
        engine = replace(engine, enable_sub_batch=engine.enable_sub_batch and enable_sub_batch)
        super().__init__(model, experts, objective, engine, given)

    # The published names of two attributes.
    @property
    def normlized(self) -> bool:
        return self.normalize

    @property
    def sentence_pooling_method(self) -> str:
        return self.pooling


def _flat(features: Features) -> TokenBatch:
    return features if isinstance(features, TokenBatch) else TokenBatch.from_padded(features)


def _dense(representations: Representations) -> Tensor:
    assert representations.dense is not None  # encode() was asked for it
    return representations.dense


def _lexical(representations: Representations) -> tuple[Tensor, Tensor, list[int]]:
    assert representations.token_weights is not None
    return representations.tokens.ids, representations.token_weights, representations.tokens.lengths
