"""The HTTP server of one engine, in the words of the OpenAI API. Needs the extra `server`."""
