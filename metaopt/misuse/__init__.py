"""What a user is warned of: settings and calls that are allowed and cannot be meant."""
