"""Tests of the program as a whole: runs, launches, ranks, promises."""
