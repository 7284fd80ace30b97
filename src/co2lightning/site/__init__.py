"""A folder of files -> `Site`, checked; needs no torch."""
