"""The `sparsegrad` command.

main        the parser of all verbs
completion  completion in a shell

Each other file is one verb: it parses the command line and calls the library.
"""
