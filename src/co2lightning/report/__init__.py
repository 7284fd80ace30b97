"""`co2lightning report`: what was trained and what it does on held-out days, as one HTML file."""
