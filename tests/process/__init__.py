"""Tests of `rlp/process`."""
