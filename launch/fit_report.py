"""What ``ringattn plan --fit`` prints: tables for people, JSON for programs, a recipe's comment."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ringattn.launch.fit import CONTEXT_GIB, GIB, WASTED, Fit, FitModel, Option

_FORM = "{:12} {:>6} {:>8} {:>10} {:>9} {:>14} {:>12}"
_HEAD = ("checkpoints", "tile", "offload", "peak GiB", "host GiB", "longest tokens", "step s")


def fit_json(fit: Fit, model: FitModel) -> dict[str, Any]:
    """The prediction as plain values: bytes of one rank, seconds of one optimizer step."""
    return {
        "fits": fit.fits,
        "peak_bytes": int(fit.parts.nbytes),
        "peak_at": fit.parts.moment,
        "parts": {kind: int(nbytes) for kind, nbytes in fit.parts.parts.items()},
        "moments": {p.moment: int(p.nbytes) for p in fit.chosen.memory.moments},
        "host_bytes": int(fit.chosen.memory.host),
        "usable_bytes": int(fit.usable),
        "usable_host_bytes": int(fit.usable_host),
        "longest": fit.chosen.longest,
        "unit": model.unit,
        "seconds": {**asdict(fit.chosen.seconds), "total": fit.chosen.seconds.total},
        "tokens_per_s_per_rank": fit.tokens_per_s,
        "mfu": fit.mfu,
        "others": [_option_json(option) for option in fit.others],
    }


def _option_json(option: Option) -> dict[str, Any]:
    settings = option.settings
    return {
        "checkpointing": settings.checkpointing,
        "token_tile": settings.token_tile,
        "offload": settings.offload_kept,
        "peak_bytes": int(option.memory.peak.nbytes),
        "host_bytes": int(option.memory.host),
        "longest": option.longest,
        "seconds": option.seconds.total,
    }


def fit_table(fit: Fit, model: FitModel) -> Iterator[str]:
    """Lines: the peak and its parts, the verdict, other settings, the step's time."""
    peak, seq_len = fit.parts, model.seq_len
    yield f"predicted peak of one rank: {_gib(peak.nbytes)}, at: {peak.moment}"
    for kind, nbytes in sorted(peak.parts.items(), key=lambda part: -part[1]):
        yield f"  {kind:28} {_gib(nbytes):>11}"
    host = fit.chosen.memory.host
    yield f"  in host memory               {_gib(host):>11} of {_gib(fit.usable_host)} usable"
    context = CONTEXT_GIB if model.device == "cuda" else 0
    yield (
        f"usable: {_gib(fit.usable)} of {model.cluster.memory_gib:g} GiB ({context:g} GiB for"
        f" context and communication, then {WASTED:.0%} for what the allocator cannot fill)"
    )
    yield verdict(fit, seq_len, model.unit)
    yield _FORM.format(*_HEAD).rstrip()
    for option in (fit.chosen, *fit.others):
        yield _option_line(option, chosen=option is fit.chosen)
    if not fit.fits and (change := cheapest(fit, seq_len)) is not None:
        yield f"fastest settings that fit: {_named(change)}"
    yield "predicted step:"
    for name, seconds in asdict(fit.chosen.seconds).items():
        if seconds:
            yield f"  {name.replace('_', ' '):28} {seconds:11.4g} s"
    yield speed(fit)


def verdict(fit: Fit, seq_len: int, unit: int) -> str:
    """Whether the configured length fits, and how long one would."""
    longest = fit.chosen.longest
    grown = f"the longest that does is {longest:,}" if longest else f"not even {unit:,} do"
    if fit.fits:
        return f"data.seq_len={seq_len:,} fits; {grown} tokens"
    return f"data.seq_len={seq_len:,} does not fit; with these settings {grown} tokens"


def speed(fit: Fit) -> str:
    """Seconds, throughput and utilisation of a step."""
    return (
        f"step {fit.chosen.seconds.total:.4g} s, {fit.tokens_per_s:,.0f} tokens/s per rank,"
        f" {fit.mfu:.1%} MFU"
    )


def cheapest(fit: Fit, seq_len: int) -> Option | None:
    """The fastest of the other settings under which the configured length fits."""
    fitting = [o for o in fit.others if o.longest >= seq_len and fit.holds(o.memory)]
    return min(fitting, key=lambda option: option.seconds.total, default=None)


def recipe_comment(fit: Fit, model: FitModel, cluster: str) -> list[str]:
    """The lines that head a shipped recipe."""
    chosen = fit.chosen
    return [
        f"# ringattn plan --comment, cluster {cluster}, causal mask:",
        f"#   attention {model.methods}",
        f"#   {_gib(chosen.memory.peak.nbytes)} of {_gib(fit.usable)} usable per GPU,"
        f" {_gib(chosen.memory.host)} host memory per GPU; longest {chosen.longest:,} tokens",
        f"#   {speed(fit)}",
    ]


def _option_line(option: Option, *, chosen: bool) -> str:
    settings = option.settings
    line = _FORM.format(
        settings.checkpointing,
        settings.token_tile or "-",
        "yes" if settings.offload_kept else "-",
        f"{option.memory.peak.nbytes / GIB:.4g}",
        f"{option.memory.host / GIB:.4g}",
        f"{option.longest:,}",
        f"{option.seconds.total:.4g}",
    )
    return line + ("  (configured)" if chosen else "")


def _named(option: Option) -> str:
    settings = option.settings
    tile = "null" if settings.token_tile is None else settings.token_tile
    return (
        f"memory.checkpointing={settings.checkpointing} memory.token_tile={tile}"
        f" memory.offload={str(settings.offload_kept).lower()}"
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.4g} GiB"
