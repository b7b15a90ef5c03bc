"""Fine-tune a retriever: ``python -m FlagEmbedding.finetune --model_name_or_path … --train_data … --output_dir …``.

The same as ``run.py``; a .yaml or .json recipe may stand first.
"""

from __future__ import annotations

import sys

from FlagEmbedding.utils.cli import entry_point


@entry_point
def main() -> int:
    """Parse, then train. What is heavy is imported once the options stand, so that a mistyped one shows at once."""
    from FlagEmbedding.finetune.parsing import parse_arguments

    arguments = parse_arguments(sys.argv[1:])

    from FlagEmbedding.finetune.runner import run
    from FlagEmbedding.utils.distributed import is_main, leave

    if arguments.training.plan:
        from FlagEmbedding.finetune.plan import plan

        made = plan(arguments)
        if is_main():
            print(made.text())
        leave()
        return 0
    summary = run(arguments)
    if is_main():
        summary.show()
    leave()
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
