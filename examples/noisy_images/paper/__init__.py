"""The paper: its tables and figures as presets, their runs and their reports."""
