"""What lives as long as a run: the base with its groups and state, and what is remembered between two updates."""
