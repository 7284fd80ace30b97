"""A training session: what it will do, doing it, and what it writes."""
