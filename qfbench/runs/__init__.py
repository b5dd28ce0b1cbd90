"""A run on disk: its folder, rows, checksums, provenance, cache, and their mirrors."""
