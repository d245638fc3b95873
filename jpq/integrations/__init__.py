"""Compression inside other libraries' trainers: a module for each, which needs the extra of its name.

`jpq.integrations.lightning`, `.transformers`, `.accelerate`; nothing imports them but the user.
"""
