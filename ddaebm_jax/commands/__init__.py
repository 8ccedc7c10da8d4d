"""One module a mode of launch/main.py."""
