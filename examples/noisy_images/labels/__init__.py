"""Labels: the noise that is put into them, its audit, and labels that people gave."""
