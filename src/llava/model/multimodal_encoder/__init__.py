"""The vision tower, under its old path."""
