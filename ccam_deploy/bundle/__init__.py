"""Bundles: what their manifest says, their folder on disk, and how a folder takes its place."""
