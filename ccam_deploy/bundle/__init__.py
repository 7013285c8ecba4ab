"""Bundles: their manifest, their folder on disk, and the writing of a new one."""
