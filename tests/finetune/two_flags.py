"""Run by torchrun in test_hugging_face.py: does a flag change what process 1 builds or does?

The two processes stand for two machines: each is the first of its own.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from typing import Any

import torch.distributed as dist

from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.runner import build_trainer
from FlagEmbedding.utils.distributed import leave


def seen(words: list[str]) -> dict[str, Any]:
    """What process 1 is told by these words."""
    arguments = parse_arguments([*shlex.split(sys.argv[1]), "--output_dir", tempfile.mkdtemp(), *words])
    trainer = build_trainer(arguments)
    wrapped = trainer.accelerator.prepare(trainer.model)
    group = dist.group.WORLD
    assert group is not None
    state = trainer.args.distributed_state
    state.local_process_index = 1  # as if both were of one machine
    replica = trainer.args.get_process_log_level()
    state.local_process_index = 0
    return {
        "replica": replica,
        "unused": wrapped.find_unused_parameters, "bucket": wrapped.bucket_bytes_cap, "static": wrapped.static_graph,
        "buffers": wrapped.broadcast_buffers, "save": trainer.args.should_save, "log": trainer.args.should_log,
        "level": trainer.args.get_process_log_level(),
        "timeout": group._get_backend(trainer.args.device).options._timeout,
    }  # fmt: skip


def main() -> None:
    os.environ["LOCAL_RANK"] = "0"
    said = sys.argv[2:]
    timeout = next(words for words in said if "timeout" in words)  # a group is made once
    given = shlex.split(timeout)
    without = seen(given)
    for words in said:
        differs = without["timeout"].total_seconds() == 77 if words == timeout else seen([*given, *shlex.split(words)])
        if differs is not True:
            differs = differs != without
        if dist.get_rank() == 1:
            print(f"{words} differs" if differs else f"nothing differs: {words}", flush=True)
        dist.barrier()


if __name__ == "__main__":
    main()
    leave()
