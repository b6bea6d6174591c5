"""Block tiles through the adapters: known matrices as bands, run-time ones by the matmul kernel."""

from typing import Any

import numpy as np
import pytest
import torch

from ringattn.kernels import BLOCK_TILE, BlockMatrix, BlockTiles, Kernel, Selection
from ringattn.kernels.block_bands import block_bands
from ringattn.kernels.block_matrix import allowed_pairs
from ringattn.kernels.cudnn import CudnnKernel
from ringattn.kernels.flash import FlashKernel
from ringattn.kernels.flex import FlexKernel
from ringattn.kernels.flex_op import EagerFlex
from ringattn.kernels.flex_tables import BLOCK, flex_tables
from tests.closeness import assert_close
from tests.kernels.flash_stand_in import StandInFlash
from tests.kernels.problems import OPEN, Problem, problem, tile_table
from tests.kernels.test_adapter_cudnn import StandInCudnn

ROWS, KEYS, HEADS = 150, 130, 4
EXACT = 1e-11


def _kernels() -> dict[str, Kernel]:
    flash = FlashKernel(StandInFlash())
    return {
        "flash": flash,
        "cudnn": CudnnKernel(StandInCudnn(), flash),
        "flex": FlexKernel(EagerFlex()),
    }


def _blocks(allowed: np.ndarray | None) -> BlockTiles:
    """One causal tile over rows [10, 150) and keys [0, 130): blocks of 32 rows and of 20 keys."""
    matrix = BlockMatrix(np.array([0, 32, 64, 96, 128, 150]), np.arange(0, KEYS + 1, 26), allowed)
    tile = np.zeros(1, dtype=BLOCK_TILE)
    for name, value in (("h1", HEADS), ("q0", 10), ("q1", ROWS), ("k1", KEYS), ("lo", -OPEN)):
        tile[name] = value
    tile["hi"], tile["step"], tile["pitch"] = 0, 1, 1
    return BlockTiles(tile, (matrix,))


def _with_pairs(p: Problem, blocks: BlockTiles, allowed: np.ndarray) -> None:
    known = BlockMatrix(blocks.matrices[0].q_edges, blocks.matrices[0].k_edges, allowed)
    p.allowed[:, 10:ROWS, :KEYS] |= torch.from_numpy(allowed_pairs(blocks.tiles[0], known))


def _run(kernel: Kernel, p: Problem, blocks: BlockTiles, **more: Any) -> dict[str, torch.Tensor]:
    prepared = kernel.prepare(p.tiles, torch.device("cpu"), blocks)
    out, lse = torch.zeros_like(p.dout), p.q.new_full(p.q.shape[:3], float("-inf"))
    options = {"scale": p.scale, "softcap": None, **more}
    kernel.forward(p.q, p.k, p.v, prepared, out, lse, **options)
    dq, dk, dv = (torch.zeros_like(x) for x in (p.q, p.k, p.v))
    delta = (out * p.dout).sum(-1)
    kernel.backward(p.dout, p.q, p.k, p.v, lse, delta, prepared, dq, dk, dv, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("run_time", [False, True], ids=["known", "selected"])
@pytest.mark.parametrize("name", ["flash", "cudnn", "flex"])
def test_block_tiles_beside_bands(
    generator: torch.Generator, seed: int, name: str, run_time: bool
) -> None:
    allowed = np.random.default_rng(seed).random((5, 5)) < 0.6
    blocks = _blocks(None if run_time else allowed)
    tiles = tile_table((0, 2, 0, 10, 0, 40, -OPEN, 30, 1))
    p = problem(tiles, generator, rows=ROWS, keys=KEYS, heads=(HEADS, 2))
    _with_pairs(p, blocks, allowed)
    more = {}
    if run_time:
        chosen = np.where(allowed, np.arange(5), -1).astype(np.int32)
        more["selection"] = Selection(torch.from_numpy(chosen)[None, None], HEADS)
    reference = p.reference()
    for tensor, got in _run(_kernels()[name], p, blocks, **more).items():
        assert_close(tensor, getattr(reference, tensor), got, EXACT)


def test_full_blocks_need_no_interval(seed: int) -> None:
    """Blocks of FlexAttention's own size are one mask, however many runs of them a row has."""
    size, count = BLOCK, 24
    allowed = np.zeros((count, count), dtype=bool)
    allowed[:, ::2] = True
    edges = np.arange(0, size * count + 1, size)
    tile = np.zeros(1, dtype=BLOCK_TILE)
    tile["h1"], tile["q1"], tile["k1"], tile["step"], tile["pitch"] = 1, edges[-1], edges[-1], 1, 1
    tile["lo"], tile["hi"] = -OPEN, OPEN
    bands = block_bands(BlockTiles(tile, (BlockMatrix(edges, edges, allowed),)))
    (t,) = flex_tables(bands)
    assert not t.partial.any()
    assert np.array_equal(t.full, np.ones((count, count // 2), dtype=bool))
    assert not t.stop.any()
    assert np.array_equal(t.keys // size % 2, np.zeros(size * count // 2))
