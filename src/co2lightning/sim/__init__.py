"""The site as it runs: one step's physics, days, what they cost, environments, evaluation."""
