"""Reads a `torch.distributed.checkpoint` folder without running anything that it contains.

The format's ``.metadata`` is a pickle. Here it is read by an unpickler that knows only the plain
classes of that format, and only tensor entries (which load with ``weights_only``) are accepted.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ringattn.errors import UserError

_FORMAT = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_FORMAT, "Metadata"),
    (_FORMAT, "TensorStorageMetadata"),
    (_FORMAT, "ChunkStorageMetadata"),
    (_FORMAT, "TensorProperties"),
    (_FORMAT, "MetadataIndex"),
    (_FORMAT, "StorageMeta"),
    (_FORMAT, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves the names of `_ALLOWED` and PyTorch's dtypes, and nothing else."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _ALLOWED:
            return super().find_class(module_name, global_name)
        dtype = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"names {module_name}.{global_name}")


class SafeReader(FileSystemReader):
    """A reader of local checkpoint folders that refuses anything but tensors.

    Raises:
        UserError: from `read_metadata`, when the metadata is broken, names foreign code, holds
            objects, or points outside the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata, checked."""
        path = Path(self.path) / ".metadata"
        fix = "resume from another checkpoint, or train anew with checkpoint.resume=never"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except FileNotFoundError:
            raise UserError(f"checkpoint {path}", "is missing", fix) from None
        except Exception as error:  # a broken pickle raises almost anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"checkpoint {path}", f"is refused: {reason}", fix) from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"checkpoint {path}", "holds no checkpoint metadata", fix)
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"checkpoint {path}: {name}", "must be a tensor", fix)
        for info in (metadata.storage_data or {}).values():
            name = str(info.relative_path)
            if Path(name).name != name or not (path.parent / name).is_file():
                raise UserError(f"checkpoint {path.parent}: file {name}", "is missing", fix)
        if metadata.storage_meta is None:
            raise UserError(f"checkpoint {path}", "holds no storage description", fix)
        metadata.storage_meta.load_id = self.load_id
        return metadata
