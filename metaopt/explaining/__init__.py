"""What `metaopt explain` and `opt.explain` say of a stack."""
