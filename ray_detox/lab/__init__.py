"""The embedded default: what a newcomer without network, account or GPU runs on.

    scenarios.py, sentences.py   what people in the corpus talk about, and how they talk (data)
    corpus.py                    turns that into dialogues and labelled texts (stdlib only)
    build.py                     trains the two models below from the corpus (torch)
    models/t5, models/roberta    what `scripts/build_lab.py` made of it

The models are small and know nothing but this corpus: they show that the pipeline works, and
say nothing about FLAN-T5 or about toxicity outside these templates.
"""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
T5 = MODELS / "t5"
"""An encoder-decoder in FLAN-T5's layout that summarises dialogues, often with an insult."""
ROBERTA = MODELS / "roberta"
"""A classifier of texts with the labels `nothate` and `hate`."""
