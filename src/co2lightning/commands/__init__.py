"""One file a command; `run.py` holds what those that take a run share."""
