"""The application: everything with a terminal or a workdir."""
