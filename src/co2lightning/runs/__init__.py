"""The run directory: episodes, history, the lock around them; imports no other folder."""
