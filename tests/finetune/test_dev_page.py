"""The page of dev queries in a real browser: search, open a query, see both lists and what is judged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune.dev_data import write_dev
from finetune.helpers import rows, run_training, train_words, write_rows

from FlagEmbedding.collections.corpus import read_file
from FlagEmbedding.collections.source import Source
from FlagEmbedding.collections.writing import write_collection
from FlagEmbedding.utils.io import read_json

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


@pytest.fixture(scope="module")
def output(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two collections; every text tries to act."""
    root = tmp_path_factory.mktemp("page")
    plain = Source("ko", data_dir=write_dev(root / "plain", "ko", 60))
    passages = [(p.docid, p.title, f"{p.text} {HOSTILE}") for p in read_file(plain.corpus()[0])]
    topics = {qid: f"{query} {HOSTILE}" for qid, query in plain.topics().items()}
    write_collection(root / "dev", "ko", passages, topics, plain.qrels())
    write_dev(root / "dev", "fa", 40, seed=3)
    data = write_rows(root / "rows/a.jsonl", rows(12)).parent
    words = train_words(
        tiny_model_dir, data, root / "out", max_steps=2, eval_steps=2, eval_data_dir=root / "dev", report=True,
        learning_rate=1e-2,
    )  # fmt: skip
    run_training([*words, "--eval_languages", "ko", "fa"])
    return root / "out"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    switches = (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    )  # fmt: skip
    for switch in switches:
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_search_open_and_read(browser: Any, output: Path) -> None:
    browser.get((output / "dev.html").as_uri())
    title = browser.title
    lines = browser.find_elements("css selector", ".query")
    assert len(lines) == 36 and "36 queries" in browser.find_element("id", "count").text
    qrels = Source("ko", data_dir=output.parent / "dev").qrels()
    before, after = (read_json(output / f"dev/step-{step}.json")["ko"]["hits"] for step in (0, 2))
    qid = next(q for q in qrels if before[q] != after[q] and any(qrels[q].get(d, 0) > 0 for d in after[q]))
    query = Source("ko", data_dir=output.parent / "dev").topics()[qid]
    browser.find_element("id", "search").send_keys(query.upper()[: query.index("<")])
    found = [line for line in browser.find_elements("css selector", ".query") if f"ko {qid}" in line.text]
    assert len(found) == 1 and len(browser.find_elements("css selector", ".query")) < 36
    found[0].click()
    sides = browser.find_elements("css selector", ".sides > div")
    assert [side.find_element("css selector", "strong").text.split(":")[0] for side in sides] == ["base", "step 2"]
    for side, hits in zip(sides, (before[qid], after[qid]), strict=True):
        shown = side.find_elements("css selector", "li")
        assert [line.text.split()[0] for line in shown] == hits
        for line, docid in zip(shown, hits, strict=True):
            grade = qrels[qid].get(docid)
            assert ("relevant" in line.get_attribute("class").split()) == ((grade or 0) > 0)
            assert ("(relevant)" in line.text) == ((grade or 0) > 0)
            assert ("(judged not relevant)" in line.text) == (grade == 0)
            assert HOSTILE in line.text  # as text
    moves = [line.text for line in sides[1].find_elements("css selector", "li")]
    for place, (docid, text) in enumerate(zip(after[qid], moves, strict=True)):
        old = before[qid].index(docid) if docid in before[qid] else None
        said = "new" if old is None else f"up from {old + 1}" if old > place else f"down from {old + 1}"
        assert (f"· {said}" in text) == (old != place)
    found[0].find_element("css selector", ".docid").click()
    assert not browser.find_elements("css selector", ".sides")
    assert browser.title == title
    assert (
        not browser.find_elements("css selector", "img") and len(browser.find_elements("css selector", "script")) == 2
    )
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_search_in_passages_order_language_and_keyboard(browser: Any, output: Path) -> None:
    browser.get((output / "dev.html").as_uri())
    search, queries = browser.find_element("id", "search"), ("css selector", ".query")
    search.send_keys("Number 7.")  # in one passage of each language alone
    found = set()
    for lang in ("ko", "fa"):
        topics = Source(lang, data_dir=output.parent / "dev").topics()
        for step in (0, 2):
            hits = read_json(output / f"dev/step-{step}.json")[lang]["hits"]
            found |= {(lang, qid) for qid in hits if "7#0" in hits[qid] or "Number 7." in topics[qid]}
    assert len(browser.find_elements(*queries)) == len(found) > 0
    search.clear()
    search.send_keys(" ")
    browser.find_element("css selector", "#language option[value=fa]").click()
    listed = browser.find_elements(*queries)
    assert len(listed) == 18 and all(" fa q" in line.text for line in listed)
    browser.find_element("css selector", "#order option[value=worst]").click()
    values = [float(line.text.split(" → ")[1].split()[0]) for line in browser.find_elements(*queries)]
    assert values == sorted(values) and values[0] < values[-1]
    listed = browser.find_elements(*queries)
    listed[0].send_keys("\ue007")  # Enter
    assert len(browser.find_elements("css selector", ".sides")) == 1
