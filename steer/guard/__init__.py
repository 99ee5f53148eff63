"""The process that keeps descriptors for the next controller, and stands in while there is none."""
