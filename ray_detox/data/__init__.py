"""Files to prompts, and prompts to the shards that workers hold. No Ray."""
