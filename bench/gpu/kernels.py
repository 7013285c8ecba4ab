"""Part of bench_gpu: the kernels between the graphs."""

from __future__ import annotations

import sys

from bench import bench_kernels
from bench.gpu.pieces import Figures, Piece, measure_pieces, pieces_in

_ROUNDS = 60


def measure(piece: Piece) -> Figures:
    """Time each kernel on the shapes of a network's layers; see bench_kernels."""
    device = bench_kernels.open_device()
    try:
        return bench_kernels.measure(device, piece.network, piece.batch, _ROUNDS)
    finally:
        device.close()


if __name__ == "__main__":
    measure_pieces(pieces_in(sys.argv[1]), measure)
