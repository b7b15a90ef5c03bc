"""Made by the same inputs? One answer for indexes, jobs, caches and the paper's table.

An identity is what decides a result, as JSON values: options, and fingerprints of the files that are read. It is kept
beside the result; what is there may be used or continued only where its identity is the present one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from FlagEmbedding.utils.adapter_folder import base_of, is_adapter
from FlagEmbedding.utils.errors import DataError, UsageError
from FlagEmbedding.utils.hub import ADAPTER_CONFIG
from FlagEmbedding.utils.io import PathLike, read_json, sha256_file

Identity = Mapping[str, Any]
_MODEL_FILES = [
    *("config.json", "*.safetensors", "*.bin", "*_linear.pt", "tokenizer.json", "sentencepiece.bpe.model"),
    *("*_Dense/config.json", "*_Dense/*.safetensors", "*_Dense/*.bin"),
]
_digests: dict[tuple[str, int, int], str] = {}  # path, time and size of a file that this process has read → SHA-256


def as_json(value: Any) -> Any:
    """``value`` as it reads after being written: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def digest(*parts: Any) -> str:
    """A SHA-256 for JSON values that is the same on every machine; for keys and names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def differences(there: Identity, here: Identity) -> list[str]:
    """``key: there … , here …`` for every key whose value differs between two identities."""
    there, here = as_json(there), as_json(here)
    return [
        f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


def check_identity(there: Identity, here: Identity, what: PathLike, hint: str) -> None:
    """Refuse ``what`` where it was made by other inputs, naming each difference.

    Raises:
        UsageError: they differ; ``hint`` says what to do.
    """
    found = differences(there, here)
    if found:
        raise UsageError(f"{what} does not fit this command: {'; '.join(found)}. {hint}")


def made_by(record: PathLike, identity: Identity) -> bool:
    """True where the JSON file ``record`` holds ``identity``, by itself or as its key ``identity``.

    False where it is not there, cannot be read or holds another one: then the result is to be made again.
    """
    try:
        found = read_json(record)
    except (OSError, ValueError):
        return False
    there = found.get("identity", found) if isinstance(found, dict) else None
    return bool(there == as_json(identity))


def fingerprints(files: Sequence[Path]) -> list[dict[str, str]]:
    """Name and SHA-256 of each file (as stored, not unpacked).

    Raises:
        DataError: one cannot be read.
    """
    return [{"name": path.name, "sha256": file_digest(path)} for path in files]


def model_fingerprint(folder: PathLike) -> str:
    """SHA-256 over a checkpoint's configuration, weight, head and tokenizer files (names and bytes); of an adapter with
    its base's."""
    files = sorted({path for pattern in _MODEL_FILES for path in Path(folder).glob(pattern)})
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode())
        whole.update(file_digest(path).encode())
    if is_adapter(folder):
        whole.update(file_digest(Path(folder) / ADAPTER_CONFIG).encode())
        whole.update(model_fingerprint(base_of(folder)).encode())
    return whole.hexdigest()


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file, which is read again only where it has changed since this process read it.

    Raises:
        DataError: it cannot be read.
    """
    key = _file_key(path)
    if key not in _digests:
        try:
            _digests[key] = sha256_file(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return _digests[key]


@contextmanager
def hashing(path: Path) -> Iterator[Any]:
    """A SHA-256 to be told all of a file's bytes by whoever reads it: :func:`file_digest` will not read it again."""
    key, digest = _file_key(path), hashlib.sha256()
    yield digest
    _digests[key] = digest.hexdigest()


def _file_key(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return str(path.resolve()), stat.st_mtime_ns, stat.st_size
