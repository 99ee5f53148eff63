"""Looks at workers and their groups from outside, and repairs what it finds.

A look is bounded: whatever a worker does, the loop goes on.
"""
