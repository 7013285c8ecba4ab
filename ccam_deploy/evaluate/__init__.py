"""Data and measurements for judging explanations."""
