"""Step 0: embed the corpus of MIRACL languages into an index on disk (see FlagEmbedding/indexing/encoding.py).

python evaluation/step0-generate_embedding.py --encoder MODEL --languages ko --index_save_dir ./corpus-index
torchrun --nproc_per_node 8 evaluation/step0-generate_embedding.py …
python evaluation/step0-generate_embedding.py … --shards 3/64   # a worker of many, docs/cluster.md; then --finish
"""

import sys

from FlagEmbedding.evaluation.__main__ import embed

if __name__ == "__main__":
    sys.exit(embed())
