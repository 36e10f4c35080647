"""One bench a file: its docstring is its help, `add_options` and `run` are its interface."""
