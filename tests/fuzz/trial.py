"""One example: the files are written, the reader reads them, and what comes out is rows or a clean error."""

from __future__ import annotations

import io
import logging
import re
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from FlagEmbedding.utils.errors import UserError
from tests.fuzz.readers import Reader

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def try_files(reader: Reader, contents: dict[str, bytes]) -> str:
    """``read`` or ``refused``; any other exception goes through, and so does an error that holds control characters."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for file, content in contents.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        logging.disable(logging.CRITICAL)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                reader.read(folder)
        except UserError as error:
            text = str(error)
            assert text.strip() and not _CONTROL.search(text), f"control characters in {text!r}"
            text.encode("utf-8")
            assert len(text) < 8_000, f"an error of {len(text)} characters: {text[:200]}"
            return "refused"
        finally:
            logging.disable(logging.NOTSET)
        return "read"
