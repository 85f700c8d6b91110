"""A run on a Ray cluster whose nodes have a network between them, and one node is disconnected."""
