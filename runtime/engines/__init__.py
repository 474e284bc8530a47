"""Engines: one package each. Importing this imports none of them."""
