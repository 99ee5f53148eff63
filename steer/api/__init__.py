"""The Python API: what `import steer` makes public.

It checks arguments, and calls the same functions as the commands.
"""
