"""What a comparison says, from run files to the table: Holm correction, macro averages, queries without hits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_script

LANGUAGES = {"ko": 12, "fa": 3}  # queries; of different number, so that the mean over queries is another number


def write_run(path: Path, ranks: dict[str, int | None]) -> None:
    """A run of ten hits per query with its one relevant passage at the given rank; None: the query has no line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{qid} Q0 {'right' if place == rank else f'wrong{place}'} {place} {1 - place / 100:.6f} Faiss\n"
        for qid, rank in ranks.items()
        if rank is not None
        for place in range(1, 11)
    ]
    path.write_text("".join(lines))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Runs of base and tuned: tuned gains in Korean, and in Persian has nothing for the last query."""
    for lang, count in LANGUAGES.items():
        qids = [f"q{i}" for i in range(count)]
        qrels = tmp_path / f"qrels/qrels.miracl-v1.0-{lang}-dev.tsv"
        qrels.parent.mkdir(exist_ok=True)
        qrels.write_text("".join(f"{qid}\tQ0\tright\t1\n" for qid in qids))
        write_run(tmp_path / f"runs/base/{lang}.txt", dict.fromkeys(qids, 2))
        tuned: dict[str, int | None] = {qid: 1 + (i % 3 == 2) for i, qid in enumerate(qids)}
        if lang == "fa":
            tuned["q2"] = None
        write_run(tmp_path / f"runs/tuned/{lang}.txt", tuned)
    return tmp_path


def step2(work: Path, *words: str) -> None:
    answer = run_script(
        "evaluation/step2-eval_dense_mldr.py",
        ["--languages", *LANGUAGES, "--search_result_save_dir", work / "runs", "--qrels_dir", work / "qrels",
         "--eval_result_save_dir", work / "out", "--metrics", "ndcg@10", "recall@1", *words],
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


SECOND = 1 / np.log2(3)
KO, FA = (8 + 4 * SECOND) / 12, 2 / 3  # nDCG@10 of tuned; its Persian query without hits counts as 0


def test_the_average_is_over_languages_not_over_queries(work: Path) -> None:
    step2(work, "--encoder", "tuned")
    results = json.loads((work / "out/tuned.json").read_text())["results"]
    assert results["ko"]["ndcg@10"] == pytest.approx(KO)
    assert results["fa"]["ndcg@10"] == pytest.approx(FA)
    assert results["average"]["ndcg@10"] == pytest.approx((KO + FA) / 2)
    assert abs((KO + FA) / 2 - (12 * KO + 3 * FA) / 15) > 0.05
    table = (work / "out/tuned.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| average")]
    assert cells == [["average", "15", f"{50 * (KO + FA):.1f}", f"{50 * (8 / 12 + 2 / 3):.1f}"]]


def test_the_average_that_is_compared_is_the_same(work: Path) -> None:
    step2(work, "--encoder", "base", "tuned", "--compare", "--compare_save_dir", str(work / "compared"))
    found = json.loads((work / "compared/comparison.json").read_text())
    average = next(c for c in found["comparisons"] if (c["language"], c["measure"]) == ("average", "ndcg@10"))
    assert average["system_mean"] == pytest.approx((KO + FA) / 2) == found["results"]["tuned"]["average"]["ndcg@10"]
    assert average["difference"] == pytest.approx((KO + FA) / 2 - SECOND)
    assert average["low"] < average["difference"] < average["high"]
    assert average["queries"] == 15


def test_a_judged_query_without_hits_is_counted_everywhere(work: Path) -> None:
    step2(work, "--encoder", "base", "tuned", "--compare", "--compare_save_dir", str(work / "compared"))
    found = json.loads((work / "compared/comparison.json").read_text())
    persian = next(c for c in found["comparisons"] if (c["language"], c["measure"]) == ("fa", "ndcg@10"))
    assert (persian["queries"], persian["better"], persian["worse"]) == (3, 2, 1)
    lines = (work / "compared/per_query.tsv").read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert len(rows) == 15
    lost = next(row for row in rows if (row["language"], row["qid"]) == ("fa", "q2"))
    assert (float(lost["ndcg@10:tuned"]), lost["first_relevant:tuned"]) == (0.0, "")
    assert (float(lost["ndcg@10:base"]), lost["first_relevant:base"]) == (pytest.approx(SECOND, abs=1e-6), "2")
    assert json.loads((work / "out/tuned.json").read_text())["queries"] == LANGUAGES


def by_holm(values: list[float]) -> list[float]:
    """Holm's step-down correction from its definition: every p against every smaller one."""
    n = len(values)
    place = {i: sum((other, j) < (p, i) for j, other in enumerate(values)) for i, p in enumerate(values)}
    return [min(1.0, max((n - place[j]) * values[j] for j in range(n) if place[j] <= place[i])) for i in range(n)]


def test_every_test_of_the_table_is_corrected_for_all_of_them(work: Path) -> None:
    step2(work, "--encoder", "base", "tuned", "--compare", "--compare_save_dir", str(work / "compared"))
    found = json.loads((work / "compared/comparison.json").read_text())["comparisons"]
    assert len(found) == 6  # two languages and their average, two measures
    plain, corrected = [c["p_value"] for c in found], [c["p_holm"] for c in found]
    assert corrected == pytest.approx(by_holm(plain))
    assert min(corrected) > 3 * min(plain) > 0  # it does correct
    lines = [line for line in (work / "compared/comparison.md").read_text().splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    for line, comparison in zip(lines[2:8], found, strict=True):
        row = dict(zip(header, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert (row["language"], row["queries"]) == (comparison["language"], str(comparison["queries"]))
        for column, value in (("p", comparison["p_value"]), ("p (Holm)", comparison["p_holm"])):
            assert row[column] == (f"{value:.3f}" if value >= 0.001 else "<0.001")
        ends = [float(end.replace("−", "-")) for end in row["95 % interval"].split(" to ")]
        assert ends == [pytest.approx(100 * comparison[end], abs=0.051) for end in ("low", "high")]
        assert float(row["difference"].replace("−", "-")) == pytest.approx(100 * comparison["difference"], abs=0.051)
        counts = [comparison[kind] for kind in ("better", "worse", "equal")]
        assert row["better / worse / equal"] == " / ".join(map(str, counts))
        assert float(row["tuned"]) == pytest.approx(100 * comparison["system_mean"], abs=0.051)
        assert float(row["base"]) == pytest.approx(100 * comparison["baseline_mean"], abs=0.051)


def test_seed_and_resamples_reach_the_tests(work: Path) -> None:
    outcomes = []
    for name, words in (("a", []), ("b", ["--seed", "1"]), ("c", ["--resamples", "150"])):
        step2(work, "--encoder", "base", "tuned", "--compare", "--compare_save_dir", str(work / name), *words)
        found = json.loads((work / name / "comparison.json").read_text())["comparisons"]
        outcomes.append([(c["low"], c["high"]) for c in found])
    assert outcomes[0] != outcomes[1] != outcomes[2] != outcomes[0]
