"""Results in a browser: a read-only API over a store, the page, and a standalone report of a run."""
