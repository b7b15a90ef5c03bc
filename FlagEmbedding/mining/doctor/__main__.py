"""``python -m FlagEmbedding.mining.doctor``."""

import sys

from FlagEmbedding.mining.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
