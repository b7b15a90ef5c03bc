"""Situations of training: resume, folders, signals, numbers, flags of Hugging Face."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from functools import partial
from typing import Any

from finetune.helpers import rows, write_rows
from situations.world import Place, Situation

GO_ON = r"goes on from|nothing is left|harmless differences"


def resumed(first: dict[str, Any] | None = None, **second: Any) -> Callable[[Place], object]:
    """Two steps of a run, and the same command with ``second`` and --resume_from_checkpoint True."""

    def act(place: Place) -> None:
        place.train(**(first or {}))
        place.train(**{**(first or {}), "resume_from_checkpoint": True, **second})

    return act


def trained(**options: Any) -> Callable[[Place], object]:
    return lambda place: place.train(**options)


def other_rows(change: Callable[[list[Any]], list[Any]], place: Place) -> None:
    place.train()
    write_rows(place.folder / "rows.jsonl", change(rows(24)))
    place.train(resume_from_checkpoint=True)


def second_run(place: Place, **options: Any) -> None:
    place.train()
    place.write("out/checkpoint-1/notes.txt", "mine")
    place.train(**options)


def damaged(name: str, place: Place) -> None:
    place.train()
    path = place.folder / "out/checkpoint-2" / name
    path.write_bytes(path.read_bytes()[:40])
    place.train(resume_from_checkpoint=True)


def signaled(place: Place) -> None:
    """SIGTERM to this process once the first checkpoint is there."""
    import threading
    import time

    def tell() -> None:
        while not list((place.folder / "out").glob("checkpoint-*/run.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    place.rows()
    thread = threading.Thread(target=tell)
    thread.start()
    place.train(max_steps=200, save_steps=2, save_total_limit=9)
    thread.join()


def into_the_data(place: Place) -> None:
    data = place.rows("data/rows.jsonl").parent
    place.train("data/out", data=data)


def modes(place: Place) -> None:
    place.train()
    outcome = place.outcomes[-1]
    files = {stat.S_IMODE(path.stat().st_mode) for path in (place.folder / "out").rglob("*") if path.is_file()}
    outcome.printed += f"\nmodes of all files: {', '.join(map(oct, sorted(files)))}\n"


SITUATIONS = {
    "Continue means the same run": [
        Situation("resumed with another --learning_rate", "ignored, yet recorded as used", resumed(learning_rate=2e-3)),
        Situation("resumed with other pooling", "loss 1.39 → 4.98", resumed(sentence_pooling_method="mean")),
        Situation("resumed with half of the rows", "3 steps instead of 15, at another rate",
                  partial(other_rows, lambda all_rows: all_rows[:12])),
        Situation("resumed with the rows in another order", "accepted", partial(other_rows, lambda r: r[::-1])),
        Situation("resumed with another seed", "accepted", resumed(seed=7)),
        Situation("resumed with batch 4 for 2", "accepted", resumed(per_device_train_batch_size=4)),
        Situation("resumed with another group size", "accepted", resumed(train_group_size=2)),
        Situation("resumed with another schedule", "accepted", resumed(lr_scheduler_type="cosine")),
        Situation("resumed with --only_train", "traceback", resumed(only_train="output")),
        Situation("resumed with another --optim", "traceback", resumed(optim="sgd")),
        Situation("resumed with --save_steps 2: changes no number", "accepted", resumed(save_steps=2),
                  "harmless differences"),
        Situation("resumed with another rate and --resume_anyway", "", resumed(
            {"lr_scheduler_type": "constant"}, max_steps=3, learning_rate=2e-3, resume_anyway=True),
                  "another run from here on"),
        Situation("resumed at the last step", "", resumed({"lr_scheduler_type": "constant"}), GO_ON),
        *[Situation(f"newest checkpoint with {name} cut off", "", partial(damaged, name), "damaged")
          for name in ("optimizer.pt", "model.safetensors", "run.json", "loss_window.json")],
        Situation("--resume_from_checkpoint names no checkpoint", "", trained(resume_from_checkpoint="/nowhere")),
        Situation("second run into a folder with checkpoints", "resumes or deletes the other's", second_run),
        Situation("the same with --overwrite_output_dir True, a file of ours in a checkpoint", "deletes nothing",
                  partial(second_run, overwrite_output_dir=True), "they stay"),
        Situation("folder holds somebody's model.safetensors", "", lambda p: (p.write("out/model.safetensors", "mine"),
                                                                             p.train())),
        Situation("SIGTERM", "no checkpoint, exit 0 or a step counted twice", signaled, "SIGTERM|stopped|signal"),
        Situation("--output_dir is the base model's folder", "overwritten", lambda p: p.run(
            "run.py", "--model_name_or_path", p.model, "--train_data", p.rows(), "--output_dir", p.model)),
        Situation("--output_dir lies in the data", "read as rows", into_the_data),
        Situation("--num_train_epochs 0", "an untrained model", trained(max_steps=-1, num_train_epochs=0)),
        Situation("--warmup_ratio 1.5", "traceback", trained(warmup_ratio=1.5)),
        Situation("--query_max_len 2", "every query the same", trained(query_max_len=2)),
        Situation("--output_dir 'out[1]'", "checkpoints not found", trained(output="out[1]"), "run .*: starts"),
        Situation("--neftune_noise_alpha", "no effect", trained(neftune_noise_alpha=5)),
        Situation("--label_smoothing_factor", "no effect", trained(label_smoothing_factor=0.1)),
        Situation("--save_strategy best without dev queries", "traceback", trained(save_strategy="best")),
        Situation("--accelerator_config", "no effect", trained(accelerator_config='{"split_batches": true}')),
        Situation("--do_eval", "no effect", trained(do_eval=True)),
        Situation("--metric_for_best_model without dev queries", "traceback", trained(metric_for_best_model="loss")),
        Situation("--push_to_hub, nobody logged in", "half a checkpoint uploaded, a crash", trained(push_to_hub=True)),
        Situation("--optim of a package that is not installed", "traceback after the model was loaded",
                  trained(optim="galore_adamw")),
        Situation("modes of what is saved", "model.safetensors 0600, others 0644", modes, "modes of all"),
    ],
}  # fmt: skip
