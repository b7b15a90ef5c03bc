"""MIRACL (Zhang et al. 2023, arXiv 2210.09984): files of its 18 languages, from a local folder or the hub.

Layout, the hub's own (datasets ``miracl/miracl-corpus`` and ``miracl/miracl``) and the same below ``data_dir``:

    miracl-corpus-v1.0-{lang}/docs-{n}.jsonl.gz                      {"docid", "title", "text"} per line
    miracl-v1.0-{lang}/topics/topics.miracl-v1.0-{lang}-{split}.tsv  qid, tab, query
    miracl-v1.0-{lang}/qrels/qrels.miracl-v1.0-{lang}-{split}.tsv    qid Q0 docid grade

A folder given as ``data_dir`` is asked first, the hub (or its cache) for what is not there; for other languages than
MIRACL's only the folder. The raw files are read; no loading script is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from FlagEmbedding.collections.beir import beir_folder
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.hub import HubError, resolve_dataset
from FlagEmbedding.utils.io import PathLike
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

LANGUAGES = ("ar", "bn", "de", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "yo", "zh")
_CORPUS_HUB, _TOPICS_HUB = "miracl/miracl-corpus", "miracl/miracl"
_DOCS = re.compile(r"docs-([0-9]+)\.jsonl(\.gz|\.zst)?")
_LANGUAGE = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")


def check_languages(languages: list[str], data_dir: PathLike | None = None) -> list[str]:
    """The languages as given, each once; a folder of one's own may have any, the hub has MIRACL's.

    Raises ``UsageError`` for one that is neither MIRACL's nor in the folder.
    """
    unknown = [lang for lang in languages if lang not in LANGUAGES and not _in_folder(lang, data_dir)]
    if unknown:
        where = "not in MIRACL" if data_dir is None else f"not in MIRACL, and nothing of it in --data_dir {data_dir}"
        raise UsageError(f"--languages {' '.join(unknown)}: {where}; choose from {' '.join(LANGUAGES)}")
    if not languages:
        raise UsageError(f"--languages: name at least one of {' '.join(LANGUAGES)}")
    return list(dict.fromkeys(languages))


def is_code(lang: str) -> bool:
    """Whether a folder of one's own may call a language so: it becomes part of paths."""
    return _LANGUAGE.fullmatch(lang) is not None


def _in_folder(lang: str, data_dir: PathLike | None) -> bool:
    if data_dir is None or not is_code(lang):
        return False
    names = (f"miracl-corpus-v1.0-{lang}", f"miracl-v1.0-{lang}")
    return any((place / name).exists() for place in _places(data_dir) for name in names) or bool(
        beir_folder(data_dir, lang)
    )


def _places(data_dir: PathLike) -> list[Path]:
    """A folder in the hub's layout, and where clones of the hub's datasets may lie in it."""
    root = Path(data_dir)
    return [root, root / "miracl-corpus", root / "miracl", root / _CORPUS_HUB, root / _TOPICS_HUB]


def corpus_files(lang: str, data_dir: PathLike | None = None, cache_dir: str | None = None) -> list[Path]:
    """The corpus files of a language in number order (docs-0, docs-1, …).

    Raises ``DataError`` when there are none, or one is missing in between.
    """
    name = f"miracl-corpus-v1.0-{lang}"
    folder = _find(_CORPUS_HUB, name, f"{name}/docs-*.jsonl.gz", data_dir, cache_dir)
    numbered = numbered_docs(folder)
    if not numbered:
        raise DataError(f"{folder}: expected docs-0.jsonl.gz, docs-1.jsonl.gz, …, found none")
    for expected, (number, path) in enumerate(numbered):
        if number != expected:
            what = f"docs-{expected} is missing" if number > expected else f"{path.name}: docs-{number} is there twice"
            raise DataError(f"{folder}: {what}; the corpus is incomplete, fetch it again")
    return [path for _, path in numbered]


def numbered_docs(folder: Path) -> list[tuple[int, Path]]:
    """The files docs-0.jsonl(.gz), docs-1 … of a folder with their numbers, in order. One line of the log names others
    that look like rows and are not read."""
    found, others = list[tuple[int, Path]](), list[str]()
    for path in sorted(folder.iterdir()):
        if (name := _DOCS.fullmatch(path.name)) and not path.is_dir():
            found.append((int(name[1]), path))
        elif path.name[0] != "." and ".json" in path.name.lower():
            others.append(path.name)
    if found and others:
        logger.warning("%s: not read, since a corpus is docs-0.jsonl.gz, docs-1 …: %s", folder, ", ".join(others[:5]))
    return sorted(found)


def topics_file(lang: str, split: str = "dev", data_dir: PathLike | None = None, cache_dir: str | None = None) -> Path:
    """The queries of a split."""
    return _split_file("topics", lang, split, data_dir, cache_dir)


def qrels_file(lang: str, split: str = "dev", data_dir: PathLike | None = None, cache_dir: str | None = None) -> Path:
    """The judgments of a split."""
    return _split_file("qrels", lang, split, data_dir, cache_dir)


def _split_file(kind: str, lang: str, split: str, data_dir: PathLike | None, cache_dir: str | None) -> Path:
    relative = f"miracl-v1.0-{lang}/{kind}/{kind}.miracl-v1.0-{lang}-{split}.tsv"
    return _find(_TOPICS_HUB, relative, relative, data_dir, cache_dir)


def _find(repo: str, relative: str, pattern: str, data_dir: PathLike | None, cache_dir: str | None) -> Path:
    """``relative`` below ``data_dir``, or below a clone of the hub's datasets in it, else from the hub."""
    places: list[Path] = []
    if data_dir is not None:
        root = Path(data_dir)
        if not root.is_dir():
            raise DataError(f"--data_dir {root}: no such folder")
        places = _places(root)
    lang = relative.split("/")[0].rpartition("-v1.0-")[2]
    if lang not in LANGUAGES:
        found = next((place / relative for place in places if (place / relative).exists()), None)
        if found is None:
            layouts = f"{relative}, or {lang}/corpus.jsonl and corpus.jsonl in BEIR's layout"
            raise DataError(f"--data_dir {data_dir}: nothing of {lang} in it; expected {layouts}")
        return found
    try:
        return resolve_dataset(repo, relative, pattern=pattern, places=places, cache_dir=cache_dir)
    except HubError as error:
        where = f"not in --data_dir {data_dir} and " if places else ""
        hint = "" if places else "; or give a folder of the same layout with --data_dir"
        login = " (miracl/miracl wants its terms accepted on the hub and `hf auth login`)" * (repo == _TOPICS_HUB)
        raise DataError(f"{relative}: {where}not from hub dataset {repo}: {error}{login}{hint}") from error
