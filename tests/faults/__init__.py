"""Runs that are made to fail: the tests, and two larger commands."""
