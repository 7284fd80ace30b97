"""How agents learn, whatever they are: rollouts, descent, graphs, ranks, seeds."""
