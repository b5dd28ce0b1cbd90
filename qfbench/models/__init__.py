"""A model, read and changed."""
