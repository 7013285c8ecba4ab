"""What explanations cost: latency, cold start, and the conditions of a measurement."""
