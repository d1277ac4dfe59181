"""Scripts that answer."""
