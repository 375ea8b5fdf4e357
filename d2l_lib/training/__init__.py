"""From data to a hypernetwork: batches, losses, steps, recipes, self-generated data."""
