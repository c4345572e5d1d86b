"""Tests of `rlp/compare`."""
