"""One PPO step in one process: mathematics, rollout, update, loop and checkpoint. No Ray."""
