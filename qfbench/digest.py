"""The hash by which models, suites and questions are known."""

from __future__ import annotations

import hashlib
import json


def hashed(*texts: str) -> str:
    """SHA-256 of texts, first 16 hex digits."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
