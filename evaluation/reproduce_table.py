"""The paper's table: six rows trained and evaluated by the public commands (see FlagEmbedding/evaluation/reproduce.py).

python evaluation/reproduce_table.py --base_model BAAI/bge-m3 --languages ko fa hi --train_dir DIR --seeds 42 43 44
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from FlagEmbedding.evaluation.reproduce import reproduce
from FlagEmbedding.utils.cli import entry_point

if __name__ == "__main__":
    sys.exit(entry_point(reproduce)(Path(__file__).resolve().parents[1]))
