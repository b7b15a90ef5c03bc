"""Fine-tune a retriever: ``python run.py --model_name_or_path … --train_data … --output_dir …`` (or a .yaml recipe)."""

import sys

from FlagEmbedding.utils.cli import entry_point


@entry_point
def main() -> None:
    """Parse, then one call. Imports wait until here, so that the frame can report their errors too."""
    from FlagEmbedding.finetune.parsing import parse_arguments
    from FlagEmbedding.finetune.runner import run
    from FlagEmbedding.utils.distributed import is_main, leave

    summary = run(parse_arguments(sys.argv[1:]))
    if is_main():
        summary.show()
    leave()


if __name__ == "__main__":
    sys.exit(main())
