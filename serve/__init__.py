"""Ray Serve: base and guides composed behind one OpenAI-compatible API."""
