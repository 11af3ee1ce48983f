"""`python -m unicom_dist.cli` is the command `unicom`."""

from unicom_dist.cli.main import main

if __name__ == "__main__":
    main()
