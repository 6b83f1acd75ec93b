"""`python -m mmlm_efficient`, the same as `mmlm`."""

from mmlm_efficient.cli import main

if __name__ == "__main__":
    main()
