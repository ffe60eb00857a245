"""`python -m gsae` is the command `gsae`."""

from gsae.cli import main

if __name__ == "__main__":
    main()
