"""Entry point of `python -m examples.noisy_images`."""

from .cli import main

if __name__ == "__main__":
    main()
