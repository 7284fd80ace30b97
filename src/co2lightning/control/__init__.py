"""What a controller works out each step: state, observation, shield, rules."""
