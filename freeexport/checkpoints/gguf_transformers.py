"""GGUF files for transformers: a file with no arrays, for its configuration, and a fast reader."""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from freeexport.checkpoints.gguf import GGUFFile
from freeexport.checkpoints.gguf_header import ARRAY, TEXT, Array


@contextmanager
def without_arrays(file: GGUFFile) -> Iterator[Path]:
    """Write a GGUF file with all fields except arrays, and the names of the tensors.

    transformers builds the same configuration from it. The file is removed when the block ends.
    """
    from gguf import GGUFWriter
    from gguf.constants import GGUFValueType

    fields = file.header.fields
    kinds = {bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT64, str: GGUFValueType.STRING}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "header.gguf"
        architecture = str(fields["general.architecture"])
        writer = GGUFWriter(path, architecture)
        size = {
            f"{architecture}.vocab_size": getattr(
                fields.get("tokenizer.ggml.tokens"), "length", None
            )
        }
        for name, value in {**size, **fields}.items():
            if name.startswith("general.a") or value is None or isinstance(value, Array):
                continue  # GGUFWriter adds architecture and alignment
            writer.add_key_value(name, value, kinds.get(type(value), GGUFValueType.INT64))
        for name in file.header.tensors:
            writer.add_tensor(name, np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        yield path


@contextmanager
def quick_reader(options: Mapping[str, str]) -> Iterator[None]:
    """Make transformers read GGUF files faster while the block runs.

    The reader does not create two arrays for each item of an array, and names are cached between
    modules. SmolLM2's header takes 0.1 to 0.4 s instead of 2.5 s. Has no effect if `options` of a
    checkpoint's source name no GGUF file.
    """
    if "gguf_file" not in options:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    package: Any = gguf
    reader: Any = modeling_gguf_pytorch_utils

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            at = orig_offs + 12
            count = int(length[0])
            items = list[Any]()
            if kind[0] == TEXT:
                order = ">" if (sys.byteorder == "little") == (self.byte_order == "S") else "<"
                unpack = struct.Struct(f"{order}Q").unpack_from
                content = self.data.data
                for _ in range(count):
                    begin = at + 8
                    at = begin + unpack(content, at)[0]
                    items.append(content[begin:at].tobytes())
            else:
                numbers = self._get(
                    at, self.gguf_scalar_to_np[gguf.GGUFValueType(int(kind[0]))], count
                )
                at += numbers.nbytes
                items.extend(numbers.reshape(-1, 1))
            types = [
                gguf.GGUFValueType.ARRAY,
                *([gguf.GGUFValueType(int(kind[0]))] if count else []),
            ]
            return at - orig_offs, [kind, length, *items], list(range(2, 2 + count)), types

    usual = gguf.GGUFReader
    names = gguf.get_tensor_name_map
    bar = reader.tqdm
    package.GGUFReader = Reader
    package.get_tensor_name_map = cache(names)
    reader.tqdm = lambda items, **_: items  # its own progress bar
    try:
        yield
    finally:
        package.GGUFReader = usual
        package.get_tensor_name_map = names
        reader.tqdm = bar
