"""The pages of the site that come from the code: parts, changelog, examples, and pictures from real runs."""
