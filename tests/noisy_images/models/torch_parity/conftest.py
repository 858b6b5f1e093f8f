"""Keep the script that needs PyTorch out of the collection of executed examples."""

collect_ignore = ["generate.py"]
