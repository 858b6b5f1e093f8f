"""Entry point of `python -m examples.noisy_images`."""

import sys

from .errors import not_installed

if __name__ == "__main__":
    try:
        from .cli import main
    except ModuleNotFoundError as error:
        sys.exit(f"error: {not_installed(error)}")
    main()
