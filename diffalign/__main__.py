"""``python -m diffalign`` is the ``diffalign`` command."""

from .cli import main

main()
