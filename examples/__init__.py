"""Examples: whole programs that use slora, each a folder with `python -m examples.NAME`."""
