"""An HTTP server with OpenAI's interface over `runtime.Session`. Imports `runtime` alone: no torch."""
