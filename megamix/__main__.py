"""``python -m megamix`` is the ``megamix`` command."""

from megamix.cli import main

if __name__ == "__main__":
    main()
