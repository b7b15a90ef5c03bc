"""Situations of files, texts, indexes, judgments, removals, and of an LLM's endpoint."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from functools import partial

from mining.chat_server import ChatServer
from situations.world import LANG, Place, Situation

ROW = {"query": "which river?", "pos": ["the river Han"], "neg": ["a mountain"]}
LINE = json.dumps(ROW) + "\n"
CORPUS = f"data/miracl-corpus-v1.0-{LANG}"
TOPICS, QRELS = (f"data/miracl-v1.0-{LANG}/{kind}/{kind}.miracl-v1.0-{LANG}-dev.tsv" for kind in ("topics", "qrels"))
KEY = "sk-a0123456789abcdefghij"


def checked(name: str, content: str | bytes) -> Callable[[Place], object]:
    return lambda place: place.run("mining check_data", place.write(name, content))


def folder(**files: str | bytes) -> Callable[[Place], object]:
    """A folder of training rows; ``__`` stands for a dot."""

    def act(place: Place) -> None:
        for name, content in files.items():
            place.write(f"rows/{name.replace('__', '.').replace('_of_', '/')}", content)
        place.run("mining check_data", place.folder / "rows")

    return act


def converted(name: str, content: str) -> Callable[[Place], object]:
    def act(place: Place) -> None:
        words = ["--format", "triples", "--input", place.write(name, content)]
        answer = place.run("mining convert", *words, "--output_file", place.folder / "out.jsonl")
        if answer.code == 0:
            answer.printed += (place.folder / "out.jsonl").read_text()

    return act


def merged(name: str) -> Callable[[Place], object]:
    def act(place: Place) -> None:
        rows = place.write("rows.jsonl", LINE)
        answer = place.run("mining merge", "--input_file", rows, "--output_file", place.folder / name)
        if (place.folder / name).exists():
            answer.printed += f"first bytes: {(place.folder / name).read_bytes()[:2]!r}\n"

    return act


def evaluated(*files: tuple[str, str | bytes], upto: int = 2) -> Callable[[Place], object]:
    """Steps 0 to ``upto`` on a collection in which ``files`` are others."""

    def act(place: Place) -> None:
        place.collection()
        for name, content in files:
            place.write(name, content)
        for number in range(upto + 1):
            if getattr(place, f"step{number}")().code:
                return

    return act


def marked(place: Place) -> None:
    place.collection()
    place.write(TOPICS, b"\xef\xbb\xbf" + (place.folder / TOPICS).read_bytes())
    place.step0()
    place.step1()
    place.outcomes[-1].printed += f"queries in the run: {len(queries_of(place))} of 5\n"


def queries_of(place: Place) -> set[str]:
    run = place.folder / "runs" / place.model.name / f"{LANG}.txt"
    return {line.split()[0] for line in run.read_text().splitlines()}


def indexed(change: Callable[[Place], object], again: str = "step1") -> Callable[[Place], object]:
    """An index that is changed before it is used ``again``."""

    def act(place: Place) -> None:
        place.step0()
        change(place)
        getattr(place, again)()

    return act


def turned(place: Place) -> None:
    docids = (place.index / "docid").read_text().splitlines(True)
    (place.index / "docid").write_text("".join(docids[::-1]))


def foreign_vectors(place: Place) -> None:
    """An index of another program that holds a NaN."""
    (place.index / "manifest.json").unlink()
    content = bytearray((place.index / "index").read_bytes())
    content[-4:] = b"\0\0\xc0\x7f"
    (place.index / "index").write_bytes(content)


def foreign_folder(place: Place) -> None:
    place.write(f"index/{place.model.name}/{LANG}/index.html", "mine")
    place.write(f"index/{place.model.name}/{LANG}/shards/photo.txt", "mine")
    place.step0("--overwrite", "True")


def mined(place: Place) -> None:
    """Negatives mined beside a work folder that holds a photo."""
    place.write(".out.jsonl.work/photo.txt", "mine")
    place.collection()
    words = ["--corpus", place.folder / CORPUS, "--index_dir", place.folder / "index", "--range_for_sampling", "0-10"]
    place.run("mining hard_negatives", "--input_file", place.rows(), "--encoder", place.model, *words,
              "--negative_number", 2, "--output_file", place.folder / "out.jsonl")  # fmt: skip


def refreshed(place: Place) -> None:
    place.write("out/refresh/epoch-1/index/photo.txt", "mine")
    place.rows(count=12)
    place.train(max_steps=None, num_train_epochs=2, save_strategy="no", refresh_negatives_every_n_epochs=1,
                refresh_range_for_sampling="0-10")  # fmt: skip


def asked(place: Place, script: Callable[[str, int], str] | None = None, base_url: str = "", **server: object) -> None:
    """Queries asked of an endpoint that answers as ``script`` says; then, whether the key is in any file."""
    os.environ["SITUATION_KEY"] = KEY
    rows = place.write("in.jsonl", LINE)
    with ChatServer(script or (lambda passage, nth: "good"), **server) as endpoint:  # type: ignore[arg-type]
        url = base_url or endpoint.base_url
        words = ["--model", "m", "--base_url", url.replace("HOST", endpoint.base_url.removeprefix("http://")),
                 "--api_key_env", "SITUATION_KEY", "--backoff", 0.01, "--max_retries", 1, "--timeout", 1]  # fmt: skip
        answer = place.run("mining query_generation", "--input_file", rows, "--output_file", place.folder / "out.jsonl",
                           *words, "--prompt", "Ask about: <p>{passage}</p>")  # fmt: skip
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    secrets = [path.name for path in files if KEY[:12].encode() in path.read_bytes() or b"hunter" in path.read_bytes()]
    answer.printed += f"files with the key or the password: {', '.join(secrets) or 'none'}\n"


def elsewhere(place: Place) -> None:
    with ChatServer() as other:
        asked(place, lambda passage, nth: f"to:{other.base_url}/chat/completions")


SCORES = r"^\| ko"
SITUATIONS = {
    "Texts and files": [
        Situation("half a surrogate pair in the corpus", "TypeError hours in", evaluated(
            (f"{CORPUS}/docs-0.jsonl", '{"docid": "a", "text": "\\ud800"}\n'), upto=0)),
        Situation("zero-width text alone", "passes as text", checked(
            "a.jsonl", json.dumps({**ROW, "query": "\u200b"}))),
        Situation("a BOM in topics", "costs the first query", marked, "queries in the run"),
        Situation("old_docs-1.jsonl in the corpus", "joins it", evaluated(
            (f"{CORPUS}/old_docs-1.jsonl", '{"docid": "a", "text": "x"}\n'), upto=0), "not read"),
        Situation("._docs-0.jsonl in the corpus", "breaks it", evaluated((f"{CORPUS}/._docs-0.jsonl", b"\0"), upto=0),
                  "vectors of"),
        Situation("rows.jsonl.gz, A.JSONL and a subfolder among the rows", "skipped without a word", folder(
            a__jsonl__gz=gzip.compress(LINE.encode()), A2__JSONL=LINE, sub_of_b__jsonl=LINE), "not read"),
        Situation("a link to rows that are not there", "", lambda place: (
            place.write("rows/a.jsonl", LINE), os.symlink("/nowhere/b.jsonl", place.folder / "rows/b.jsonl"),
            place.run("mining check_data", place.folder / "rows"))),
        Situation("merge --output_file x.jsonl.gz", "plain text", merged("x.jsonl.gz"), "first bytes"),
        Situation("merge --output_file x.tar.gz", "", merged("x.tar.gz")),
        Situation("a .gz whose stream is damaged", "zlib.error", checked(
            "a.jsonl.gz", (packed := gzip.compress(LINE.encode() * 9))[:20] + b"\xff" * 8 + packed[28:])),
        Situation("JSON nested 100,000 deep", "RecursionError", checked("a.jsonl", '{"query": ' + "[" * 100_000)),
        Situation("an open quote in triples", "swallows rows", converted(
            "t.csv", 'query,positive,negative\na,"p,n\nb,p,n\n')),
        Situation("columns id,query,positive,negative", "the positive becomes a negative", converted(
            "t.csv", "id,query,positive,negative\n1,a,p,n\n"), '"query"'),
        Situation("columns of unknown names", "taken by place", converted("t.csv", "foo,bar,baz\na,p,n\n")),
        Situation("a CSV field of 200,000 characters", "called not UTF-8", converted(
            "t.csv", f"query,positive,negative\na,{'x' * 200_000},n\n"), "rows"),
    ],
    "Judgments and indexes": [
        Situation("qrels of another corpus", "0.0 without a word", evaluated((QRELS, "0 0 zz 1\n"))),
        Situation("a grade of 30 digits", "nDCG 0 beside MRR 100", evaluated((QRELS, f"0 0 d0#0 {'9' * 30}\n"))),
        Situation("a grade of ²", "ValueError, or taken for 2", evaluated((QRELS, "0 0 d0#0 ²\n"))),
        Situation("an index whose docids are reversed", "scores 44 for 100", indexed(turned)),
        Situation("an index and docids of two indexes", "traceback or wrong scores", indexed(
            lambda place: (place.index / "docid").write_text("".join(f"x{i}\n" for i in range(20))))),
        Situation("a foreign index with a NaN", "no word", indexed(foreign_vectors)),
        Situation("half a surrogate pair in a docid", "UnicodeEncodeError", evaluated(
            (f"{CORPUS}/docs-0.jsonl", '{"docid": "\\udc00", "text": "x"}\n'), upto=0)),
        Situation("a language of one's own without data", "traceback", lambda place: place.run(
            "step0", "--encoder", place.model, "--languages", "xx", "--data_dir", place.collection(),
            "--index_save_dir", place.folder / "index")),
    ],
    "Nothing that others wrote is deleted": [
        Situation("step 0 --overwrite over index.html and shards/photo.txt", "both are gone", foreign_folder),
        Situation("mining beside a work folder with a photo", "gone", mined, "negatives"),
        Situation("refresh over an index folder with a photo", "gone", refreshed, "mining negatives"),
    ],
    "An LLM's endpoint": [
        Situation("a malformed answer that echoes the key", "most of it in .rejected.jsonl", partial(
            asked, script=lambda passage, nth: f"body:{'y' * 60}{KEY}"), "files with"),
        Situation("user:password@ in --base_url", "in every report", partial(asked, base_url="http://me:hunter2@HOST"),
                  "files with"),
        Situation("a redirect to another host", "gets all prompts", elsewhere),
        Situation("an answer without end", "8 GB of memory", partial(asked, script=lambda passage, nth: "endless"),
                  "no_answer|files with"),
        Situation("a refusal as answer", "stored as query", partial(
            asked, answer=lambda passage, nth: "I'm sorry, but I cannot help with that."), r"\| refus"),
    ],
}  # fmt: skip
