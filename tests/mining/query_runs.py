"""Running query_generation against a server, and reading what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

from mining.chat_server import ChatServer, good_query

from FlagEmbedding.mining.query_generation.command import main

PROMPT = "Ask about: <p>{passage}</p>"


def run(folder: Path, *words: object, name: str = "out.jsonl") -> int:
    return main(["--input_file", str(folder / "in.jsonl"), "--output_file", str(folder / name), *map(str, words)])


def endpoint(server: ChatServer, *words: object) -> list[object]:
    return ["--model", "m", "--base_url", server.base_url, "--prompt", PROMPT, "--backoff", 0.01, *words]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def report(folder: Path, name: str = "out") -> dict:
    return json.loads((folder / f"reports/{name}.neg_q.json").read_text())


def expected(rows: list[dict]) -> list[dict]:
    owner = {row["pos"][0]: row["query"] for row in rows}
    return [{**row, "neg_q": [owner.get(text) or good_query(text) for text in row["neg"]]} for row in rows]
