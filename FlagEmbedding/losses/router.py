"""Losses and statistics of a router. The caller leaves padding out.

Shape legend: T tokens, E experts, K chosen a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RoutingStatistics(NamedTuple):
    """``tokens_per_expert`` ``[E]``: choices that fell on each expert; ``entropy``: of the router's softmax, in nats."""

    tokens_per_expert: Tensor
    entropy: Tensor


def load_balance_loss(router_logits: Tensor, experts: Tensor) -> Tensor:
    """``E · Σ_e f_e · P_e``: f_e the share of choices on expert e, P_e its mean router probability.

    1 when both are uniform, up to E when one expert takes everything; the gradient goes through P alone
    (Fedus et al. 2021, Switch Transformers, equations 4 to 6; for K > 1 the shares are over all choices).

    Args:
        router_logits: ``[T, E]``.
        experts: ``[T, K]`` int64.

    Returns:
        scalar; 0 for no tokens.
    """
    tokens, count = router_logits.shape
    if not tokens:
        return router_logits.sum() * 0
    probabilities = torch.softmax(router_logits, dim=-1).mean(dim=0)
    shares = F.one_hot(experts, count).to(router_logits.dtype).sum(dim=(0, 1)) / experts.numel()
    return count * (shares * probabilities).sum()


def z_loss(router_logits: Tensor) -> Tensor:
    """``mean_t (log Σ_e exp x_te)²``, which keeps the router's logits small (Zoph et al. 2022, ST-MoE, equation 5).

    Args:
        router_logits: ``[T, E]``.

    Returns:
        scalar; 0 for no tokens.
    """
    if not router_logits.shape[0]:
        return router_logits.sum() * 0
    return torch.logsumexp(router_logits, dim=-1).square().mean()


def routing_statistics(router_logits: Tensor, experts: Tensor) -> RoutingStatistics:
    """Choices an expert and the mean entropy of the router's softmax over all experts (no gradient)."""
    log_probabilities = torch.log_softmax(router_logits.detach(), dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
    return RoutingStatistics(F.one_hot(experts, router_logits.shape[1]).sum(dim=(0, 1)), entropy)
