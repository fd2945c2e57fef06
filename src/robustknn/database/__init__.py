"""Databases of references that outgrow the memory."""
