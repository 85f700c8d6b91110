"""The embedded corpus and models: the default data, which need no network, account or GPU.

    scenarios.py, sentences.py   topics and phrases of the corpus (data)
    corpus.py                    generates dialogues and labelled texts from them (stdlib only)
    build.py                     trains the two models below on the corpus (torch)
    models/t5, models/roberta    the models, as `scripts/build_lab.py` built them

The models are small and were trained on nothing but this corpus: they show that the pipeline
works, and say nothing about FLAN-T5 or about toxicity outside these templates.
"""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
T5 = MODELS / "t5"
"""An encoder-decoder in FLAN-T5's layout; it summarises dialogues, often with an insult."""
ROBERTA = MODELS / "roberta"
"""A text classifier with the labels `nothate` and `hate`."""
