"""Tests of `rlp/learn`."""
