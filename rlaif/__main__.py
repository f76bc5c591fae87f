"""The command line as ``python -m rlaif``, which launchers of several processes start."""

from rlaif.cli import main

if __name__ == "__main__":
    main()
