"""Step 0: embed the corpus of MIRACL languages into an index on disk (see FlagEmbedding/indexing/encoding.py).

python evaluation/step0-generate_embedding.py --encoder MODEL --languages ko --index_save_dir ./corpus-index
torchrun --nproc_per_node 8 evaluation/step0-generate_embedding.py …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

if __name__ == "__main__":
    # Inside the guard: tokenizer processes (--workers) read this file again and need none of it.
    from FlagEmbedding.evaluation.steps import generate_embedding
    from FlagEmbedding.utils.cli import entry_point

    sys.exit(entry_point(generate_embedding)())
