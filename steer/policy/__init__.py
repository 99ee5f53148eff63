"""The list of policies, and their declarations, layouts, classic programs and objects. Pure."""
