"""Files that come from outside: what they must say, and how they are read."""
