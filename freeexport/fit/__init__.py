"""Turn a checkpoint and examples into a served bundle: plan, train, convert and evaluate."""
