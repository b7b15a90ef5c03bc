"""``README.md``: the model card of what a run left, with the front matter that the hub reads.

A card that somebody wrote or changed is never overwritten: ours ends with a line that holds the digest of what stands
before it, and where that line is not there or does not fit, the new card goes to ``MODEL_CARD.md``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from FlagEmbedding.evaluation.tables import points, signed_points
from FlagEmbedding.finetune.report.summary import TrainingSummary
from FlagEmbedding.utils.errors import DataError
from FlagEmbedding.utils.hub import resolve_folder
from FlagEmbedding.utils.identity import digest
from FlagEmbedding.utils.io import atomic_open
from FlagEmbedding.utils.logging import get_logger
from FlagEmbedding.utils.pages import render, table

if TYPE_CHECKING:
    from FlagEmbedding.finetune.dev.evaluation import DevEvaluation

logger = get_logger(__name__)

CARD, BESIDE, BASE_CARD = "README.md", "MODEL_CARD.md", "README.base.md"
_TEMPLATE = Path(__file__).with_name("card.md.j2")
_SEAL = re.compile(r"\n<!-- written by FlagEmbedding, ([0-9a-f]{16}) -->\s*$")
_TAGS = ["sentence-transformers", "feature-extraction", "FlagEmbedding"]


@dataclass(frozen=True)
class Outcome:
    """What a card tells of.

    Attributes:
        summary: of the run.
        lines: what the run said of itself at its start, by name.
        dev: its dev queries, where it had any.
        kept: the step whose weights it left.
    """

    summary: TrainingSummary
    lines: dict[str, str]
    dev: DevEvaluation | None
    kept: int


def write_card(outcome: Outcome, place: str | None = None) -> Path:
    """Write the card into the output folder; returns its path.

    Args:
        place: the model's name on the hub; None: its folder.

    Raises:
        DataError: the folder cannot be written to.
    """
    arguments = outcome.summary.arguments
    folder = Path(str(arguments.training.output_dir))
    path = folder / CARD
    if path.exists() and not _is_ours(path):
        path = folder / BESIDE
        logger.warning("%s is not this program's, or was changed: it stays, the model card is %s", folder / CARD, path)
    base = _base(arguments.model.model_name_or_path, arguments.model.cache_dir)
    text = _text(outcome, place, base)
    try:
        if base.card is not None and base.local and (base.folder / CARD).resolve() != path.resolve():
            shutil.copyfile(base.folder / CARD, folder / BASE_CARD)
        with atomic_open(path) as stream:
            stream.write(f"{text}\n<!-- written by FlagEmbedding, {digest(text)[:16]} -->\n")
    except OSError as error:
        raise DataError(f"{path}: the model card cannot be written there: {error.strerror}") from error
    logger.info("model card: %s", path)
    return path


def _is_ours(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is not None and digest(text[: seal.start()])[:16] == seal[1]


@dataclass(frozen=True)
class _Base:
    name: str  # as others can find it: a hub id, or a folder's last part
    folder: Path
    local: bool
    card: ModelCardData | None


def _base(name: str, cache_dir: str | None) -> _Base:
    folder, local = resolve_folder(name, cache_dir=cache_dir), Path(name).is_dir()
    card = None
    if (folder / CARD).is_file():
        try:
            card = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            logger.warning("%s: its front matter cannot be read: %s", folder / CARD, " ".join(str(error).split()))
    return _Base(Path(name).resolve().name if local else name, folder, local, card)


def _text(outcome: Outcome, place: str | None, base: _Base) -> str:
    summary, arguments = outcome.summary, outcome.summary.arguments
    folder = Path(str(arguments.training.output_dir)).resolve()
    name = (place or folder.name).rpartition("/")[2]
    usage, data = summary.usage(place or folder.name), _front_matter(outcome, name, base)
    body = render(
        _TEMPLATE,
        name=name,
        base=base,
        data=data,
        model=summary.model,
        dimension=summary.model.dimension,
        steps=summary.steps,
        tokens=summary.tokens,
        kept=outcome.kept,
        usage=usage.every(),
        measured=_measured(outcome),
        lines={key: _public(text) for key, text in outcome.lines.items() if key not in ("model", "output")},
        beside=base.card is not None and base.local,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"))


def _front_matter(outcome: Outcome, name: str, base: _Base) -> ModelCardData:
    arguments, said = outcome.summary.arguments, base.card or ModelCardData()
    results = list(_results(outcome))
    languages = [lang for lang in arguments.evaluation.eval_languages if re.fullmatch("[a-z]{2,3}", lang)]
    given = arguments.evaluation.license
    named = {f"license_{key}": said.get(f"license_{key}") for key in ("name", "link")} if given is None else {}
    sources = [each for each in arguments.data.train_data if not Path(each).exists()]
    return ModelCardData(
        language=languages or said.get("language"),
        license=given or said.get("license"),
        base_model=said.get("base_model") if base.local else base.name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=[*_TAGS, *(["custom_code", "mixture-of-experts"] if outcome.summary.model.has_experts else [])],
        datasets=[re.split(r"[:@]", each)[0] for each in sources] or None,
        model_name=name if results else None,
        eval_results=results or None,
        **named,
    )


def _results(outcome: Outcome) -> Iterator[EvalResult]:
    dev = outcome.dev
    found = None if dev is None else dev.kept(outcome.kept)
    if dev is None or found is None:
        return
    held = dev.options.eval_data_dir is None
    title = "held-out training rows" if held else Path(str(dev.options.eval_data_dir)).resolve().name
    for lang in found.system.languages:
        for measure in dev.measures:
            yield EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type=re.sub(r"\W+", "-", title),
                dataset_name=title if held else f"{title} {lang} {dev.options.eval_split}",
                dataset_config=None if held else lang,
                dataset_split=None if held else dev.options.eval_split,
                metric_type=measure.key.replace("@", "_at_"),
                metric_name=f"{measure.label}{' (pooled)' * dev.options.pool}",
                metric_value=round(found.system.mean(lang, measure), 5),
            )


def _measured(outcome: Outcome) -> str:
    """A table of base and kept checkpoint."""
    dev = outcome.dev
    base, found = (None, None) if dev is None else (dev.kept(0), dev.kept(outcome.kept))
    if dev is None or base is None or found is None:
        return ""
    rows = []
    for lang in found.system.shown:
        for measure in dev.measures:
            old, new = base.system.mean(lang, measure), found.system.mean(lang, measure)
            label = f"{measure.label}{' (pooled)' * dev.options.pool}"
            rows.append([lang, label, points(old), points(new), signed_points(new - old)])
    return table(["language", "measure", "base", "this model", "change"], rows, [2, 3, 4])


def _public(text: str) -> str:
    """Without the folders of this machine: of a path, its last part."""

    def short(found: re.Match[str]) -> str:
        word = found[0]
        return Path(word).name if word.startswith(("/", "~", ".")) or Path(word).exists() else word

    return re.sub(r"(?<![^\s'\"])[^\s'\",]*/[^\s'\",]*", short, text)
