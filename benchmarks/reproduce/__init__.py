"""Runs of published experiments, beside the published numbers."""
