"""Pictures: cells that hold exactly the mask's pairs, PNG files that show something, fresh docs."""

import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import ringattn as ra
from ringattn import Mask, UserError, layouts, masks
from ringattn.draw import draw_mask, draw_steps, draw_work
from ringattn.raster import cell_areas, cell_edges, owned_tokens
from ringattn.schedule import Direction
from ringattn.step_picture import arrows_of
from tests.core.cases import LAYOUTS, MASKS, mask_of

ROOT = Path(__file__).resolve().parents[2]
MILLION = 1 << 20
LARGE = {
    "full": lambda: masks.full(MILLION),
    "causal": lambda: masks.causal(MILLION),
    "window": lambda: masks.sliding_window(MILLION, 1023, 0),
    "documents": lambda: masks.documents([MILLION // 600] * 600, causal=True),
    "dual_scope": lambda: masks.dual_scope(MILLION, 4096, 64, 1000),
    "neighborhood": lambda: masks.neighborhood((16, 256, 256), (3, 9, 9)),
}


def _plan(mask: Mask, world: int = 4, method: str = "ring", layout: str = "zigzag") -> ra.Plan:
    context = ra.ContextParallel(
        world, heads=(4, 2), head_dim=8, dtype=torch.bfloat16, method=method, layout=layout,
        ranks_per_node=2,
    )  # fmt: skip
    return context.plan(mask)


def _pixels(path: Path) -> np.ndarray:
    """RGB of a PNG file, one row per pixel; fails when the file is no picture."""
    image = imread(path)
    assert image.ndim == 3
    assert min(image.shape[:2]) > 200
    return image[..., :3].reshape(-1, 3)


def _has_color(pixels: np.ndarray, color: Sequence[float]) -> bool:
    return bool((np.abs(pixels - np.array(color)) < 0.02).all(axis=1).any())


@pytest.mark.parametrize("most", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", MASKS)
def test_cells_hold_the_pairs_of_the_dense_mask(name: str, most: int) -> None:
    mask = mask_of(name)
    edges = cell_edges(mask.seq_len, most)
    assert len(edges) - 1 == min(most, mask.seq_len)
    dense = mask.dense().astype(np.int64)
    dense = dense.sum(axis=0) if dense.ndim == 3 else dense
    want = np.add.reduceat(np.add.reduceat(dense, edges[:-1], axis=0), edges[:-1], axis=1)
    assert (cell_areas(mask, edges) == want).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_cells_hold_the_tokens_of_each_rank(layout: str, most: int) -> None:
    mask = mask_of("documents_causal")
    made = LAYOUTS[layout](mask, 3)
    edges = cell_edges(mask.seq_len, most)
    owned = owned_tokens(made, edges)
    for rank in range(3):
        want, _ = np.histogram(made.positions(rank), np.append(edges[:-1], edges[-1] + 1))
        assert (owned[:, rank] == want).all()


@pytest.mark.parametrize("name", LARGE)
def test_cells_of_a_million_tokens_add_up_to_the_mask(name: str) -> None:
    mask = LARGE[name]()
    edges = cell_edges(mask.seq_len, 320)
    areas = cell_areas(mask, edges)
    tokens = np.diff(edges)
    assert areas.sum() == mask.area
    assert (areas <= np.outer(tokens, tokens)).all()
    for layout in ("contiguous", "striped"):
        made = layouts.by_name(layout, mask, 64)
        owned = owned_tokens(made, edges)
        assert (owned.sum(axis=0) == made.sizes).all()
        assert (owned.sum(axis=1) == tokens).all()


@pytest.mark.parametrize("name", ["full", "causal_window", "prefix_tree", "strided_bands"])
def test_a_mask_shows_the_color_of_every_owner(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    mask = mask_of(name)
    draw_mask(mask, layouts.striped(mask.seq_len, 3), path)
    pixels = _pixels(path)
    for color in ((0, 114, 178), (230, 159, 0), (0, 158, 115)):  # blue, orange, green
        assert _has_color(pixels, [c / 255 for c in color])


@pytest.mark.parametrize("name", ["documents", "window", "dual_scope"])
@pytest.mark.parametrize("world", [4, 64])
def test_a_mask_of_a_million_tokens_is_drawn(name: str, world: int, tmp_path: Path) -> None:
    mask = LARGE[name]()
    draw_mask(mask, layouts.by_name("area_greedy", mask, world), tmp_path / "mask.png")
    pixels = _pixels(tmp_path / "mask.png")
    colored = (pixels.max(axis=1) - pixels.min(axis=1)) > 0.1
    assert colored.sum() > 300


def test_an_empty_mask_and_ranks_without_tokens_are_drawn(tmp_path: Path) -> None:
    mask = masks.from_bands(9, [])
    context = ra.ContextParallel(
        3, heads=(2, 1), head_dim=8, layout=layouts.contiguous(9, 3, [9, 0, 0])
    )
    plan = context.plan(mask)
    draw_mask(mask, plan.layout, tmp_path / "mask.png")
    draw_work(plan, tmp_path / "work.png")
    draw_steps(plan, tmp_path / "steps.png")
    for name in ("mask", "work", "steps"):
        _pixels(tmp_path / f"{name}.png")


@pytest.mark.parametrize("method", ["ring", "direct"])
def test_work_and_steps_are_drawn(method: str, tmp_path: Path) -> None:
    plan = _plan(mask_of("shared_question"), method=method)
    draw_work(plan, tmp_path / "work.png")
    assert len(np.unique(_pixels(tmp_path / "work.png"), axis=0)) > 50
    directions: tuple[Direction, Direction] = ("forward", "backward")
    for direction in directions:
        path = tmp_path / f"{direction}.png"
        draw_steps(plan, path, direction)
        # Keys and values are orange arrows; their gradients, in the backward, purple ones.
        assert _has_color(_pixels(path), (0xD5 / 255, 0x5E / 255, 0))
        purple = _has_color(_pixels(path), (0xAA / 255, 0x33 / 255, 0x77 / 255))
        assert purple == (direction == "backward")


def test_work_of_many_ranks_is_drawn(tmp_path: Path) -> None:
    draw_work(_plan(masks.causal(4096), world=64), tmp_path / "work.png")
    _pixels(tmp_path / "work.png")


@pytest.mark.parametrize("method", ["ring", "direct"])
def test_arrows_carry_all_bytes(method: str) -> None:
    plan = _plan(mask_of("streaming"), method=method, layout="striped")
    for schedule in (plan.forward, plan.backward):
        arrows = arrows_of(schedule)
        assert len(arrows) > 0
        for rank in range(4):
            assert sum(a.bytes for a in arrows if a.dst == rank) == schedule.bytes(rank)
        assert sum(a.rows for a in arrows) == schedule.moves["rows"].sum()


def test_illegible_pictures_of_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most 16 ranks"):
        draw_steps(_plan(masks.causal(64), world=17), tmp_path / "x.png")
    plan = _plan(masks.causal(64), world=16)
    with pytest.raises(UserError, match="at most 12 steps"):
        draw_steps(plan, tmp_path / "x.png")
    draw_steps(plan, tmp_path / "part.png", steps=(3, 5))
    _pixels(tmp_path / "part.png")


def test_the_document_shows_the_tables_that_the_code_makes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)\n```$", text, re.M | re.S)
    shown = {block.split("\n")[0]: block for kind, block in fences if not kind}
    made = list(runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))["tables"]())
    stale = [t for t in made if t.split("\n")[0] in shown and shown[t.split("\n")[0]] != t]
    assert not stale, "run docs/make_pictures.py and update docs/architecture.md:\n" + stale[0]
    current = set(shown.values()) & set(made)
    titled = [t for t in shown if re.match(r"(ring|direct|bands|ranges) .*:", t)]
    assert len(titled) == len(current) >= 10, f"not made by docs/make_pictures.py: {titled}"


def test_the_documents_code_runs_and_its_pictures_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = ROOT / "docs"
    text = (docs / "architecture.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 6
    for picture in pictures:
        assert 0 < (docs / picture).stat().st_size < 150_000
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, "architecture.md", "exec"), {})
    assert len(list(tmp_path.glob("*.png"))) == 3
