"""The reward service on Ray: actors, the pool that owns them, and the workers' client."""
