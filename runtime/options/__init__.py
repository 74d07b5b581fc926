"""Options of a request and of a session, checked when they are given."""
