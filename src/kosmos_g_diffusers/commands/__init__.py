"""The subcommands of `kosmos-g`, a module each: its docstring is its help, `add_arguments(parser)` and `run(arguments)`."""
