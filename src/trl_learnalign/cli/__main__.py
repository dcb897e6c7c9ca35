"""The command as `python -m trl_learnalign.cli`."""

from .main import main


main()
