"""`evaluate judge`: outputs judged by a chat model."""
