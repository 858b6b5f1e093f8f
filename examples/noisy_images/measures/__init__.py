"""What is measured of a run: functions of arrays, and their figures."""
