"""What the paper proves about SAM under label noise (section 3.2), as scripts that run in seconds on a CPU."""
