"""What a service is to be, and the plan for it. Pure: no I/O, tested in milliseconds."""
