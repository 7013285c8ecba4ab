"""How kernels read the table of layers; see Geometry.table."""

from __future__ import annotations

from numba import cuda

from ccam_deploy.kernels.cuda.collectives import Array
from ccam_deploy.kernels.cuda.geometry import LayerRow


@cuda.jit(device=True)
def layer_row(table: Array, layer: int) -> LayerRow:
    """A layer's row. The compiler drops the loads of fields that are not used."""
    return LayerRow(
        table[layer, 0],
        table[layer, 1],
        table[layer, 2],
        table[layer, 3],
        table[layer, 4],
        table[layer, 5],
        table[layer, 6],
        table[layer, 7],
    )


@cuda.jit(device=True)
def layer_of_channel(table: Array, channel: int) -> int:
    """The layer that holds a channel, counted over all layers."""
    layer = 0
    while layer + 1 < table.shape[0] and layer_row(table, layer + 1).first_channel <= channel:
        layer += 1
    return layer


@cuda.jit(device=True)
def layer_of_tile(table: Array, tile: int) -> int:
    """The layer that holds a tile, counted over all layers."""
    layer = 0
    while layer + 1 < table.shape[0] and layer_row(table, layer + 1).first_tile <= tile:
        layer += 1
    return layer
