"""The stages of a run, and the only place beside `pipeline.py` and `connect.py` that knows Ray."""
