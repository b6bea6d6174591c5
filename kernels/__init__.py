"""Work of one device: softmax attention over a list of tiles, and the loss of an output head."""

from ringattn.kernels.base import Kernel
from ringattn.kernels.block_matrix import BLOCK_TILE, BlockMatrix, BlockTiles, Selection
from ringattn.kernels.cpu_flash import CpuFlashKernel
from ringattn.kernels.linear_loss import linear_cross_entropy
from ringattn.kernels.matmul import MatmulKernel
from ringattn.kernels.merge import accumulator_dtype, merge_partial
from ringattn.kernels.reference import DenseAttention, dense_attention
from ringattn.kernels.select import choose_kernel, kernel_by_name, kernel_names
from ringattn.kernels.tiles import TILE

__all__ = [
    "BLOCK_TILE",
    "TILE",
    "BlockMatrix",
    "BlockTiles",
    "CpuFlashKernel",
    "DenseAttention",
    "Kernel",
    "MatmulKernel",
    "Selection",
    "accumulator_dtype",
    "choose_kernel",
    "dense_attention",
    "kernel_by_name",
    "kernel_names",
    "linear_cross_entropy",
    "merge_partial",
]
