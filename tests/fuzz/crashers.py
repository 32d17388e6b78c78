"""The smallest input of every kind of crash that a search has found, by target; each is a test for ever."""

from __future__ import annotations

CRASHERS: dict[str, dict[str, bytes]] = {}
"""Target -> what went wrong -> input."""
