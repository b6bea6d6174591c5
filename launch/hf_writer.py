"""Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

The safetensors format (8 bytes of header length, a JSON header, raw values) is written here as a
stream, so that one tensor at a time is in memory however large the files are.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ringattn.errors import UserError
from ringattn.launch.hf_weights import INDEX, SINGLE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
MAX_FILE_BYTES = 4 * 2**30


def write_hf_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes config.json and the weights.

    Args:
        folder: made if missing; must be empty.
        config: content of config.json.
        shapes: of the tensors, by name, in the order in which they are written.
        read: gives a tensor, in any floating dtype; called once per name.
        dtype: float32 or bfloat16; values are rounded to the nearest.
        max_file_bytes: a file holds no more, unless one tensor alone is larger.

    Raises:
        UserError: the folder is not empty or cannot be written.
    """
    groups = _groups(shapes, dtype, max_file_bytes)
    count = len(groups)
    files = [SINGLE] if count == 1 else [
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--out {folder}", "is not empty", "name a new folder")
        for file, names in zip(files, groups, strict=True):
            with (folder / file).open("wb") as stream:
                _write_file(stream, {name: shapes[name] for name in names}, read, dtype)
        if count > 1:
            index = {
                "metadata": {"total_size": sum(_bytes(s, dtype) for s in shapes.values())},
                "weight_map": {n: f for f, names in zip(files, groups, strict=True) for n in names},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        # Last: a folder without it is not mistaken for a whole one.
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out {folder}", f"cannot be written ({error})", "name a writable folder"
        ) from None


def _write_file(
    stream: BinaryIO,
    shapes: Mapping[str, torch.Size],
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _bytes(shape, dtype)
        header[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned
    stream.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        tensor = read(name)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, announced {tuple(shape)}")
        values = tensor.detach().to("cpu", dtype).contiguous().flatten()
        stream.write(values.view(torch.uint8).numpy().data)


def _groups(shapes: Mapping[str, torch.Size], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Consecutive names per file."""
    groups: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        need = _bytes(shape, dtype)
        if not groups or size + need > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += need
    return groups


def _bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize
