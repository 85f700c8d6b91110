"""Tests that start Ray: one small cluster of one machine, for all of them together."""
