"""`python -m jaxinfer.cli`: the `jaxinfer` command where the console script isn't on PATH."""

from jaxinfer.cli import main

if __name__ == "__main__":
    main()
