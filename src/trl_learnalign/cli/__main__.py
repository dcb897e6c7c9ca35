"""The command as `python -m trl_learnalign.cli`."""

from .main import main


if __name__ == "__main__":
    main()
