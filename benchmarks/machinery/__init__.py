"""What the commands share: their options and records, networks and timing, what is counted, tables and targets."""
