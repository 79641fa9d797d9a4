"""Training, comparing, statistics, figures."""
