"""The report of a run: what it shows, that texts cannot act in it, and a machine without matplotlib."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import dev_lines, losses, write_dev
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.writing import write_collection

MOE: dict[str, Any] = {
    "moe": "intermediate", "num_experts": 2, "num_experts_per_tok": 1, "max_steps": 4, "learning_rate": 5e-3,
    "eval_steps": 2, "report": None,
}  # fmt: skip
HOSTILE = "<script>alert(1)</script> | ![x](http://evil/x.png) `code` When do people visit?"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "a.jsonl", rows(24))
    return folder


def test_it_shows_the_run_and_texts_cannot_act(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    plain = Source("ko", data_dir=write_dev(tmp_path / "plain", "ko", 72))
    passages = [(p.docid, p.title, f"{HOSTILE} {p.text}") for p in read_file(plain.corpus()[0])]
    topics = {qid: f"{HOSTILE} {query}" for qid, query in plain.topics().items()}
    write_collection(tmp_path / "dev", "ko", passages, topics, plain.qrels())
    words = train_words(tiny_model_dir, data, tmp_path / "out", **MOE, eval_data_dir=tmp_path / "dev")
    run_training([*words, "--eval_languages", "ko"])
    page = (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG") and "](report.png)" in page
    base, *_, last = dev_lines(tmp_path / "out")
    shown = [f"{100 * line['eval_ndcg@10']:.1f}" for line in (base, last)]
    assert all(value in page for value in shown) and "0 (base)" in page
    assert f"{losses(tmp_path / 'out')[-1]['loss']:.4g}" in page
    assert "Queries that gained most" in page and "Queries that lost most" in page
    assert "expert 0" in page
    assert "alert(1)" in page and "<script" not in page and "![x](" not in page
    check_page(tmp_path / "out/dev.html", dev_lines(tmp_path / "out"), passages, topics)


class Elements(HTMLParser):
    """Names of all elements with their attributes, and the texts of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def check_page(
    path: Path, lines: list[dict[str, Any]], passages: list[tuple[str, str, str]], topics: dict[str, str]
) -> None:
    """Every judged query with both rankings, texts as they are and unable to act, nothing from elsewhere."""
    elements = Elements(path.read_text())
    assert not [attrs for _, attrs in elements.found if "src" in attrs or "href" in attrs]
    assert [tag for tag, _ in elements.found].count("script") == 2 == len(elements.scripts)
    data = json.loads(elements.scripts[0])
    base, last = lines[0], lines[-1]
    assert data["step"] == last["step"]
    for side, line in enumerate((base, last)):
        mean = sum(query["values"][side] for query in data["queries"]) / len(data["queries"])
        assert mean == pytest.approx(line["eval_ndcg@10"])
    texts = {docid: text for docid, _, text in passages}
    assert {query["query"] for query in data["queries"]} <= set(topics.values())
    for query in data["queries"]:
        for side in query["hits"]:
            assert len(side) == 10
            assert all(data["passages"]["ko"][docid] == texts[docid] for docid, _ in side)
        ideal = any(grade for side in query["hits"] for _, grade in side)
        assert ideal == any(query["values"])
    assert any(query["hits"][0] != query["hits"][1] for query in data["queries"])


NODE = """
const fs = require("fs");
const page = fs.readFileSync(process.argv[1], "utf8");
const data = page.match(/<script id="data"[^>]*>([^]*?)<\\/script>/)[1];
const code = page.match(/<script>([^]*?)<\\/script>/)[1];
const all = {};
const element = name => ({
  name, children: [], listeners: {}, value: "", textContent: "",
  append(...more) { this.children.push(...more); },
  replaceChildren(...more) { this.children = more; },
  addEventListener(kind, call) { this.listeners[kind] = call; },
  querySelector() { return this.children.find(child => child.className === "sides"); },
  set innerHTML(_) { throw new Error("innerHTML"); },
});
global.document = {
  createElement: element,
  getElementById: id => all[id] ||= Object.assign(element(id), id === "data" ? { textContent: data } : {}),
};
all.order = Object.assign(element("order"), { value: "most" });
eval(code);
const texts = node => node.textContent + node.children.map(texts).join(" ");
const listed = () => all.queries.children;
const every = listed().length;
all.search.value = process.argv[2];
all.search.listeners.input();
const found = listed().length;
listed()[0].listeners.click();
console.log(JSON.stringify({ every, found, opened: texts(listed()[0]) }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript here")
def test_the_page_searches_and_opens_queries(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """The page's own script, in node with the few calls of a document that it makes."""
    dev = write_dev(tmp_path / "dev", "ko", 72)
    words = train_words(
        tiny_model_dir, data, tmp_path / "out", max_steps=2, eval_data_dir=dev, eval_steps=2, report=True
    )
    run_training([*words, "--eval_languages", "ko"])
    topics = Source("ko", data_dir=dev).topics()
    query = topics["q5"]
    command = ["node", "-e", NODE, str(tmp_path / "out/dev.html"), query.upper()]
    seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert seen["every"] == 18 and 1 <= seen["found"] < 18
    assert query in seen["opened"] and "base: " in seen["opened"] and "step 2: " in seen["opened"]


def test_a_plain_run_has_one_too_and_it_can_be_left_out(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = train_words(tiny_model_dir, data, tmp_path / "out", max_steps=2, report=None)
    run_training(words)
    page = (tmp_path / "out/report.md").read_text()
    assert "Losses" in page and "Dev queries" not in page and (tmp_path / "out/report.png").is_file()
    run_training(train_words(tiny_model_dir, data, tmp_path / "none", max_steps=2, report=False))
    assert not list((tmp_path / "none").glob("report*"))


def test_without_matplotlib_there_is_no_picture(
    tiny_model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "out", max_steps=2, report=None))
    assert "the report has no picture: charts need matplotlib" in answer.stderr
    page = (tmp_path / "out/report.md").read_text()
    assert "report.png" not in page and not (tmp_path / "out/report.png").exists()
