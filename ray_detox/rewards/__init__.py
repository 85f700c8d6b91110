"""Rewards, and the rules by which reward actors serve them. No Ray."""
