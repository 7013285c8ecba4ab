"""Decompositions that keep exported graphs within what inference engines can run.

Engines have no backward operators, and some reject indices of max-pooling and scattering writes.
Every operator here becomes convolutions, matrix products and element-wise arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._decomp import get_decompositions

from ccam_deploy.export.graph_editing import aten
from ccam_deploy.export.lowering.convolution import convolution_backward
from ccam_deploy.export.lowering.indexing import (
    index_put,
    refuse_scattered_sum,
    select_backward,
    slice_backward,
)
from ccam_deploy.export.lowering.pooling import avg_pool2d_backward, max_pool2d_backward
from ccam_deploy.export.lowering.resampling import (
    adaptive_avg_pool2d,
    adaptive_avg_pool2d_backward,
)

Decomposition = Callable[..., object]

_FROM_TORCH = (
    aten.threshold_backward,
    aten.hardswish_backward,
    aten.hardsigmoid_backward,
    aten.hardtanh_backward,
    aten.silu_backward,
    aten.gelu_backward,
    aten.elu_backward,
    aten.leaky_relu_backward,
    aten.sigmoid_backward,
    aten.tanh_backward,
    aten.softplus_backward,
    aten.mish_backward,
    aten._prelu_kernel_backward,
    aten._softmax_backward_data,
    aten._log_softmax_backward_data,
    aten.native_layer_norm_backward,
    aten.native_group_norm_backward,
    aten._fused_rms_norm,
    aten._fused_rms_norm_backward,
    aten._prelu_kernel,
    aten._unsafe_view,
)


def decompositions() -> dict[Any, Decomposition]:
    """Make the table for `make_fx`: PyTorch's entries, and this module's for engines.

    Returns:
        The decomposition of each ATen operator that engines cannot run.
    """
    table: dict[Any, Decomposition] = dict(get_decompositions(_FROM_TORCH))
    table.update(
        {
            aten.convolution_backward.default: convolution_backward,
            aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
            aten.avg_pool2d_backward.default: avg_pool2d_backward,
            aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
            aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
            aten.slice_backward.default: slice_backward,
            aten.select_backward.default: select_backward,
            aten.scatter_add.default: refuse_scattered_sum,
            aten.index_add.default: refuse_scattered_sum,
            aten.grid_sampler_2d_backward.default: refuse_scattered_sum,
            aten.index_put.default: index_put,
            aten._unsafe_index_put.default: index_put,
        }
    )
    return table
