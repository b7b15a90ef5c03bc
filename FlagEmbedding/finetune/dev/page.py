"""``dev.html``: what the base and the kept checkpoint find for each dev query, side by side, in one static page.

Nothing is loaded from elsewhere. Texts lie in the page as JSON, without a character that could end it, and are put in
place as text, so nothing in them acts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from FlagEmbedding.evaluation.live import Evaluated
from FlagEmbedding.evaluation.tables import shorten
from FlagEmbedding.finetune.dev.evaluation import DevEvaluation
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.io import atomic_open
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.pages import printable, render

logger = get_logger(__name__)

PAGE = "dev.html"
MOST = 20_000  # queries on the page, those that changed most
_LENGTH = 600  # columns of a passage
_TEMPLATE = Path(__file__).with_name("page.html.j2")
# Characters that end a script, begin a comment, or end a line within JavaScript's text.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_page(folder: Path, dev: DevEvaluation, step: int) -> Path | None:
    """Write the page of the base and ``step`` into ``folder``; None where one of the two was not evaluated."""
    base, tuned = dev.kept(0), dev.kept(step)
    if base is None or tuned is None:
        return None
    values = {
        "title": f"{dev.source}, step {step}",
        "data": as_script({"measure": dev.measures[0].label, "step": step, **_data(dev, base, tuned)}),
        "pooled": dev.options.pool,
    }
    path = folder / PAGE
    try:
        with atomic_open(path) as stream:
            stream.write(render(_TEMPLATE, **values))
    except OSError as error:
        raise DataError(f"{path}: the page cannot be written there: {error.strerror}") from error
    logger.info("every dev query, base and step %d side by side: %s", step, path)
    return path


def as_script(value: Any) -> str:
    """JSON that may stand in a page's script element."""
    return json.dumps(value, ensure_ascii=False).translate(_ESCAPES)


def _data(dev: DevEvaluation, base: Evaluated, tuned: Evaluated) -> dict[str, Any]:
    """Queries with both rankings, and the texts of the passages in them once each."""
    key = dev.measures[0].key
    queries: list[dict[str, Any]] = []
    for each in dev.collections:
        for qid in each.qrels:
            judged = each.qrels[qid]
            values = [of.system.languages[each.name].values[key][qid] for of in (base, tuned)]
            found = [of.hits[each.name].get(qid, []) for of in (base, tuned)]
            sides = [[[docid, judged.get(docid)] for docid in side] for side in found]
            query = printable(each.topics.get(qid, ""))
            queries.append({"lang": each.name, "qid": qid, "query": query, "values": values, "hits": sides})
    every = len(queries)
    queries.sort(key=lambda q: (-abs(q["values"][1] - q["values"][0]), q["lang"], q["qid"]))
    del queries[MOST:]
    passages = {}
    for each in dev.collections:
        own = [q["hits"] for q in queries if q["lang"] == each.name]
        wanted = {docid for sides in own for side in sides for docid, _ in side}
        texts = each.texts(wanted)
        passages[each.name] = {docid: printable(shorten(text, _LENGTH)) for docid, text in texts.items()}
    return {"queries": queries, "passages": passages, "every": every}
