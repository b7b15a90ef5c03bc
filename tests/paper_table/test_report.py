"""The reproduced table's numbers: means, spread, tests and wording, out of runs whose scores are known by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from FlagEmbedding.evaluation.metrics import parse_measures
from paper_table.plan import Cell, Options, Row, Table, cells
from paper_table.report import collect, compare_rows, write_table
from tests.evaluation.conftest import cells as cells_of

MEASURES = parse_measures(["ndcg@5", "recall@5"])
ROWS = [
    Row("baseline", None, None),
    Row("ANCE dataset", Path("ance.yaml"), "x"),
    Row("ANCE-CLP", Path("clp.yaml"), "x"),
]
# Rank of the relevant passage: row, seed -> for 8 queries of ko; fa has the last four of them.
RANKS = {
    ("baseline", None): [6, 6, 3, 3, 2, 2, 1, 1],
    ("ANCE dataset", 1): [2, 2, 1, 1, 1, 1, 1, 1],
    ("ANCE dataset", 2): [1, 2, 1, 2, 1, 2, 1, 1],
    ("ANCE-CLP", 1): [1, 1, 1, 1, 1, 1, 1, 2],
    ("ANCE-CLP", 2): [6, 6, 1, 1, 1, 1, 1, 1],
}
LANGUAGES = {"ko": slice(0, 8), "fa": slice(4, 8)}


def value(rank: int) -> float:
    return 1 / np.log2(1 + rank) if rank <= 5 else 0.0


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Options, list[Cell], dict[str, Path], dict[str, dict[str, dict[str, float]]]]:
    """A finished table's folder: runs of every cell, judgments, records."""
    options = Options(
        root=tmp_path, output_dir=tmp_path, base_model="BAAI/bge-m3", train_dirs=[], data_dir=None, split="dev",
        metrics=[m.key for m in MEASURES], train_options=[], index_options=[], search_options=[], launcher=[],
    )  # fmt: skip
    todo = list(cells(ROWS, list(LANGUAGES), [1, 2]))
    records, qrels = {}, {}
    for lang, part in LANGUAGES.items():
        qrels[lang] = tmp_path / f"{lang}.tsv"
        qrels[lang].write_text("".join(f"q{i} 0 right 1\n" for i in range(8)[part]))
    for cell in todo:
        lines = [
            f"q{query} Q0 {'right' if place == rank else place} {place} {1 / place} x\n"
            for query, rank in list(enumerate(RANKS[cell.row.name, cell.seed]))[LANGUAGES[cell.lang]]
            for place in range(1, 8)
        ]
        path = options.product(cell, "search")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
        seconds = 60.0 if cell.seed == 1 else 80.0
        stage = {"seconds": seconds, "peak_rss_mb": 1024 + seconds}
        records[cell.id] = dict.fromkeys(("train", "index", "search")[cell.row.recipe is None :], stage)
    return options, todo, qrels, records


def test_means_and_seeds_by_hand(finished: tuple) -> None:
    options, todo, qrels, _ = finished
    rows = {row.name: row for row in collect(options, todo, qrels, MEASURES)}
    for (name, seed), ranks in RANKS.items():
        place = [None, 1, 2].index(seed) - (seed is not None)
        by_lang = {lang: statistics.fmean(value(r) for r in ranks[part]) for lang, part in LANGUAGES.items()}
        for lang, expected in by_lang.items():
            assert rows[name].values[lang]["ndcg@5"][place] == pytest.approx(expected)
        assert rows[name].values["average"]["ndcg@5"][place] == pytest.approx(statistics.fmean(by_lang.values()))
    averaged = rows["ANCE-CLP"].system.languages["ko"].values["ndcg@5"]
    assert averaged["q0"] == pytest.approx(0.5)  # 1 with one seed, 0 with the other
    tests = compare_rows(list(rows.values()), MEASURES[0], 500)
    pairs = [(t.baseline, t.system) for t in tests[::3]]
    assert pairs == [("baseline", "ANCE dataset"), ("baseline", "ANCE-CLP"), ("ANCE dataset", "ANCE-CLP")]
    assert [t.language for t in tests[:3]] == ["ko", "fa", "average"]
    assert tests != compare_rows(list(rows.values()), MEASURES[0], 150)
    assert {t.measure for t in tests} == {"ndcg@5"}


def test_with_one_seed_nothing_is_said_of_seeds(finished: tuple) -> None:
    options, todo, qrels, records = finished
    first = [cell for cell in todo if cell.seed in (None, 1)]
    text = write_table(options, Table(ROWS, {}, "", ""), first, records, qrels, 200, {})
    assert "with one seed per row, nothing tells this from what another seed would change." in text
    assert "±" not in text
    assert "Scores × 100, one seed." in text
    few = [cell for cell in first if cell.row.name == "baseline"]
    text = write_table(options, Table(ROWS, {}, "", ""), few, records, qrels, 200, {})
    assert "One row: nothing to compare." in text
    assert "Fewer than two trained rows" in text


def test_the_written_table(finished: tuple) -> None:
    options, todo, qrels, records = finished
    published = {"baseline": {"ko": {"ndcg@5": 64.36}}, "ANCE-CLP": {"ko": {"ndcg@5": 67.05}}}
    table = Table(ROWS, published, "the paper", "bge-m3")
    printed = write_table(options, table, todo, records, qrels, 500, {"arguments": {"x": 1}})
    text = (options.output_dir / "table.md").read_text(encoding="utf-8")
    seeds = [100 * statistics.fmean(map(value, RANKS["ANCE dataset", seed])) for seed in (1, 2)]
    cell = f"{statistics.fmean(seeds):.1f} ± {statistics.stdev(seeds):.1f}"
    (line,) = [line for line in text.splitlines() if line.startswith("| ANCE dataset") and "±" in line]
    assert cell in line
    header = next(line for line in text.splitlines() if line.startswith("| row"))
    assert [word.strip() for word in header.split("|")[2:5]] == ["ko nDCG@5", "paper", "ko Recall@5"]
    assert "67.0" in text and "paper: the paper." in text
    assert ["ANCE dataset", "4", "70 s", "1.1 GiB"] in [
        row[:4] for row in cells_of(text)
    ]  # mean of 60 and 80 s, most of both
    assert "Order among the trained rows is therefore not told by these seeds" in text
    assert text.split("## Scores")[1].split("![")[0].strip() in printed
    found = json.loads((options.output_dir / "table.json").read_text())
    assert found["arguments"] == {"x": 1}
    assert found["rows"][0]["results"]["ko"]["ndcg@5"]["published"] == pytest.approx(0.6436)
    assert found["rows"][1]["results"]["ko"]["ndcg@5"]["seeds"].keys() == {"1", "2"}
    assert found["rows"][0]["results"]["ko"]["ndcg@5"]["standard_deviation"] is None
    picture = matplotlib.image.imread(options.output_dir / "table.png")
    assert min(picture.shape[:2]) > 500
    assert (picture[..., :3].min(axis=-1) < 0.9).mean() > 0.01


def test_scores_of_another_model_are_marked(finished: tuple) -> None:
    options, todo, qrels, records = finished
    table = Table(ROWS, {"baseline": {"ko": {"ndcg@5": 64.36}}}, "the paper", "another-model")
    assert "not this model and data" in write_table(options, table, todo, records, qrels, 200, {})
    bare = Table(ROWS, {}, "", "")
    assert "The paper gives no score for these." in write_table(options, bare, todo, records, qrels, 200, {})
