"""Reads a cluster description: strict YAML into `Cluster`.

Nothing in a file is executed: the loader knows plain values only, and unknown, missing or repeated
keys and wrong types are refused.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ringattn.cost.cluster import Cluster
from ringattn.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """`SafeLoader` that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if not isinstance(key, str) or key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice or is not text", node.start_mark
                )
        return super().construct_mapping(node, deep)


def cluster_names() -> tuple[str, ...]:
    """Names of the clusters that come with the package."""
    folder = resources.files("ringattn.configs") / "clusters"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_cluster(name_or_path: str | os.PathLike[str]) -> Cluster:
    """The cluster of that name (see `cluster_names`), or of a YAML file.

    Raises:
        UserError: no such cluster, broken YAML, unknown, missing or repeated key, wrong type.
    """
    text = os.fspath(name_or_path)
    if text in cluster_names():
        source = resources.files("ringattn.configs") / "clusters" / f"{text}.yaml"
        return parse_cluster(source.read_text(encoding="utf-8"), f"cluster {text}")
    path = Path(text)
    if not path.is_file():
        raise UserError(
            f"cluster={text}",
            f"must be a YAML file or one of {', '.join(cluster_names())}",
            "pick a name, or give the path of a file",
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cluster {path}", f"cannot be read ({error})", "give a text file"
        ) from None
    return parse_cluster(content, f"cluster {path}")


def parse_cluster(text: str, where: str) -> Cluster:
    """A cluster from YAML text; `where` names the text in errors."""
    try:
        # _StrictLoader is a SafeLoader: it builds plain values only.
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(where, f"is not plain YAML ({problem})", "repair it") from None
    return _build(Cluster, values, where)


def _build(kind: type, values: Any, where: str) -> Any:
    """A dataclass from a mapping, its fields converted by their types."""
    if not isinstance(values, Mapping):
        raise UserError(where, "must be a mapping of keys", f"give the fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: {key}", "unknown", f"keys are {', '.join(hints)}")
    for entry in dataclasses.fields(kind):
        if entry.default is dataclasses.MISSING and entry.name not in values:
            raise UserError(f"{where}: {entry.name}", "is missing", "add it")
    return kind(**{k: _convert(hints[k], v, f"{where}: {k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) is types.UnionType:  # a part that may be left out
        return _convert(typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if typing.get_origin(hint) is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(where, "must be a mapping", "give one entry per kernel")
        entry = typing.get_args(hint)[1]
        return {name: _convert(entry, v, f"{where}.{name}") for name, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise UserError(f"{where}={value!r}", f"must be of type {hint.__name__}", "correct the value")


def dump_cluster(cluster: Cluster) -> str:
    """The cluster as YAML text; `parse_cluster` of it gives an equal cluster."""
    values = {k: v for k, v in dataclasses.asdict(cluster).items() if v is not None}
    return yaml.safe_dump(values, sort_keys=False, width=100, default_flow_style=None)
