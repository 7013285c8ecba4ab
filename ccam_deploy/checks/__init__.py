"""Checks of an installation, of an explanation method and of the objects it points at."""
