"""``--push_to_hub``: the folder that was saved at the end is uploaded, whole, once.

The Trainer's own way copies some files of each checkpoint beside others of the last one, and writes a card of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from FlagEmbedding.finetune.arguments import RetrieverTrainingArguments
from FlagEmbedding.finetune.report.summary import TrainingSummary
from FlagEmbedding.utils.distributed import is_main
from FlagEmbedding.utils.errors import UsageError, UserError
from FlagEmbedding.utils.hub import HubError, make_repository, upload, who_am_i
from FlagEmbedding.utils.logging import get_logger

logger = get_logger(__name__)

# Other weights, and texts of the data: negatives mined again, rows held out, the page and the report of dev queries.
_NOT_UPLOADED = ["checkpoint-*", "refresh/*", "dev/*", "dev.html", "report.md", ".*", "*/.*"]


def check_upload(training: RetrieverTrainingArguments) -> None:
    """Ask the hub before the work whether it will take the result; nothing without ``--push_to_hub``.

    Raises:
        UsageError: an upload of another kind is asked for, or the hub does not know the user.
    """
    if not training.push_to_hub:
        return
    strategy = getattr(training.hub_strategy, "value", training.hub_strategy)
    if strategy not in ("every_save", "end"):
        raise UsageError(
            f"--hub_strategy {strategy}: run.py uploads what it saves at the end, once; leave it out, or say end"
        )
    if training.hub_always_push:
        raise UsageError("--hub_always_push: run.py uploads what it saves at the end, once; leave it out")
    if is_main():
        try:
            who_am_i(training.hub_token)
        except HubError as error:
            raise UsageError(f"--push_to_hub: {error}") from error


def make_target(training: RetrieverTrainingArguments) -> str:
    """The repository that is uploaded to, made where it is not there: its full name."""
    name = training.hub_model_id or Path(str(training.output_dir)).resolve().name
    try:
        return make_repository(name, training.hub_token, training.hub_private_repo)
    except HubError as error:
        raise UsageError(f"--push_to_hub {name}: {error}") from error


def upload_saved(summary: TrainingSummary, card: Callable[[str], object] | None) -> None:
    """Upload the checkpoint of a run (main process).

    Args:
        card: writes the model card for the name that the model has on the hub.

    Raises:
        UserError: the hub did not take it; the checkpoint is on disk.
    """
    training = summary.arguments.training
    if not (training.push_to_hub and is_main()):
        return
    folder, name = Path(str(training.output_dir)), make_target(training)
    if card is not None:
        card(name)
    try:
        address = upload(folder, name, training.hub_token, training.hub_revision, _NOT_UPLOADED)
    except HubError as error:
        raise UserError(
            f"--push_to_hub {name}: {error}. The checkpoint is in {folder}: 'hf upload {name} {folder}' uploads it"
        ) from error
    logger.info("%s is uploaded: %s", folder, address)
