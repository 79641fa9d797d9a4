"""Specs: from text, lists and dicts to pipelines of parts, and back."""
