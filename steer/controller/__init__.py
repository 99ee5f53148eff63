"""The parent process: it carries out a plan, runs the loop and changes a running service.

Nothing here touches a connection.
"""
