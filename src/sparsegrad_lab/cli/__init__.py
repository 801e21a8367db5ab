"""The `sparsegrad` command: one file for each verb, which calls the library with what was typed."""
