"""The model: vision tower, projector, language model, and generation over them (layer 2)."""
