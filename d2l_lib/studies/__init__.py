"""Programs that fill data/full_runs: each measures one thing and records it."""
