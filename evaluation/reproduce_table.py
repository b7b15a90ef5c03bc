"""The paper's table: six rows trained and evaluated by the public commands (see paper_table/ beside this file).

python evaluation/reproduce_table.py --base_model BAAI/bge-m3 --languages ko fa hi --train_dir DIR --seeds 42 43 44
"""

import sys
from pathlib import Path

from FlagEmbedding.utils.cli import entry_point
from paper_table.command import reproduce

if __name__ == "__main__":
    sys.exit(entry_point(reproduce)(Path(__file__).resolve().parents[1]))
