"""Step 1: search the index of MIRACL languages for their queries; writes TREC run files.

python evaluation/step1-search_results.py --encoder MODEL --languages ko fa hi --hits 1000 --threads 4
"""

import sys

from FlagEmbedding.evaluation.__main__ import search

if __name__ == "__main__":
    sys.exit(search())
