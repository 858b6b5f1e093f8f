"""Entry point of `python -m examples.noisy_images`."""

import sys

from .errors import missing_package

if __name__ == "__main__":
    try:
        from .cli import main
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
    main()
