"""Train a small language model with SANER in front of AdamW, its parameters and optimizer state cut over all devices.

    python -m examples.sharded_transformer --virtual-devices 4

``model.py`` says along which dimension each parameter is cut, ``training.py`` places the rest by that and takes the
steps, ``checkpoints.py`` moves a run to another number of devices, ``data.py`` makes the text.
"""
