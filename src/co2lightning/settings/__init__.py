"""From flags, run and recipe to checked settings, and the words of their errors."""
