"""Audio, windows of speech, words and their times."""
