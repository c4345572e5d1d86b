"""Tests of `experiments/`: what its scripts make, and what its pages claim."""
