"""vLLM as a backend: stock vLLM, driven by plan steps through its own extension points."""
