"""A GPU: its memory and streams, the slots that callers share, and work replayed as CUDA graphs."""
