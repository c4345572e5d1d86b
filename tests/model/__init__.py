"""Tests of `rlp/model`."""
