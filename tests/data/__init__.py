"""Tests of `rlp/data`."""
