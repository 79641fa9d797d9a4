"""What replicas exchange: the ways that their weights went since the last outer step, averaged over a process group."""
