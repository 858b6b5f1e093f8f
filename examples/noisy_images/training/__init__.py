"""Training: one step, the trainer of epochs, a run in its folder, and where it is computed."""
