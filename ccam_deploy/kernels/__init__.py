"""The computations between the graphs, on arrays in host or device memory."""
