"""Files to samples (``sources``), samples to batches in a fixed order (``loader``); samples as people read them (``masks``)."""
