"""Connectors, under their old path."""
