"""MIRACL (Zhang et al. 2023, arXiv 2210.09984): files of its 18 languages, from a local folder or the hub.

Layout, the hub's own (datasets ``miracl/miracl-corpus`` and ``miracl/miracl``) and the same below ``data_dir``:

    miracl-corpus-v1.0-{lang}/docs-{n}.jsonl.gz                      {"docid", "title", "text"} a line
    miracl-v1.0-{lang}/topics/topics.miracl-v1.0-{lang}-{split}.tsv  qid, tab, query
    miracl-v1.0-{lang}/qrels/qrels.miracl-v1.0-{lang}-{split}.tsv    qid Q0 docid grade

A folder given as ``data_dir`` is asked first, the hub (or its cache) for what is not there. The raw files are read;
no loading script is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.io import open_text
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

LANGUAGES = ("ar", "bn", "de", "en", "es", "fa", "fi", "fr", "hi", "id", "ja", "ko", "ru", "sw", "te", "th", "yo", "zh")
SPLITS = ("train", "dev", "testA", "testB")
_CORPUS_HUB, _TOPICS_HUB = "miracl/miracl-corpus", "miracl/miracl"
_DOCS = re.compile(r"docs-(\d+)\.jsonl(\.gz)?$")


def check_languages(languages: list[str]) -> list[str]:
    """The languages as given, each once; raises ``UsageError`` for one that MIRACL does not have."""
    unknown = [lang for lang in languages if lang not in LANGUAGES]
    if unknown:
        raise UsageError(f"--languages {' '.join(unknown)}: not in MIRACL; choose from {' '.join(LANGUAGES)}")
    if not languages:
        raise UsageError(f"--languages: name at least one of {' '.join(LANGUAGES)}")
    return list(dict.fromkeys(languages))


def corpus_files(lang: str, data_dir: str | Path | None = None, cache_dir: str | None = None) -> list[Path]:
    """The corpus files of a language in number order (docs-0, docs-1, …).

    Raises ``DataError`` when there are none, or one is missing in between.
    """
    name = f"miracl-corpus-v1.0-{lang}"
    folder = _local(data_dir, name)
    if folder is None:
        folder = _from_hub(_CORPUS_HUB, f"{name}/docs-*.jsonl.gz", name, data_dir, cache_dir)
    numbered = sorted((int(found[1]), path) for path in folder.iterdir() if (found := _DOCS.search(path.name)))
    if not numbered:
        raise DataError(f"{folder}: expected docs-0.jsonl.gz, docs-1.jsonl.gz, …, found none")
    for expected, (number, path) in enumerate(numbered):
        if number != expected:
            what = f"docs-{expected} is missing" if number > expected else f"{path.name}: docs-{number} is there twice"
            raise DataError(f"{folder}: {what}; the corpus is incomplete, fetch it again")
    return [path for _, path in numbered]


def topics_file(
    lang: str, split: str = "dev", data_dir: str | Path | None = None, cache_dir: str | None = None
) -> Path:
    """The queries of a split."""
    return _one_file(f"miracl-v1.0-{lang}/topics/topics.miracl-v1.0-{lang}-{split}.tsv", data_dir, cache_dir)


def qrels_file(lang: str, split: str = "dev", data_dir: str | Path | None = None, cache_dir: str | None = None) -> Path:
    """The judgements of a split."""
    return _one_file(f"miracl-v1.0-{lang}/qrels/qrels.miracl-v1.0-{lang}-{split}.tsv", data_dir, cache_dir)


def read_topics(path: str | Path) -> dict[str, str]:
    """``qid -> query`` in file order. Raises ``DataError`` with file and line for a broken or repeated line."""
    topics: dict[str, str] = {}
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                qid, tab, query = line.rstrip("\r\n").partition("\t")
                if not tab or not qid.strip() or not query.strip():
                    raise DataError(f"{path}:{number}: expected 'qid<tab>query', found {line.strip()[:60]!r}")
                if len(qid.split()) != 1:
                    raise DataError(f"{path}:{number}: a qid holds no white space, found {qid!r}")
                if qid in topics:
                    raise DataError(f"{path}:{number}: query {qid!r} is there twice")
                topics[qid] = query.strip()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not topics:
        raise DataError(f"{path}: no queries in it")
    return topics


def _one_file(relative: str, data_dir: str | Path | None, cache_dir: str | None) -> Path:
    return _local(data_dir, relative) or _from_hub(_TOPICS_HUB, relative, relative, data_dir, cache_dir)


def _local(data_dir: str | Path | None, relative: str) -> Path | None:
    """``relative`` below ``data_dir``, or below a clone of the hub's dataset in it; None where it is not."""
    if data_dir is None:
        return None
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"--data_dir {root}: no such folder")
    clones = [root, root / "miracl-corpus", root / "miracl", root / _CORPUS_HUB, root / _TOPICS_HUB]
    for base in clones:
        if (base / relative).exists():
            return base / relative
    logger.info("%s is not in %s: asking the hub", relative, root)
    return None


def _from_hub(repo: str, pattern: str, relative: str, data_dir: str | Path | None, cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        root = snapshot_download(repo, repo_type="dataset", allow_patterns=[pattern], cache_dir=cache_dir)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(_absent(repo, relative, data_dir, str(error).strip().splitlines()[0])) from error
    found = Path(root) / relative
    if not found.exists():
        raise DataError(_absent(repo, relative, data_dir, "the dataset holds no such file"))
    return found


def _absent(repo: str, relative: str, data_dir: str | Path | None, reason: str) -> str:
    place = f"not in --data_dir {data_dir} and " if data_dir is not None else ""
    cure = "" if data_dir is not None else "; or give a folder of the same layout with --data_dir"
    login = " (miracl/miracl wants its terms accepted on the hub and `hf auth login`)" if repo == _TOPICS_HUB else ""
    return f"{relative}: {place}not from hub dataset {repo}: {reason}{login}{cure}"
