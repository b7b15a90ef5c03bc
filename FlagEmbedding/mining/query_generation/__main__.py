"""``python -m FlagEmbedding.mining.query_generation``."""

import sys

from FlagEmbedding.mining.query_generation.command import main

if __name__ == "__main__":
    sys.exit(main())
