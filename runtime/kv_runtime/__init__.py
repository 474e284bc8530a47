"""What all engines' KV has in common: codecs, and transport between engines."""
