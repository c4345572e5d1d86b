"""Tests of `rlp/world`."""
