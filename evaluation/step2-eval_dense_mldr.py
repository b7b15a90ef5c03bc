"""Step 2: score the runs of step 1, and compare models (see FlagEmbedding/evaluation/scoring.py).

python evaluation/step2-eval_dense_mldr.py --encoder MODEL --languages ko fa hi --metrics ndcg@5 ndcg@10
python evaluation/step2-eval_dense_mldr.py --encoder BASE TUNED --compare --languages ko --metrics ndcg@10 recall@20
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from FlagEmbedding.evaluation.scoring import eval_dense
from FlagEmbedding.utils.cli import entry_point

if __name__ == "__main__":
    sys.exit(entry_point(eval_dense)())
