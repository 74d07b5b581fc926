"""From a checkpoint and examples to a bundle that is served: planned, trained, converted and measured in one go."""
