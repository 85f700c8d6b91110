"""Runs in a browser: an API over a store, a page, and the page with one run inside it."""
