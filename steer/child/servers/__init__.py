"""Servers that serve an ASGI or WSGI application in steer's own workers, by their public APIs.

An adapter is one file here, and a row in `adapters`. Nothing here is imported by the controller.
"""
