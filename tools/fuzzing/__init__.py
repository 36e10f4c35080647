"""Parts of tools/fuzz.py: the parsers that it calls, and the process that calls one of them."""
