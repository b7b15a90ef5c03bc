"""What a run would ask, in requests and tokens (``--dry_run``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from FlagEmbedding.mining.from_corpus.arguments import FromCorpusOptions
from FlagEmbedding.mining.from_corpus.prompting import Prompter
from FlagEmbedding.mining.from_corpus.sampling import Drawn
from FlagEmbedding.mining.query_generation.answer_cache import AnswerCache
from FlagEmbedding.mining.query_generation.pipeline import estimated_tokens, make_task


def estimate(
    options: FromCorpusOptions, drawn: Sequence[Drawn], counts: Counter[str], prompters: Mapping[str, Prompter],
    cache: AnswerCache, job: str,
) -> dict[str, Any]:  # fmt: skip
    """Requests and tokens of the first round of each stage; of negatives' queries at most so many."""
    name, most = options.endpoint.model or options.local.local_model or "", options.writing.max_tokens
    stages: dict[str, dict[str, Any]] = {}
    for kind, prompter in prompters.items():
        tasks = [make_task(name, prompter(passage.text), 0) for passage in drawn]
        sizes = [estimated_tokens(task.prompt) for task in tasks if cache.get(task.key) is None]
        stages[kind] = {
            "calls": len(sizes), "cached": len(tasks) - len(sizes), "prompt_tokens": sum(sizes),
            "completion_tokens_at_most": len(sizes) * most, "example": tasks[0].prompt,
            "mean": sum(estimated_tokens(task.prompt) for task in tasks) / len(tasks),
        }  # fmt: skip
    if options.kinds.neg_q == "generate":
        rows = (counts["drawn"] - counts["dev"]) * len(prompters)
        texts = counts["passages"] - counts["empty"] - counts["repeated"] - counts["drawn"]
        calls = min(rows * options.sampling.negative_number, texts)
        mean = stages["question" if "question" in stages else next(iter(stages))]["mean"]
        stages["neg_q, at most"] = {
            "calls": calls, "cached": 0, "prompt_tokens": round(calls * mean), "completion_tokens_at_most": calls * most
        }  # fmt: skip
    prompt, completion = (
        sum(s[key] for s in stages.values()) for key in ("prompt_tokens", "completion_tokens_at_most")
    )
    price = [tokens / 1e6 * price for tokens, price in zip((prompt, completion), options.kinds.prices, strict=False)]
    limit = options.endpoint.max_requests
    return {
        "name": name, "stages": stages, "attempts": options.checks.attempts, "prompt_tokens": prompt,
        "completion_tokens_at_most": completion, "cost": sum(price) if price else None, "max_requests": limit,
        "already_sent": cache.spent(job) if limit is not None else 0,
    }  # fmt: skip
