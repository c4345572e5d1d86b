"""Tests of `rlp/sampling`."""
