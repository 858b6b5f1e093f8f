"""Suspects: the training samples whose given label is likely wrong."""
