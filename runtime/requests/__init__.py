"""A request from call to finish: its options, slot, schedule and stream."""
