"""Weights in safetensors files: read shard by shard into parameters, written tensor by tensor.

A folder holds `model.safetensors`, or `model.safetensors.index.json` and the files it names. Both
are data: a header of names, dtypes and offsets, and raw values; nothing in them is executed.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ringattn.errors import UserError, brief
from ringattn.launch.local_part import write_part
from ringattn.launch.model import Transformer
from ringattn.launch.model_config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED = "rotary_emb.inv_freq"  # a buffer that old checkpoints carry; it follows from the shape


class HFWeights:
    """The weights of a Hugging Face folder; an instance is a `ringattn.launch.model.Fill`.

    Making one reads the files' headers and checks every name and shape. Calling it reads the part
    of one parameter that the given tensor holds, straight from the mapped file: no rank ever has a
    copy of the whole model, or of a whole parameter unless it asks for one.

    Args:
        folder: of the checkpoint.
        cfg: the model it must fit.

    Raises:
        UserError: a missing package or file, a broken header, a name that is missing or that the
            model does not have, another shape, or a dtype that is no floating point of 2 bytes or
            more.
    """

    def __init__(self, folder: str | Path, cfg: ModelConfig) -> None:
        self.folder = Path(folder)
        self._tied = cfg.tie_embeddings
        self._files: dict[str, Any] = {}
        self._where = self._find(parameter_shapes(cfg))

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a parameter's values into `tensor`, cast to its dtype. No communication.

        Args:
            name: of the parameter, as in the model.
            tensor: the parameter, plain or a `DTensor`, with the whole parameter's shape.

        Raises:
            UserError: the file can no longer be read.
        """
        name = _EMBEDDING if self._tied and name == _HEAD else name
        file = self._where[name]

        def read(index: tuple[slice, ...]) -> torch.Tensor:
            return self._open(file).get_slice(name)[index]

        try:
            write_part(tensor, read)
        except (OSError, RuntimeError, ValueError) as error:
            raise _broken(self.folder / file, error) from error

    def digest(self) -> str:
        """What tells these weights from others of the same shape: a digest of every file's header
        and last 64 KiB."""
        found = hashlib.sha256()
        for file in sorted(set(self._where.values())):
            with (self.folder / file).open("rb") as stream:
                length = stream.read(8)
                found.update(length + stream.read(int.from_bytes(length, "little")))
                stream.seek(0, 2)
                stream.seek(max(0, stream.tell() - 65_536))
                found.update(stream.read())
        return found.hexdigest()

    def _find(self, shapes: Mapping[str, torch.Size]) -> dict[str, str]:
        """The file of each parameter; checks names, shapes and dtypes by the headers."""
        where: dict[str, str] = {}
        for file, names in self._listed().items():
            for name in names:
                if name.endswith(_IGNORED) or (self._tied and name == _HEAD):
                    continue
                if name not in shapes:
                    raise self._misfit(name, "is no parameter of the model")
                entry = self._open(file).get_slice(name)
                if tuple(entry.get_shape()) != tuple(shapes[name]):
                    rule = f"has shape {entry.get_shape()}, not {list(shapes[name])}"
                    raise self._misfit(name, rule)
                if entry.get_dtype() not in _DTYPES:
                    raise self._misfit(name, f"has dtype {entry.get_dtype()}, not one of {_DTYPES}")
                where[name] = file
        missing = [name for name in shapes if name not in where]
        if missing:
            raise self._misfit(missing[0], f"is missing ({len(missing)} of {len(shapes)} are)")
        return where

    def _listed(self) -> dict[str, list[str]]:
        """File name -> names of its tensors, by the index or the single file's header."""
        index = self.folder / INDEX
        if not index.is_file():
            return {SINGLE: sorted(self._open(SINGLE).keys())}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise ValueError(f"names {brief(file)}, which is no file beside it")
                listed.setdefault(file, []).append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(index, error) from None
        for file, names in listed.items():
            absent = set(names) - set(self._open(file).keys())
            if absent:
                raise self._misfit(min(absent), f"is not in {file}, where the index puts it")
        return listed

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                from safetensors import safe_open
            except ImportError:
                raise UserError(
                    f"model.hf={self.folder}",
                    "needs the package safetensors",
                    'install it with: pip install "ringattn[hf]"',
                ) from None
            path = self.folder / file
            if not path.is_file():
                raise UserError(
                    f"{path}", "does not exist", "name a folder with the weights as safetensors"
                )
            try:
                self._files[file] = safe_open(str(path), framework="pt", device="cpu")
            except Exception as error:  # the package's own error class is no subclass of ours
                raise _broken(path, error) from None
        return self._files[file]

    def _misfit(self, name: str, rule: str) -> UserError:
        return UserError(
            f"weights {self.folder}: {name}", rule, "name a checkpoint that fits its config.json"
        )


def parameter_shapes(cfg: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's parameters; a tied output head counts as the embedding."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _broken(path: Path, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{path}", f"cannot be read ({reason})", "download it again")
