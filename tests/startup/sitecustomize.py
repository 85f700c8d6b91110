"""Python imports this module at the start of every process whose PYTHONPATH has this folder.

The garbage collector would look at every object again and again while torch, transformers and peft
are imported, and find nothing: with its usual thresholds that is a sixth of all CPU time of the tests.
"""

import gc

gc.set_threshold(100_000, 50, 1000)
