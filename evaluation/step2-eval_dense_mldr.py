"""Step 2: score the runs of step 1, and compare models (see FlagEmbedding/evaluation/step2.py).

python evaluation/step2-eval_dense_mldr.py --encoder MODEL --languages ko fa hi --metrics ndcg@5 ndcg@10
python evaluation/step2-eval_dense_mldr.py --encoder BASE TUNED --compare --languages ko --metrics ndcg@10 recall@20
"""

import sys

from FlagEmbedding.evaluation.__main__ import score

if __name__ == "__main__":
    sys.exit(score())
