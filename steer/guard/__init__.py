"""The guard process: it keeps descriptors for the next controller, and stands in while there is no
controller."""
