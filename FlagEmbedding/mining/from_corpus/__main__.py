"""``python -m FlagEmbedding.mining.from_corpus``."""

import sys

from FlagEmbedding.mining.from_corpus.command import main

if __name__ == "__main__":
    sys.exit(main())
