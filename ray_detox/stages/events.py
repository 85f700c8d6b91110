"""Events that workers, tasks and the driver report during a run.

    WorkerStarted, StepDone, CheckpointTaken    from a training worker, through `Progress`
    GroupStarted, GroupLost                     from `run_training`, in the driver
    PromptsMeasured                             from an evaluation task, through `Progress`

Events are plain records that import neither Ray nor torch; receivers use `match` on them.
"""

from dataclasses import dataclass

from ray_detox.records import UpdateStats
from ray_detox.runs.checkpoint_store import Checkpoint


@dataclass(frozen=True, slots=True)
class GroupStarted:
    """The driver starts a group of training workers."""

    number: int
    """Number of groups of this run before this one."""
    workers: int
    step: int
    """Steps done; the group resumes from the checkpoint of this step."""


@dataclass(frozen=True, slots=True)
class GroupLost:
    """A group of training workers failed."""

    cause: str
    """The failure, in one line."""
    step: int
    """Step of the newest checkpoint."""


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A training worker has loaded its model and its prompts."""

    group: str
    rank: int
    node: str
    """Ray's id of the node."""
    pid: int
    device: str
    prompts: int
    """Prompts in the shards of this worker."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A PPO step is done; sent by rank 0."""

    group: str
    stats: UpdateStats


@dataclass(frozen=True, slots=True)
class CheckpointTaken:
    """A checkpoint for the driver to store; sent by rank 0."""

    group: str
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class PromptsMeasured:
    """An evaluation task has measured some more prompts."""

    prompts: int


WorkerEvent = WorkerStarted | StepDone | CheckpointTaken
"""Events of training workers. Each names its group, because Ray may deliver it after the group ended."""

TrainingEvent = GroupStarted | GroupLost | WorkerStarted | StepDone
"""Training events that the driver prints."""
