"""Frames in, frames or figures out; no model."""
