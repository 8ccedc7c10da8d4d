"""One module a mode of the command line, which is in `cli`."""
