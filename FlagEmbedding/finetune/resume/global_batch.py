"""``--global_batch_size``: queries per optimizer step of the whole run, however many processes there are.

It is divided so that the loss stays the same when the number of processes changes. Without shared negatives a query's
in-batch negatives are those of its own batch, so the batch size stays and the accumulation is divided; with
``--negatives_cross_device`` they are those of all processes' batches, so the accumulation stays and the batch is
divided.
"""

from __future__ import annotations

from FlagEmbedding.utils.errors import UsageError

_DEFAULT_BATCH, _DEFAULT_ACCUMULATION = 8, 1


def divide(total: int, processes: int, batch: int, accumulation: int, shared: bool) -> tuple[int, int]:
    """Queries per process and forward, and forwards per step.

    Args:
        total: queries per step.
        processes: over which they are divided.
        batch, accumulation: what the command line says; the one that is divided may be left at its default.
        shared: the queries of all processes share their negatives.

    Raises ``UsageError``: it cannot be divided, or the command line says otherwise.
    """
    given = f"--global_batch_size {total}"
    if total < 1:
        raise UsageError(f"--global_batch_size must be at least 1, got {total}")
    if shared:
        name, said, default = "per_device_train_batch_size", batch, _DEFAULT_BATCH
        unit, kept = processes * accumulation, f"--gradient_accumulation_steps {accumulation}"
    else:
        name, said, default = "gradient_accumulation_steps", accumulation, _DEFAULT_ACCUMULATION
        unit, kept = processes * batch, f"--per_device_train_batch_size {batch}"
    over = f"{processes} process(es) × {kept}"
    if total % unit:
        raise UsageError(f"{given} cannot be divided over {over}: it must be a multiple of {unit}")
    left = total // unit
    if said not in (default, left):
        raise UsageError(f"{given} over {over} makes --{name} {left}, got {said}: leave it out")
    return (left, accumulation) if shared else (batch, left)
