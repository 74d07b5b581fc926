"""What both decoders said at each token; simulating thresholds on that."""
