"""The models that run inside of Triton's Python backend."""
