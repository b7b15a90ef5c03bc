"""Losses and statistics of a router. The caller leaves padding out.

Shape legend: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from FlagEmbedding.losses.precision import full_precision


class RoutingStatistics(NamedTuple):
    """``tokens_per_expert`` ``[E]`` int64: choices on each expert; ``entropy``: the mean, in nats."""

    tokens_per_expert: Tensor
    entropy: Tensor


@full_precision
def load_balance_loss(router_logits: Tensor, experts: Tensor) -> Tensor:
    """``E · Σ_e f_e · P_e``, a scalar: f_e the share of choices on expert e, P_e its mean router probability.

    0 for no tokens, 1 when both are uniform, up to E when one expert takes everything; the gradient goes through P
    alone. Use it (weight about 0.01) when the statistics show an expert starving. Source: Fedus et al. 2021 (Switch
    Transformers), equations 4 to 6; for K > 1 the shares are over all choices.

    Args:
        router_logits: ``[T, E]`` floating, real tokens only.
        experts: ``[T, K]`` int64, the chosen ones.
    """
    tokens, count = router_logits.shape
    if not tokens:
        return router_logits.sum() * 0
    probabilities = torch.softmax(router_logits, dim=-1).mean(dim=0)  # [E]
    shares = _counts(experts, count).to(probabilities.dtype) / experts.numel()  # [E]
    return count * (shares * probabilities).sum()


@full_precision
def z_loss(router_logits: Tensor) -> Tensor:
    """``mean_t (log Σ_e exp x_te)²``, a scalar, 0 for no tokens: keeps logits small, so that softmax stays exact.

    Use it (weight about 0.001) when router logits grow during training. Source: Zoph et al. 2022 (ST-MoE), equation 5.

    Args:
        router_logits: ``[T, E]`` floating, real tokens only.
    """
    if not router_logits.shape[0]:
        return router_logits.sum() * 0
    return torch.logsumexp(router_logits, dim=-1).square().mean()


@torch.no_grad()
@full_precision
def routing_statistics(router_logits: Tensor, experts: Tensor) -> RoutingStatistics:
    """How the choices fall on the experts, and how sure the router is: the mean entropy of its softmax over all E.

    Args:
        router_logits: ``[T, E]`` floating, real tokens only.
        experts: ``[T, K]`` int64.

    Returns:
        Counts ``[E]`` that sum to T·K, and a scalar in [0, log E]; both 0 for no tokens. No gradient.
    """
    tokens_per_expert = _counts(experts, router_logits.shape[1])
    log_probabilities = torch.log_softmax(router_logits, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum() / max(1, router_logits.shape[0])
    return RoutingStatistics(tokens_per_expert, entropy)


def _counts(experts: Tensor, count: int) -> Tensor:
    """``[E]`` int64, how often each expert was chosen; unlike ``bincount`` it waits for no device."""
    chosen = experts.flatten()
    return torch.zeros(count, dtype=torch.int64, device=chosen.device).index_add(0, chosen, torch.ones_like(chosen))
