"""What replicas exchange: how far their weights have moved since the last outer step, averaged over a process group."""
