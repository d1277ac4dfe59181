"""Serving: ``engine`` replies to many at once, ``api`` speaks OpenAI's HTTP, ``web/`` is a chat page. ``protocol``: what they agree on."""
