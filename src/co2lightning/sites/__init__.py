"""The shipped sites, each a folder in the format that a user writes (docs/site-format.md)."""
