"""`co2lightning report`: what was trained and how good it is held out, as one HTML file."""
