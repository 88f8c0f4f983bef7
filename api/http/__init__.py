"""OpenAI's interface over HTTP: what only the server needs. Programs that embed the engine import none of it."""
