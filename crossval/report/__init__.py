"""Receipts as one HTML page: figures, findings, tables."""
