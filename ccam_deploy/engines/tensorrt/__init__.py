"""TensorRT and TensorRT-RTX: plans are built, chosen and run."""
