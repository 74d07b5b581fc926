"""(optional step) edits of finished graphs."""
