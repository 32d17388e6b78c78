"""Checks of one engine against itself; no second engine is needed."""
