"""`python -m convergent`: the same as the command, where scripts are not on the path."""

from convergent.cli import main

raise SystemExit(main())
