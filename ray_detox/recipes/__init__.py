"""Packaged recipes (YAML files) and the code that loads them."""
