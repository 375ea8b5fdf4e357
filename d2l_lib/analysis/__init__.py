"""What an adapter or an answer holds: numbers, never training."""
