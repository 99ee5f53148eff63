"""The commands: they parse arguments, send requests and print answers. They decide nothing.

Each command imports what it needs when it runs, as importing takes most of the time to start.
"""
