"""Step 1: search the index of MIRACL languages for their queries; writes TREC run files.

python evaluation/step1-search_results.py --encoder MODEL --languages ko fa hi --hits 1000 --threads 4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from FlagEmbedding.evaluation.steps import search_results
from FlagEmbedding.utils.cli import entry_point

if __name__ == "__main__":
    sys.exit(entry_point(search_results)())
