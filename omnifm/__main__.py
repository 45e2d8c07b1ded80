"""`python -m omnifm` is the `omnifm` command."""

from omnifm.cli.main import main

if __name__ == "__main__":
    main()
