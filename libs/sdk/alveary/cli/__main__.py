"""`python -m alveary.cli`."""

from alveary.cli import main

main()
