"""``python -m FlagEmbedding.mining.hard_negatives``."""

import sys

from FlagEmbedding.mining.hard_negatives.command import main

if __name__ == "__main__":
    sys.exit(main())
