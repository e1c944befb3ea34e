"""Stands in for IPython, of which SGLang wants `IPython.display` at import and nothing in a server."""
