"""Entry point of `python -m examples.noisy_images`."""

from examples.noisy_images.cli import main

if __name__ == "__main__":
    main()
