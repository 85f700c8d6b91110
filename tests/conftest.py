"""Fixtures: tiny random models in folders, loaded by the package's own code, and small batches.

The T5 has FLAN's layout (gated-gelu, untied head) and a vocabulary of words; its end-of-sequence
token is likely enough that responses differ in length. Its config sets a dropout rate, which must
have no effect. The RoBERTa tokenises bytes and has the labels `nothate` and `hate`.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import tests.startup.sitecustomize  # noqa: F401  for this process
from ray_detox import draws
from ray_detox.config import PolicyConfig, SamplingConfig
from ray_detox.data import prompts
from ray_detox.data.shards import pad_rows
from ray_detox.models.loading import load_policy
from ray_detox.models.policy import Policy
from ray_detox.records import PromptBatch, Rollout
from tests.environment import STARTUP
from tests.groups import (  # noqa: F401  pytest finds its hooks here
    pytest_collection_modifyitems,
    pytest_runtest_setup,
    pytest_xdist_make_scheduler,
)

# For the processes that tests start.
if str(STARTUP) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
# Under nohup, or in the background of a script, these are ignored; what tests start would inherit it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# The same examples in every run, and no deadline: a slow machine must not fail a test.
settings.register_profile("tests", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="session")
def no_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what commands note about this user out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u")]
MakePolicy = Callable[..., Policy]


def save_word_tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    """Save a tokenizer of words that ends each text with `</s>`, which is token 1."""
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_tiny_t5(folder: Path) -> None:
    """Save a random T5 with an untied head, and its tokenizer, with `save_pretrained`."""
    torch.manual_seed(0)
    tokens = ["<pad>", "</s>", "<unk>", *WORDS]
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokens),
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.3,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    head = 0.25 * torch.randn(len(tokens), 32)
    # This decoder's hidden states have a mean near zero, so a large row of the head makes
    # end-of-sequence likely in some contexts and unlikely in others.
    head[1] *= 3
    model.lm_head.weight = nn.Parameter(head)
    model.save_pretrained(folder, safe_serialization=True)

    save_word_tokenizer(folder, tokens)


def save_tiny_roberta(folder: Path, labels: tuple[str, ...] = ("nothate", "hate")) -> None:
    """Save a random RoBERTa classifier.

    The order of `labels` is the order of the outputs; a label's logit does not depend on it.
    """
    torch.manual_seed(1)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=len(tokens),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=514,
            type_vocab_size=1,
            initializer_range=0.2,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    )
    order = [sorted(labels, reverse=True).index(label) for label in labels]
    head = model.classifier.out_proj
    head.weight = nn.Parameter(head.weight.detach()[order])
    head.bias = nn.Parameter(0.3 * torch.arange(len(labels)).float()[order])
    model.save_pretrained(folder, safe_serialization=True)

    text = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    text.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny T5."""
    folder = tmp_path_factory.mktemp("models") / "t5"
    save_tiny_t5(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny RoBERTa."""
    folder = tmp_path_factory.mktemp("models") / "roberta"
    save_tiny_roberta(folder)
    return folder


@pytest.fixture(scope="session")
def make_roberta(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_roberta(labels, names=None)`: the same RoBERTa with another order or other names of outputs."""

    def make(labels: tuple[str, ...], names: dict[int, str] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("models") / "-".join(labels)
        save_tiny_roberta(folder, labels)
        if names is not None:
            settings = json.loads((folder / "config.json").read_text())
            settings["id2label"] = {str(index): name for index, name in names.items()}
            settings["label2id"] = {name: index for index, name in names.items()}
            (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer(tiny_t5: Path) -> Any:
    """The T5's tokenizer: words to ids, `</s>` at the end."""
    return AutoTokenizer.from_pretrained(tiny_t5)


def randomise_weights(policy: Policy, seed: int = 7, scale: float = 0.3) -> Policy:
    """Give adapter and value head random weights, so that neither is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * noise.to(parameter.device))
    return policy


@pytest.fixture(scope="session")
def make_policy(tiny_t5: Path) -> MakePolicy:
    """`make_policy(...)`: a policy on the tiny T5, loaded by `load_policy`.

    Keywords `sampling` and `policy` change settings, and `seed` sets the seed of new LoRA weights.
    Adapter and value head get random weights unless `randomised=False`. `critic` names the value head.
    """

    def make(
        sampling: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        seed: int = 0,
        randomised: bool = True,
        critic: Literal["none", "detached", "shared"] = "shared",
    ) -> Policy:
        settings: dict[str, Any] = {
            "model": str(tiny_t5),
            "dtype": "float32",
            "lora_rank": 4,
            "lora_alpha": 8,
        }
        sampling_settings: dict[str, Any] = {"max_new_tokens": 12}
        made = load_policy(
            PolicyConfig(**(settings | (policy or {}))),
            SamplingConfig(**(sampling_settings | (sampling or {}))),
            seed,
            critic=critic,
        )
        return randomise_weights(made) if randomised else made

    return make


def some_prompts(count: int, seed: int = 0, longest: int = 9) -> PromptBatch:
    """Return `count` different prompts of 2 to `longest` tokens, end-of-sequence included."""
    generator = torch.Generator().manual_seed(seed)
    rows, texts = [], []
    for index in range(count):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        ids = torch.randint(3, 3 + len(WORDS), (length,), generator=generator).tolist()
        texts.append(" ".join(WORDS[i - 3] for i in ids) + f" {index}")
        rows.append([*ids, 1])
    query_ids, query_mask = pad_rows(rows, pad_id=0)
    return PromptBatch(
        ids=[prompts.prompt_id(text) for text in texts],
        texts=texts,
        query_ids=query_ids,
        query_mask=query_mask,
        columns={"summary": [f"summary {index}" for index in range(count)]},
        occurrences=[0] * count,
    )


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., PromptBatch]:
    """`make_prompts(count, seed=0, longest=9)`: a batch of prompts."""
    return some_prompts


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    """`make_rollout(policy, count, seed=0)`: the policy's responses, with random scores."""

    def make(policy: Policy, count: int, seed: int = 0) -> Rollout:
        batch = some_prompts(count, seed)
        max_new_tokens, noise = draws.sampling_noise(batch.ids, policy.sampling, seed, step=0)
        generation = policy.sample(
            batch.query_ids,
            batch.query_mask,
            torch.from_numpy(max_new_tokens),
            torch.from_numpy(noise).float(),
        )
        return Rollout(
            tokens=generation.tokens,
            logprobs=generation.logprobs,
            ref_logprobs=policy.ref_logprobs(generation.tokens),
            values=generation.values,
            scores=torch.randn(count, generator=torch.Generator().manual_seed(seed)),
        )

    return make


@pytest.fixture(scope="session")
def two_workers() -> Callable[..., list[Any]]:
    """`two_workers(work)`: run `work(rank, sum_over_workers)` on two threads; return the results by rank.

    Load policies before the call and not in `work`: loading a model is not thread-safe.
    """

    def run(work: Callable[..., Any]) -> list[Any]:
        meet = threading.Barrier(2, timeout=60)
        given: list[torch.Tensor] = [torch.empty(0)] * 2
        results: list[Any] = [None, None]
        failures: list[BaseException] = []

        def worker(rank: int) -> None:
            def total(x: torch.Tensor) -> torch.Tensor:
                given[rank] = x.clone()
                meet.wait()
                summed = given[0] + given[1]
                meet.wait()
                return summed

            try:
                results[rank] = work(rank, total)
            except BaseException as failure:
                failures.append(failure)
                meet.abort()

        threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*words)`: run a command that must be refused, and return its sentence."""

    from ray_detox.cli import main as cli

    def run(*words: object) -> str:
        code = cli.main([*map(str, words)])
        printed = capsys.readouterr()
        assert code == cli.MISTAKE, printed
        assert printed.err.startswith("ray-detox: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return run
