"""OpenAI-compatible HTTP server for `runtime.Session`. Imports only `runtime`, not torch."""
