"""What runs in a worker's process, from the fork to the application.

Nothing here may be imported by the application but what `steer` makes public.
"""
