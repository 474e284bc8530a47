"""`python -m sagellm_ir`: the command line, for where its script is not on the path."""

from sagellm_ir.cli.main import main

raise SystemExit(main())
