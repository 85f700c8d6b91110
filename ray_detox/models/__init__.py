"""The models of a run, on transformers and peft: policy, classifier and model sources."""
