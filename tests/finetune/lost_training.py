"""run.py with a short patience, as one of several processes under torchrun; started by test_lost_process.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from FlagEmbedding.finetune.__main__ import main
from FlagEmbedding.utils import heartbeat

if __name__ == "__main__":
    heartbeat.INTERVAL, heartbeat.PATIENCE = 0.5, 16
    Path(sys.argv.pop(1), f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    sys.exit(main())
