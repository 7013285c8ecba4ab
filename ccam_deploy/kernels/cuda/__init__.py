"""The kernels on an NVIDIA GPU, with Numba-CUDA; `launch` is the way in.

Importing this package loads nothing; importing its modules loads Numba.

Everything computed between the graphs runs here for all layers and all pairs at once. Layers
differ in channels and size, so each launch gets a table of where each layer starts
(`geometry`). Results do not depend on the number of threads or on the order in which they run,
and equal those of `ccam_deploy.kernels.cpu` within rounding.
"""
