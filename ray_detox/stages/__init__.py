"""The stages of a run on Ray. Only these modules, and `cli/jobs.py`, import Ray."""
