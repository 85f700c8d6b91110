"""Train the two small models of the package from scratch.

python scripts/build_lab.py                            replace the shipped models
python scripts/build_lab.py --smoke --out /tmp/lab     run every part once, in less than a minute
"""

import argparse
import logging
import resource
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ray_detox import lab
from ray_detox.lab.build import SMOKE, Effort, build


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the models of the embedded default.")
    parser.add_argument("--out", type=Path, default=lab.MODELS, help="folder for t5/ and roberta/")
    parser.add_argument("--sft-steps", type=int, help="batches to train the T5 on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="only run every part once")
    parser.add_argument(
        "--threads", type=int, default=1, help="other numbers change the weights slightly"
    )
    arguments = parser.parse_args()

    effort = SMOKE if arguments.smoke else Effort()
    if arguments.sft_steps is not None:
        effort = replace(effort, summariser_steps=arguments.sft_steps)
    if arguments.smoke and arguments.out == lab.MODELS:
        parser.error("--smoke would replace the shipped models; pass another --out.")

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    metrics = build(arguments.out, effort, arguments.seed)

    usage = resource.getrusage(resource.RUSAGE_SELF)
    metrics["CPU seconds"] = usage.ru_utime + usage.ru_stime
    for name, value in metrics.items():
        print(f"{name:58} {value:9.3f}")


if __name__ == "__main__":
    main()
