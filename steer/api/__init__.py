"""The Python API: what `import steer` makes public.

Thin: it checks arguments and calls what the commands call.
"""
