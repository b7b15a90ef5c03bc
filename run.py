"""Fine-tune a retriever: ``python run.py --model_name_or_path … --train_data … --output_dir …`` (or a .yaml recipe)."""

import sys

from FlagEmbedding.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
