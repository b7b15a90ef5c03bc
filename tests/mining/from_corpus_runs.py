"""Running from_corpus over the small collection of ``corpora``, against a real HTTP server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mining.chat_server import ChatServer
from mining.corpora import TEXTS

from FlagEmbedding.mining.from_corpus.command import main

KINDS = ("question", "keywords", "claim")


def answer(message: str, nth: int = 0) -> str:
    """What the server writes for a prompt of ``write_prompts``: by kind and passage, the same at every request."""
    kind, passage = message.split("|", 1)
    passage = re.sub(r"^t\d+ ", "", passage)  # --with_title
    if len(passage) < 40:
        return "Which filler?"
    _, noun, _, place, _, _, years, *_ = passage.split()
    return {
        "question": f"How old is {place}'s {noun}, {years} or more?", "keywords": f"{noun} {place} {years} years",
        "claim": f"{place} has its {noun} since {years} years.",
    }[kind]  # fmt: skip


def write_inputs(folder: Path) -> None:
    """The corpus with ids of its own, and a prompt for each kind that the server understands."""
    with open(folder / "docs.jsonl", "w", encoding="utf-8") as stream:
        for i, text in enumerate(TEXTS):
            stream.write(json.dumps({"docid": f"d{i}", "title": f"t{i}", "text": text}) + "\n")
    (folder / "prompts").mkdir()
    for kind in KINDS:
        (folder / f"prompts/{kind}.txt").write_text(f"<p>{kind}|{{passage}}</p>")


def words(folder: Path, server: ChatServer, encoder: Path, *more: object, output: str = "out") -> list[str]:
    """A command line; the round trip lets everything pass, since a random encoder finds little."""
    given = [
        "--corpus", folder / "docs.jsonl", "--output_dir", folder / output, "--encoder", encoder, "--model", "m",
        "--base_url", server.base_url, "--prompt", folder / "prompts", "--cache", folder / f"{output}.sqlite",
        "--backoff", 0.01, "--passages", 20, "--round_trip_top_k", 63, "--range_for_sampling", "0-40",
        "--negative_number", 3, *more,
    ]  # fmt: skip
    return list(map(str, given))


def run(folder: Path, server: ChatServer, encoder: Path, *more: object, output: str = "out") -> int:
    return main(words(folder, server, encoder, *more, output=output))


def rows(folder: Path, output: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(folder / output / "train/rows.jsonl", encoding="utf-8")]


def contents(folder: Path, output: str = "out") -> dict[str, bytes]:
    """Both folders, file by file."""
    root = folder / output
    return {
        str(path.relative_to(root)): path.read_bytes()
        for name in ("train", "eval") for path in sorted((root / name).rglob("*")) if path.is_file()
    }  # fmt: skip
