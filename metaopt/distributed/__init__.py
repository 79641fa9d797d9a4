"""Several processes: shards of one tensor, and replicas of the whole."""
