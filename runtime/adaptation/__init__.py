"""What a session learns while it decodes: the adaptive threshold and the costs of calls."""
