"""What lives as long as one `step()`: the update, and what it changes."""
