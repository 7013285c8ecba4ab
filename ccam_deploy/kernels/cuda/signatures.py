"""The types of each kernel's arguments, for which kernels are compiled before they are launched.

Kernels are launched with these types. A kernel that is launched with others is
compiled then: `gather` is where a row is no whole number of 8-byte words.
"""

from __future__ import annotations

from typing import Any

from numba import types

from ccam_deploy.kernels.cuda import (
    channels,
    combine,
    cut,
    gradients,
    grids,
    layer_maps,
    masks,
    places,
    rows,
    scores,
    statistics,
    sums,
    ward,
)

Signatures = dict[Any, tuple[Any, ...]]
"""The types of the arguments by kernel."""

_f4, _f8, _i4, _i8 = types.float32, types.float64, types.int32, types.int64
_TABLE, _OWNER, _STARTS = _i8[:, ::1], _i4[::1], _i4[::1]
_HIERARCHY = _f8[:, ::1], _f4[:, ::1], _i4[:, ::1]
_PSI, _LABELS, _COUNTS = _f4[:, :, ::1], _i4[:, ::1], _i4[:, ::1]
_MAPS, _RANKS = (_i4[:, ::1], _f4[:, ::1], _f4[:, ::1]), types.Tuple((_i8, _i8, _f4))
_FLAGS, _ROUNDS = types.uint8[::1], _i4[:, :, ::1]


def signatures(dtype: Any) -> Signatures:
    """Return the types of every kernel's arguments.

    Args:
        dtype: Numba's type of features, gradients, masks and logits: float32 or float16.
    """
    inputs = _TABLE, dtype[::1], dtype[::1], _OWNER
    return (
        _of_scores(dtype)
        | _of_masked_forwards(dtype)
        | _of_layer_maps(dtype)
        | {
            statistics.channel_statistics: (*inputs, _f4[::1], _f8, _PSI),
            statistics.standardise: (_TABLE, _PSI, _PSI),
            ward.begin: (_TABLE, _PSI, *_HIERARCHY, _f8[:, ::1], _COUNTS, _ROUNDS, _ROUNDS),
            ward.search: (_TABLE, *_HIERARCHY, _ROUNDS),
            ward.merge: (_TABLE, *_HIERARCHY, _f8[:, ::1], _ROUNDS, _ROUNDS, _i8, _i8),
            ward.relink: (_TABLE, *_HIERARCHY, _ROUNDS, _ROUNDS, _i8),
            cut.partition: (
                _TABLE,
                *_HIERARCHY,
                _f8[:, ::1],
                _ROUNDS,
                _i4[::1],
                _LABELS,
                _COUNTS,
                _f4[:, :, ::1],
                _i4[:, ::1],
            ),
            sums.collection_sums: (
                *inputs,
                _PSI,
                _LABELS,
                _COUNTS,
                _f8[:, ::1],
                _i4[:, :, ::1],
                _f4[:, ::1],
            ),
            masks.index_masks: (_COUNTS, _i8, _STARTS, _FLAGS, _i8[::1]),
            masks.count_values: (
                *(_TABLE, *_MAPS, _STARTS, _i8, _i8, _i8, _RANKS, _i8),
                *(_i4[:, :, ::1], _i4[:, :, ::1]),
            ),
            masks.write_masks: (
                *(_TABLE, *_MAPS, _STARTS, _OWNER, _i8, _i8, _i8, _RANKS),
                *(_i4[:, :, ::1], _i4[:, :, ::1], dtype[:, ::1], _FLAGS, _i8[::1]),
            ),
            combine.softmax_weights: (_STARTS, _f4[::1], _FLAGS, _i8, _f4[::1]),
            combine.weighted_sum: (
                *(_STARTS, _f4[::1], dtype[:, ::1], _i8, _f4[:, ::1], _f4[:, :, ::1]),
            ),
            combine.find_extremes: (_f4[:, ::1], _f4[:, :, ::1]),
            combine.min_max: (_f4[:, ::1], _f4[:, :, ::1], _f4[:, ::1]),
        }
    )


def _of_scores(dtype: Any) -> Signatures:
    words = types.uint64[:, ::1]
    return {
        scores.cast: (_f4[::1], dtype[::1]),
        scores.gather: (words, _OWNER, words),
        scores.output_gradient: (
            *(dtype[:, ::1], _OWNER, _OWNER, _f4, _i8, _i8[::1], _f4[::1], dtype[:, ::1]),
        ),
        scores.mask_scores: (dtype[:, ::1], _STARTS, _i8[::1], _i8, _i8, _i8, _f4[::1]),
    }


def _of_masked_forwards(dtype: Any) -> Signatures:
    progress, owner, row_owner, item = _i4[::1], _i4[::1], _i8[::1], _i4[::1]
    lines = _i4[::1], _f4[::1]
    maps, doubles, levels = _f4[:, ::1], _f8[:, ::1], types.uint8[:, ::1]
    chunk, features = (dtype[:, ::1], row_owner, item), dtype[:, :, ::1]
    pair, triple = types.UniTuple(_i8, 2), types.UniTuple(_i8, 3)
    return {
        rows.row_scores: (*(progress, dtype[:, ::1], row_owner, item, owner, _i8[::1], _i8, maps),),
        rows.keep_scores: (progress, row_owner, item, owner, maps, maps),
        rows.advance: (progress, _i8),
        channels.channel_spread: (features, levels, doubles),
        channels.render_channels: (progress, _i4[:, ::1], features, *lines, pair, *chunk),
        channels.channel_weights: (progress, owner, levels, _f4[::1], maps, _i8, maps, maps),
        places.isolate: (progress, owner, features, *chunk),
        grids.render_grids: (progress, owner, levels, _i4[:, ::1], *lines, triple, *chunk),
        grids.clear: (doubles,),
        grids.accumulate: (progress, maps, dtype[:, ::1], row_owner, item, owner, doubles),
        grids.mean: (progress, doubles, _f8, maps),
    }


def _of_layer_maps(dtype: Any) -> Signatures:
    progress, owner, maps, features = _i4[::1], _i4[::1], _f4[:, ::1], dtype[:, :, ::1]
    begin = progress, owner, features
    return {
        gradients.gradient_weights: (*begin, features, _f8, _i8, _f8, maps),
        layer_maps.weighted_channels: (*begin, maps, _i8, maps),
        layer_maps.positive_gradients: (*begin, features, _f8, _i8, maps),
        layer_maps.lift: (progress, _f4, maps),
        layer_maps.enlarge: (
            *(progress, maps, _i4[::1], _f4[::1], types.UniTuple(_i8, 2), _i8, maps),
        ),
    }
