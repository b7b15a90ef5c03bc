"""Run a command and note the peak memory of its largest process: ``python measured.py NOTE COMMAND …``.

A small process of its own, with nothing imported: a direct child of the caller would be charged with the memory that
the caller held when it started it (Linux keeps the peak over exec). When the caller goes away, however it does, the
command is ended too, so that a second start never finds the first one's command still writing.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys


def main() -> int:
    """Exit code of the command; 128 + n when signal n ended it."""
    caller = os.getppid()
    child = subprocess.Popen(sys.argv[2:])
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while True:
        try:
            code = child.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if os.getppid() != caller:
                child.terminate()
        except KeyboardInterrupt:
            continue  # the terminal sent it to the command as well; its exit code will tell
    with open(sys.argv[1], "w") as note:
        note.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
