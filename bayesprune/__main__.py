"""`python -m bayesprune`."""

from bayesprune.app.commands import main

if __name__ == "__main__":
    main()
