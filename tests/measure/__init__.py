"""Tests of `rlp/measure`."""
