"""Pictures of plans: a mask by owner, each rank's work, and the predicted timeline.

They are drawn from plans made here, of short sequences: the planner's own choice for the mask. The
mask is a small PNG, made without a plotting library so that a page of many masks takes seconds.
"""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch

import ringattn as ra
from ringattn.benchmarks.report import plot, units
from ringattn.benchmarks.report.cells import SUITES, Cell
from ringattn.benchmarks.report.markup import Html, element, joined, paragraph
from ringattn.benchmarks.report.tables import list_limited
from ringattn.benchmarks.suites.mask_cases import NAMES, sampled
from ringattn.cost import Priced
from ringattn.draw import PALETTE, rank_colors
from ringattn.errors import UserError
from ringattn.layout import Layout
from ringattn.masks import Mask
from ringattn.planner import Quote
from ringattn.raster import cell_areas, cell_edges, owned_tokens
from ringattn.schedule import Lane

TOKENS, RANKS, HEADS, HEAD_DIM, CLUSTER = 2048, 4, (8, 2), 64, "cpu_gloo"
MOST_PLANS = 12
_CELLS = 128
_FAINTEST = 0.4  # shade of a cell that allows almost nothing
_SIDE, _TOP, _LEFT = 148, 8, 22
_LANES = {Lane.INTRA: "c2", Lane.INTER: "c5"}


def plans_section(cells: Sequence[Cell], most: int = MOST_PLANS) -> Html:
    """Pictures of the masks that the records name, the first `most` of those that are known."""
    named = list(dict.fromkeys(c.mask for c in cells if c.suite in SUITES and c.text("mask")))
    known = [name for name in NAMES if name in named]
    shown = known[:most]
    if not shown:
        return Html()
    about = (
        f"Plans of {units.count(TOKENS)} tokens over {RANKS} ranks, as the planner chooses them "
        f"with {HEADS[0]}:{HEADS[1]} heads of {HEAD_DIM} on the cluster {CLUSTER}: predictions, no "
        "measurements. Colours of the mask are the ranks that own its query rows."
    )
    names = ["computing", "receiving inside the node", "receiving between nodes"]
    kinds = ["c0", *_LANES.values()]
    key = element(
        "ul",
        *[
            element("li", element("i", class_=f"swatch {kind}"), name)
            for kind, name in zip(kinds, names, strict=True)
        ],
        class_="legend",
    )
    left = [name for name in known if name not in shown]
    note = paragraph("Not pictured: ", list_limited(left, 60), ".", class_="note") if left else None
    return joined(paragraph(about), key, plot.panels([_picture(name) for name in shown]), note)


def _picture(name: str) -> Html:
    """The plan of a mask, or why there is none."""
    try:
        mask = sampled(name, TOKENS, q_heads=HEADS[0]).mask
        context = ra.ContextParallel(
            RANKS, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32, cluster=CLUSTER
        )
        quote = context.compare(mask).best
    except UserError as error:
        return element("figure", element("figcaption", name), paragraph(str(error)), class_="chart")
    share = 100 * mask.area / (mask.layers * mask.seq_len**2)
    chosen = f"{quote.candidate}"
    description = (
        f"{units.number(share)} % of all pairs; {chosen}; slowest rank "
        f"{units.scale_of([quote.seconds], 's').with_unit(quote.seconds)} in both directions"
    )
    parts = [_mask(mask, quote.layout), _work(quote)]
    top = _TOP + _SIDE + 34
    scale = units.scale_of([max(p.seconds for p in quote.priced)], "s")
    for priced in quote.priced:
        parts.append(_timeline(priced, top, scale))
        top += 30 + 15 * RANKS + 22
    drawn = plot.figure(name, description, top - 6, *parts)
    return Html(drawn.replace("</figcaption>", f"</figcaption>{paragraph(description)}", 1))


def _mask(mask: Mask, layout: Layout) -> Html:
    image = "data:image/png;base64," + base64.b64encode(mask_png(mask, layout)).decode("ascii")
    return joined(
        element(
            "image", href=image, x=_LEFT, y=_TOP, width=_SIDE, height=_SIDE, class_="pixels"
        ),
        element("rect", x=_LEFT, y=_TOP, width=_SIDE, height=_SIDE, class_="frame"),
        plot.text(_LEFT + _SIDE / 2, _TOP + _SIDE + 14, "key position", "middle", "tick"),
        element(
            "text", "query position", text_anchor="middle", class_="tick",
            transform=f"translate({_LEFT - 7} {_TOP + _SIDE / 2}) rotate(-90)",
        ),
    )  # fmt: skip


def mask_png(mask: Mask, layout: Layout) -> bytes:
    """The mask as a PNG of at most 128 × 128 pixels, clear where nothing is allowed.

    Hue is that of the owners of the query rows, opacity the share of allowed pairs.
    """
    edges = cell_edges(mask.seq_len, _CELLS)
    tokens = np.diff(edges)
    density = cell_areas(mask, edges) / (mask.layers * np.outer(tokens, tokens))
    hue = owned_tokens(layout, edges) / tokens[:, None] @ rank_colors(layout.world)
    opacity = np.where(density > 0, _FAINTEST + (1 - _FAINTEST) * density, 0)
    pixels = np.empty((*density.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.round(255 * hue)[:, None, :]
    pixels[..., 3] = np.round(255 * opacity)
    return png(pixels)


def png(pixels: np.ndarray) -> bytes:
    """RGBA pixels, uint8 (rows, columns, 4), as a PNG file."""
    rows, columns, _ = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    data = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _work(quote: Quote) -> Html:
    """Mask area of each rank in the forward, as a bar of its parts by step."""
    left, right = _LEFT + _SIDE + 52, plot.WIDTH - 44
    work = quote.schedules[0].work
    most = max(float(work.sum(axis=1).max()), 1.0)
    total = max(float(work.sum()), 1.0)
    parts: list[object] = [plot.text(left - 44, _TOP + 10, "share of the work", class_="unit")]
    for rank, steps in enumerate(work):
        y = _TOP + 24 + rank * 28
        parts.append(plot.text(left - 8, y + 13, f"rank {rank}", "end", "tick"))
        x = float(left)
        for area in steps:
            width = (right - left) * float(area) / most
            if width > 0.4:
                shape = f"M{x:.1f} {y}h{width:.1f}v18h-{width:.1f}Z"
                parts.append(element("path", d=shape, class_="part", fill=PALETTE[rank]))
            x += width
        share = f"{100 * float(steps.sum()) / total:.1f} %"
        parts.append(plot.text(x + 5, y + 13, share, class_="tick"))
    return joined(*parts)


def _timeline(priced: Priced, top: float, scale: units.Scale) -> Html:
    """When each rank computes and receives in one direction."""
    left, right = 50, plot.WIDTH - 16
    axis = plot.axis([0, priced.seconds / scale.divisor or 1], left, right)
    bottom = top + 12 + 15 * RANKS
    parts: list[object] = [plot.text(2, top + 2, priced.direction, class_="unit")]
    for value, label in axis.ticks:
        x = axis.at(value)
        parts.append(plot.line(x, top + 8, x, bottom, "grid"))
        parts.append(plot.text(x, bottom + 14, label, "middle", "tick"))
    parts.append(plot.text(2, bottom + 14, scale.unit, class_="unit"))
    for rank in range(RANKS):
        y = top + 11 + 15 * rank
        parts.append(plot.text(left - 8, y + 9, f"rank {rank}", "end", "tick"))
        parts += _bars(axis, scale, priced.begin[:, rank], priced.end[:, rank], y, 6, "c0")
        for lane, kind in _LANES.items():
            mine = (priced.dst == rank) & (priced.lane == lane) & (priced.src != rank)
            parts += _bars(axis, scale, priced.sent[mine], priced.done[mine], y + 7, 4, kind)
    return joined(*parts)


def _bars(
    axis: plot.Axis,
    scale: units.Scale,
    begin: np.ndarray,
    end: np.ndarray,
    y: float,
    height: float,
    kind: str,
) -> list[object]:
    spans = zip((begin / scale.divisor).tolist(), (end / scale.divisor).tolist(), strict=True)
    bars: list[object] = []
    for first, last in spans:
        if last > first:
            x = axis.at(first)
            width = max(round(axis.at(last) - x - 0.6, 1), 0.6)
            shape = f"M{x} {y}h{width}v{height}h-{width}Z"
            bars.append(element("path", d=shape, class_=f"fill {kind}"))
    return bars
