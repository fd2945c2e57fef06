"""Attacks of other libraries beside ours, on the same victims in the same run."""
