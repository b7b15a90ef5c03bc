"""``report.md`` and ``report.png`` in a run's output folder: losses, what the dev queries say, the routers.

Texts that others wrote (queries, passages) are escaped. Without matplotlib the page has no picture, in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from FlagEmbedding.evaluation.tables import points, shorten, signed_points
from FlagEmbedding.finetune.report.summary import TERMS, TrainingSummary, term_names
from FlagEmbedding.finetune.report.widths import widths_table
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import atomic_open, remove_leftovers
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.pages import literal, render, table

if TYPE_CHECKING:
    from FlagEmbedding.evaluation.report import Change as ChangedQuery
    from FlagEmbedding.finetune.dev.evaluation import DevEvaluation
    from FlagEmbedding.finetune.report.change import Change

logger = get_logger(__name__)

PAGE, PICTURE = "report.md", "report.png"
_TEMPLATE = Path(__file__).with_name("run_report.md.j2")


def write_report(
    summary: TrainingSummary, dev: DevEvaluation | None, best_step: int | None, change: Change | None
) -> Path:
    """Write the page and its picture into the output folder; returns the page's path.

    Args:
        dev: the run's dev queries, where it had any.
        best_step: of the best evaluation (0: the base), where there was one.
        change: between the base and what is kept.

    Raises:
        DataError: the folder cannot be written to.
    """
    folder = Path(str(summary.arguments.training.output_dir))
    kept = summary.kept_step(best_step)
    values = {
        "arguments": summary.arguments,
        "steps": summary.steps,
        "seconds": summary.seconds,
        "losses": _losses(summary.history),
        "evaluations": _evaluations(summary.history, dev),
        "by_width": widths_table(dev),
        "pooled": dev is not None and dev.options.pool,
        "best_step": best_step,
        "kept": kept,
        "change": change,
        "parts": "" if change is None else _parts(change),
        "moved": "" if change is None else _moved(change),
        "tokens": summary.tokens,
        "changes": _changes(dev, kept or summary.steps),  # of a run that helped nothing: what it did
        "routers": _routers(summary.history),
        "usage": summary.usage().every(),
    }
    for name in (PAGE, PICTURE):
        remove_leftovers(folder, name)
    try:
        values["picture"] = PICTURE if _draw(folder / PICTURE, summary, dev, best_step, change) else None
        with atomic_open(folder / PAGE) as stream:
            stream.write(render(_TEMPLATE, **values).rstrip() + "\n")
    except OSError as error:
        raise DataError(f"{folder / PAGE}: the report cannot be written there: {error.strerror}") from error
    logger.info("report: %s", folder / PAGE)
    if dev is not None:
        from FlagEmbedding.finetune.dev.page import write_page

        write_page(folder, dev, kept or summary.steps)
    return folder / PAGE


def _draw(
    path: Path, summary: TrainingSummary, dev: DevEvaluation | None, best_step: int | None, change: Change | None
) -> bool:
    from FlagEmbedding.finetune.report.plots import plot_run

    path.unlink(missing_ok=True)  # an older run's picture never stands beside this page
    try:
        return plot_run(path, summary.history, "" if dev is None else dev.main_key, best_step, change)
    except UsageError as error:
        logger.warning("the report has no picture: %s", error)
        return False


def _losses(history: list[dict[str, Any]]) -> str:
    lines = [line for line in history if "loss" in line]
    if not lines:
        return ""
    first, last = lines[0], lines[-1]
    names = [*term_names(last), *(name for name in ("learning_rate", "grad_norm") if name in last)]
    rows = [
        [TERMS.get(n, n.replace("_", " ")), *(f"{line[n]:.4g}" if n in line else "" for line in (first, last))]
        for n in names
    ]
    return table(["term", f"step {first['step']}", f"step {last['step']}"], rows, [1, 2])


def _evaluations(history: list[dict[str, Any]], dev: DevEvaluation | None) -> str:
    """One line per evaluation: every measure, × 100, and the first one's change against the base."""
    lines = [line for line in history if "eval_seconds" in line]
    if dev is None or not lines:
        return ""
    keys = [key for key in lines[0] if key.startswith("eval_") and key != "eval_seconds"]
    main = dev.main_key
    rows = [
        [
            "0 (base)" if line["step"] == 0 else line["step"],
            *(points(line[key]) for key in keys if key in line),
            signed_points(line[main] - lines[0][main]) if line["step"] else "",
            f"{line['eval_seconds']:.1f}",
        ]
        for line in lines
    ]
    names = [key.removeprefix("eval_").replace("_", " ") for key in keys]
    change = f"change of {main.removeprefix('eval_').replace('_', ' ')}"
    return table(["step", *names, change, "seconds"], rows, range(len(names) + 3))


def _changes(dev: DevEvaluation | None, step: int) -> list[dict[str, Any]]:
    """The queries that gained and lost most between the base and what the run left."""
    base, tuned = (None, None) if dev is None else (dev.kept(0), dev.kept(step))
    if dev is None or base is None or tuned is None:
        return []
    from FlagEmbedding.evaluation.report import most_changed

    qrels = {each.name: each.qrels for each in dev.collections}
    found = {
        title: most_changed((base.system, tuned.system), dev.measures[0], qrels, sign)
        for title, sign in (("gained", 1), ("lost", -1))
    }
    wanted = {
        lang: {docid for each in found.values() for c in each if c.lang == lang for docid in c.hits.values() if docid}
        for lang in qrels
    }
    texts = {each.name: each.texts(wanted[each.name]) for each in dev.collections}
    topics = {each.name: each.topics for each in dev.collections}
    return [
        {"title": title, "measure": dev.measures[0].label, "queries": [_shown(c, topics, texts) for c in changes]}
        for title, changes in found.items()
    ]


def _shown(change: ChangedQuery, topics: dict[str, dict[str, str]], texts: dict[str, dict[str, str]]) -> dict[str, Any]:
    """A query and what was found for it, as the page shows them."""
    hits = {
        name.replace("first hit of step", "first hit at step"): literal(shorten(texts[change.lang].get(docid, ""), 200))
        for name, docid in change.hits.items()
        if docid
    }
    return {
        "lang": change.lang,
        "qid": literal(change.qid),
        "query": literal(topics[change.lang].get(change.qid, "")),
        "values": " → ".join(map(points, change.values)),
        "ranks": " → ".join("none" if rank is None else str(rank) for rank in change.ranks),
        "hits": hits,
    }


def _parts(change: Change) -> str:
    rows = [[each.name, each.parameters, f"{each.moved:.2%}"] for each in change.parts]
    return table(["part", "trained parameters", "moved by"], rows, [1, 2])


def _moved(change: Change) -> str:
    """Vectors and margins of the sampled rows, before and after."""
    both = (change.before, change.after)
    rows = [[f"cosine of {n} with themselves", "1", f"{change.cosine(n):.4f}"] for n in ("queries", "passages")]
    if change.before.margins.size:
        rows.append(["margin over all negatives, median", *(f"{np.median(each.margins):+.4f}" for each in both)])
        rows.append(["margin over the hardest, median", *(f"{np.median(each.hardest):+.4f}" for each in both)])
        rows.append(["rows with a negative above", *(f"{(each.hardest < 0).mean():.1%}" for each in both)])
    return table([f"{len(change.before.queries)} training rows", "base", "kept"], rows, [1, 2])


def _routers(history: list[dict[str, Any]]) -> str:
    lines: Sequence[dict[str, Any]] = [line for line in history if "router_load" in line]
    if not lines:
        return ""
    load = lines[-1]["router_load"]
    rows = [[layer, *(f"{share:.1%}" for share in each)] for layer, each in enumerate(load)]
    return table(["layer", *(f"expert {n}" for n in range(len(load[0])))], rows, range(len(load[0]) + 1))
