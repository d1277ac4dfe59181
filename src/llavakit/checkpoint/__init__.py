"""Files to (model, processor) and back (layer 3)."""
