"""A cluster whose nodes have a network between them, of which one can be cut off."""
