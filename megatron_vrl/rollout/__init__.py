"""Generation of rollouts, and weight sync from the trainer to the inference engines."""
