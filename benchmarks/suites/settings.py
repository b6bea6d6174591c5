"""Settings of the suites: strict YAML in sections, as dataclasses.

    common: {ranks: [1, 2, 4], masks: [all]}
    methods: {seq_len: [512], methods: [all]}

`common` holds what several suites share; each suite has a section of its own. Shipped files lie in
``configs/bench``; a key that is left out has the value that it has below. On the command line
``methods.seq_len=[1024]`` overrides a key.
"""

import dataclasses
import difflib
import importlib.resources
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ringattn.benchmarks.suites.document_lengths import read_lengths
from ringattn.benchmarks.suites.mask_cases import LEAST, expanded
from ringattn.benchmarks.suites.simulated_settings import SimulatedSettings
from ringattn.benchmarks.suites.train_settings import TrainSettings
from ringattn.errors import UserError
from ringattn.kernels.select import kernel_names
from ringattn.launch.config_load import convert, parse_yaml
from ringattn.methods import METHODS

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
ALL_METHODS = (*METHODS, "auto")
MOST_PACKS = 10_000


@dataclass(frozen=True, kw_only=True)
class Common:
    """What suites share.

    Attributes:
        seed: of the inputs.
        device: "auto" takes GPUs where there are any.
        ranks: numbers of ranks to measure at, each on this host; a launcher's ranks replace them.
        ranks_per_node: consecutive ranks that plans take to share a node; None for the launcher's
            or all, and half of four or more for methods that look at nodes.
        masks: names of `mask_cases`, or "all", "longca", "ours".
        lengths: files of document lengths, for masks made of documents.
        packs: draws of every mask that is sampled.
        heads, head_dim, dtype: of q, k and v. batch is 1.
        layout: of the shards; "auto" takes what suits mask and method.
        cluster: for method "auto", which then weighs all methods by predicted time; None weighs
            ring and direct by a nominal cost.
        peers: whether peers run beside.
        warm_up: untimed runs. The first one, which is checked, always is.
        least, most: timed rounds: at least, and at most while the median is not sure.
        precision: half of the 95 % interval of a median, as a share, at which it counts as sure.
        flush: whether caches are emptied before each timed pass.
        timeout_s: seconds that a request to the ranks may take: one cell is lost after it.
        threads: CPU threads of a rank.
        reference: longest sequence whose results are held against a whole float64 reference;
            longer ones against one of 256 random rows and keys.
    """

    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: tuple[int, ...] = (1, 2, 4)
    ranks_per_node: int | None = None
    masks: tuple[str, ...] = ("all",)
    lengths: tuple[str, ...] = ("short",)
    packs: int = 1
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    dtype: Dtype = "float32"
    layout: str = "auto"
    cluster: str | None = None
    peers: bool = True
    warm_up: int = 0
    least: int = 1
    most: int = 1
    precision: float = 0.01
    flush: bool = True
    timeout_s: float = 120.0
    threads: int = 1
    reference: int = 2048


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Local kernels on one device. seconds: of repetitions per case and direction.

    Heads, head dims, dtypes and lengths multiply. kernels: names, or "all" that the device offers.
    masks: as in `Common`; None for its masks.
    """

    seq_len: tuple[int, ...] = (512,)
    heads: tuple[tuple[int, int], ...] = ((4, 2),)
    head_dim: tuple[int, ...] = (32,)
    dtype: tuple[Dtype, ...] = ("float32",)
    kernels: tuple[str, ...] = ("all",)
    seconds: float = 0.05
    masks: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Every method on every mask. methods: names, or "all" with "auto" among them."""

    seq_len: tuple[int, ...] = (512,)
    methods: tuple[str, ...] = ("all",)


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Every mask with method "auto" against one process."""

    seq_len: tuple[int, ...] = (512,)


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """Measured: tokens per rank (weak) and in all (strong), with masks and methods of their own."""

    weak: tuple[int, ...] = (256,)
    strong: tuple[int, ...] = (1024,)
    masks: tuple[str, ...] = ("causal", "documents_causal", "window_causal")
    methods: tuple[str, ...] = ("auto",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings.

    Attributes:
        name: of the file they come from.
        overrides: what the command line changed, as key=value.
        simulate: whether scaling is predicted for clusters in place of being measured.
    """

    name: str = "smoke"
    common: Common = field(default_factory=Common)
    kernels: KernelSettings = field(default_factory=KernelSettings)
    methods: MethodSettings = field(default_factory=MethodSettings)
    masks: MaskSettings = field(default_factory=MaskSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    scaling: ScalingSettings = field(default_factory=ScalingSettings)
    simulated: SimulatedSettings = field(default_factory=SimulatedSettings)
    overrides: tuple[str, ...] = ()
    simulate: bool = False

    def command(self, suite: str, *more: str) -> str:
        """The command that measures a part of these settings again."""
        used = used_sections(suite, simulate=self.simulate)
        mine = [text for text in self.overrides if text.partition(".")[0] in used]
        words = ["ringattn bench", suite, f"--settings {self.name}", *mine]
        return " ".join([*words, *["--simulate"] * self.simulate, *more])


def used_sections(suite: str, *, simulate: bool) -> tuple[str, ...]:
    """Sections of the settings that a suite reads."""
    return ("simulated",) if simulate and suite == "scaling" else ("common", suite)


SECTIONS: Mapping[str, Any] = {
    name: hint
    for name, hint in typing.get_type_hints(Settings).items()
    if dataclasses.is_dataclass(hint)
}


def known_keys() -> dict[str, Any]:
    """Every dotted key with its type."""
    return {
        f"{section}.{key}": hint
        for section, kind in SECTIONS.items()
        for key, hint in typing.get_type_hints(kind).items()
    }


def load_settings(name: str, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a shipped name or a file, with ``section.key=value`` overrides in order.

    Raises:
        UserError: no such file, an unknown key (naming the known ones), a wrong type, or a value
            that no suite can work with.
    """
    path = _find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--settings {name}", "is no readable text", "give a YAML file") from None
    content = parse_yaml(text, f"settings {name}")
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise UserError(f"settings {name}", "must be a mapping of sections", "see configs/bench")
    values: dict[str, Any] = {}
    for section, entries in content.items():
        if section not in SECTIONS:
            known = ", ".join(SECTIONS)
            raise UserError(f"settings {name}: {section}", "is no section", f"known: {known}")
        if entries is not None and not isinstance(entries, Mapping):
            raise UserError(f"settings {name}: {section}", "is a section", "give it keys")
        values |= {f"{section}.{key}": value for key, value in (entries or {}).items()}
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or not key:
            raise UserError(
                f"argument {text!r}", "is not key=value", "write methods.seq_len=[1024]"
            )
        values[key] = parse_yaml(raw, f"argument {key}")
    return checked(replace(_typed(values), name=name, overrides=tuple(overrides)))


def _find(name: str) -> Path:
    """A file, or a shipped one by its name."""
    given = Path(name)
    if given.is_file():
        return given
    folder = Path(str(importlib.resources.files("ringattn.configs"))) / "bench"
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in shipped:
        raise UserError(
            f"--settings {name}", "is no file and no shipped one", f"use {', '.join(shipped)}"
        )
    return folder / f"{name}.yaml"


def _typed(values: Mapping[str, Any]) -> Settings:
    known = known_keys()
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        if key not in known:
            section, _, _ = key.partition(".")
            same = [k for k in known if k.startswith(f"{section}.")] or list(known)
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"key {key}", "unknown", f"{hint}known: {', '.join(same)}")
        section, _, name = key.partition(".")
        sections[section][name] = convert(key, value, known[key])
    return Settings(**{name: SECTIONS[name](**entries) for name, entries in sections.items()})


def checked(settings: Settings) -> Settings:
    """The settings, or UserError for a value that no suite can work with."""
    common = settings.common
    positive = {
        "common.packs": common.packs, "common.head_dim": common.head_dim,
        "common.least": common.least, "common.timeout_s": common.timeout_s,
        "common.threads": common.threads, "kernels.seconds": settings.kernels.seconds,
        "common.ranks": min(common.ranks), "common.heads": min(common.heads),
        "common.precision": common.precision, "common.reference": common.reference,
    }  # fmt: skip
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise UserError(f"{key}={value}", "must be positive", "pass more than 0")
    if common.packs > MOST_PACKS:
        raise UserError(f"common.packs={common.packs}", f"is over {MOST_PACKS}", "draw fewer")
    for key, heads in (
        ("common.heads", common.heads), *(("kernels.heads", h) for h in settings.kernels.heads)
    ):  # fmt: skip
        if heads[0] % heads[1]:
            raise UserError(
                f"{key}={list(heads)}", "query heads must be a multiple of key heads", "e.g. [8,2]"
            )
    if common.most < common.least:
        raise UserError(
            f"common.most={common.most}", f"is less than common.least={common.least}", "raise it"
        )
    simulated = settings.simulated
    simulated.counts()
    for masks in (
        common.masks, settings.kernels.masks or (), settings.scaling.masks, simulated.masks
    ):  # fmt: skip
        expanded(masks)
    for lengths in (*common.lengths, simulated.lengths):
        read_lengths(lengths)
    for methods in (settings.methods.methods, settings.scaling.methods, simulated.methods):
        method_names(methods)
    for kernel in settings.kernels.kernels:
        if kernel not in ("all", *kernel_names()):
            known = ", ".join(("all", *kernel_names()))
            raise UserError(f"kernels.kernels={kernel}", "is not known", f"use some of {known}")
    for name in ("methods", "masks", "kernels"):
        lengths = getattr(settings, name).seq_len
        if not lengths or min(lengths) < LEAST:
            raise UserError(
                f"{name}.seq_len={list(lengths)}", f"must be {LEAST} or more", "pass longer ones"
            )
    return settings


def method_names(names: Sequence[str]) -> tuple[str, ...]:
    """Methods with "all" spelled out. Raises UserError for an unknown one."""
    found: dict[str, None] = {}
    for name in names:
        if name not in ("all", *ALL_METHODS):
            known = ", ".join(("all", *ALL_METHODS))
            raise UserError(f"method {name!r}", "is not known", f"use some of {known}")
        found |= dict.fromkeys(ALL_METHODS if name == "all" else (name,))
    return tuple(found)
