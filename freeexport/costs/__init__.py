"""Cost model; measuring costs; synthetic exits and drafts."""
