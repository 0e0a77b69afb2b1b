"""`python -m bayesprune.cli`."""

from bayesprune.cli.app import main

if __name__ == "__main__":
    main()
