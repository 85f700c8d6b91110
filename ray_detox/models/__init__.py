"""The models of a run, on transformers and peft: policy, classifier, and where they come from."""
