"""Pages in a notebook: what they have in common is in `page`."""
