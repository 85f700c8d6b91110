"""The files of a run, its storage, its report as text and its terminal output. No Ray."""
