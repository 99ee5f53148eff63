"""Policies: their table, declarations, layouts, classic programs and objects. Pure."""
