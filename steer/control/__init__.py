"""How a service and those who ask it find and understand each other."""
