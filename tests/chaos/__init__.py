"""Runs that lose processes, nodes and storage on a schedule."""
