"""Tests of `kernels/`. Its whole name is `tests.kernels`: it shadows no package."""
