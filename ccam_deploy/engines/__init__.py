"""Inference engines: each runs one graph of a bundle."""

from ccam_deploy.engines.base import Engine, TensorSpec
from ccam_deploy.engines.networks import Activations, Classifier, Networks
from ccam_deploy.engines.open import Backend, available, load_networks, open_networks

__all__ = [
    "Activations",
    "Backend",
    "Classifier",
    "Engine",
    "Networks",
    "TensorSpec",
    "available",
    "load_networks",
    "open_networks",
]
