"""What a stack is made of: an update, its state, its checkpoints. `metaopt.stack` puts it together."""
