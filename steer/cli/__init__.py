"""The commands: they parse, ask and print, and decide nothing.

Each command imports what it needs when it runs, as the time to start is measured.
"""
