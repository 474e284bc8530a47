"""Prefix-aware attention over a paged KV cache, in Triton."""
