"""The stages of a run, and the only place beside `pipeline.py` that knows Ray."""
