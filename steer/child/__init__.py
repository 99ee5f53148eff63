"""What runs in a worker's process, from the fork to the application.

An application imports `steer`, and nothing of this package.
"""
