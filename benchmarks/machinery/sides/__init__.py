"""The two sides that `peers` compares: what both train, each framework's step, and the process that drives one."""
