"""Cases of the option walk: the objective beyond the published one, and the router of its controls."""

from __future__ import annotations

from options_walk import Case

TAUGHT = "--train_data {scored} --knowledge_distillation"
BEYOND = {
    "router": Case("--router hash", given="--moe intermediate --num_experts 2", only=("trained", "moved")),
    "mask_twins": Case("--mask_twins", given="--per_device_train_batch_size 8", only=("loss", "terms")),
    "false_negative_margin": Case("--false_negative_margin 0.05", only=("loss", "terms")),
    "guide_model": Case("--guide_model {bert}", given="--false_negative_margin 0.0", only=("loss",)),
    "distill_temperature": Case("--distill_temperature 0.1", given=TAUGHT, only=("loss",)),
    "distill_loss": Case("--distill_loss kl", given=TAUGHT, only=("loss",)),
    "neg_q_control": Case("--neg_q_control unused", only=("loss",)),
    "neg_q_as_rows": Case("--neg_q_as_rows", given="--penalty_weight 0", only=("loss", "terms", "tokens")),
}
# Tiny models' cosines are all near 1, where a share of the positive's is the same margin.
ELSEWHERE = {"margin_strategy": "against sentence-transformers: tests/losses/test_false_negatives.py"}
