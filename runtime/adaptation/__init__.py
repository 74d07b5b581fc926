"""What a session learns while decoding: threshold, draft length."""
