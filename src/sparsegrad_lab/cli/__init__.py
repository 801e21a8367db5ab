"""The `sparsegrad` command: one file per verb, which parses the command line and calls the library."""
