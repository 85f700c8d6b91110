"""Python imports this module at the start of every process whose PYTHONPATH has this folder.

The garbage collector would look at every object again and again while torch, transformers and peft
are imported, and find nothing: with its usual thresholds that is a sixth of all CPU time of the tests.
"""

import gc
import importlib
import os
import sys

gc.set_threshold(100_000, 50, 1000)
if (
    "TESTS_TEMPLATE" in os.environ
    and sys.orig_argv[1:2]
    and (sys.orig_argv[1].endswith(("/default_worker.py", "/setup_worker.py")))
):
    importlib.import_module("template").hand_over()
