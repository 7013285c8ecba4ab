"""Explanation methods: each turns a batch of images and classes into saliency maps."""

from ccam_deploy.methods.base import (
    Batch,
    LayerPartition,
    MaskSequence,
    Method,
    MethodResult,
    Stopwatch,
)
from ccam_deploy.methods.collection_cam import CollectionCAM, CollectionCAMOptions

__all__ = [
    "Batch",
    "CollectionCAM",
    "CollectionCAMOptions",
    "LayerPartition",
    "MaskSequence",
    "Method",
    "MethodResult",
    "Stopwatch",
]
