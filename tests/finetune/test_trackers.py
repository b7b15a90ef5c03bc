"""``--report_to tensorboard``: losses, dev figures and router loads arrive; the log is as without a tracker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from finetune.dev_data import dev_lines, history, losses, write_dev
from finetune.helpers import rows, run_training, train_words, write_rows


def test_figures_and_loads_arrive(tiny_model_dir: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    dev, data = write_dev(tmp_path / "dev", "ko", 40), write_rows(tmp_path / "rows/a.jsonl", rows(12)).parent
    options = {"moe": "intermediate", "num_experts": 2, "max_steps": 2, "eval_steps": 2, "eval_data_dir": dev}
    for name, report_to in (("told", "tensorboard"), ("quiet", None)):
        words = train_words(tiny_model_dir, data, tmp_path / name, **options, report_to=report_to)
        run_training([*words, "--eval_languages", "ko"])
    (file,) = (tmp_path / "told/runs").rglob("events*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    seen = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for line in losses(tmp_path / "told"):
        assert seen["train/loss"][line["step"]] == pytest.approx(line["loss"])
        for layer, loads in enumerate(line["router_load"]):
            for expert, load in enumerate(loads):
                value = seen[f"train/router_load/layer_{layer}/expert_{expert}"][line["step"]]
                assert value == pytest.approx(load)
            assert seen[f"train/router_entropy/layer_{layer}"][line["step"]] == pytest.approx(
                line["router_entropy_per_layer"][layer]
            )
    base, last = dev_lines(tmp_path / "told")
    (tag,) = [tag for tag in seen if tag.startswith("eval/ndcg")]
    assert seen[tag] == {0: pytest.approx(base["eval_ndcg@10"]), 2: pytest.approx(last["eval_ndcg@10"])}
    quiet = [{k: v for k, v in line.items() if k != "eval_seconds"} for line in history(tmp_path / "quiet")[:-1]]
    told = [{k: v for k, v in line.items() if k != "eval_seconds"} for line in history(tmp_path / "told")[:-1]]
    assert told == quiet


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_missing_tracker_is_named_first(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{tracker}_available", lambda: False)
    words = train_words(tmp_path / "absent", tmp_path / "none", tmp_path / "out", report_to=tracker)
    answer = run_training(words, check=False)
    assert answer.returncode == 2 and f"pip install {tracker}" in answer.stderr and not (tmp_path / "out").exists()
