"""Serving: ``engine`` replies to many at once, ``api`` speaks OpenAI's HTTP, ``web/`` is the chat page.

``protocol`` is what they agree on.
"""
