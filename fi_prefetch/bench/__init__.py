"""Measurements: which shapes, against which kernels, timed how. `fi-prefetch bench` is the way in."""
