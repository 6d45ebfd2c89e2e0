"""One run: a small model trained on one task, and how often it answers right at each length."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longhaul.launcher.config import OptimizerConfig
from longhaul.launcher.optimizer import learning_rate, make_optimizer, set_learning_rate, undecayed_names
from longhaul.models.config import ModelConfig
from longhaul.models.lm import LanguageModel
from longhaul.models.ops.segments import Documents
from longhaul.models.sequence import WholeSequence
from longhaul.models.state import tensor_bytes

from .tasks import NONE, TASKS, Sample, Task

TEST_SEED, VALIDATION_SEED = 2**31, 2**31 + 1  # no seed of training
TEST_TOKENS = 8192  # of a stream of test documents
SOLVED = 0.999  # of the validation set, which ends a run


@dataclass(frozen=True)
class Run:
    """What is trained: equal runs give equal outcomes on one machine."""

    task: str
    model: str
    """Its name in the table."""
    config: dict[str, Any] = field(hash=False)
    """Keys of `ModelConfig`; its vocabulary is the task's."""
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """Accuracies are shares of the questions answered right, from 0 to 1."""

    accuracy: dict[int, float]
    """On test documents of each length."""
    validation: float
    """On other documents, of the longest training length: by it the learning rate is chosen."""
    loss: float
    """Of the last step, nats a question."""
    steps: int
    """Taken: a run ends early once it answers everything right."""
    parameters: int
    state_bytes: int
    """What a layer stack carries from token to token in fp32, without the convolution's last inputs."""
    seconds: float
    """CPU time of training and tests."""


def pack(sample: Sample) -> tuple[Tensor, Tensor, WholeSequence]:
    """Documents of one length side by side in a stream: tokens and answers [B T], and the shard."""
    tokens, answers = (torch.from_numpy(part.astype(np.int64)).flatten() for part in sample)
    documents, length = sample[0].shape
    return tokens, answers, WholeSequence(Documents(range(0, documents * length + 1, length)))


def build(config: dict[str, Any], vocab_size: int) -> LanguageModel:
    """A model from plain keys; a mixer's options are a dictionary of their own."""
    fields: dict[str, Any] = ModelConfig.__dataclass_fields__
    options = {
        key: fields[key].default_factory(**value) if isinstance(value, dict) else value for key, value in config.items()
    }
    return LanguageModel(ModelConfig(vocab_size=vocab_size, **options))


@torch.no_grad()
def accuracy(model: LanguageModel, task: Task, seed: int, length: int) -> float:
    """The share of the judged questions of test documents, the same for every model, that are answered right."""
    random = np.random.default_rng(seed)
    left = max(task.test_documents, TEST_TOKENS // length)
    right = asked = 0
    model.eval()
    while left:
        documents = min(left, max(1, TEST_TOKENS // length))
        tokens, answers, shard = pack(task.sample(random, documents, length))
        judged = (answers != NONE) & (shard.positions >= task.judged_from(length))
        hidden: Tensor = model(tokens, shard)[0]
        right += int((model.logits(hidden[judged]).argmax(-1) == answers[judged]).sum())
        asked += int(judged.sum())
        left -= documents
    model.train()
    return right / asked


@torch.no_grad()
def state_bytes(model: LanguageModel, length: int) -> int:
    """Of the state after one document of `length` tokens."""
    shard = WholeSequence(Documents((0, length)), keep_state=True)
    _, state = model(torch.zeros(length, dtype=torch.int64), shard)
    return tensor_bytes([value for layer in state for name, value in layer._asdict().items() if name != "conv"])


class Lengths:
    """Of documents, step by step: any of the task's, or, where it `grows`, up to a limit and the limit itself half of the time.

    The limit starts two above the shortest and rises by 15 % after a step of such documents whose loss was below a quarter of a
    guess's. From `hold` of the steps on it also rises with them, to the longest at `done` of them: no model is spared it.
    """

    hold, done = 0.3, 0.7

    def __init__(self, task: Task, steps: int, random: np.random.Generator) -> None:
        self.task, self.steps, self.random = task, steps, random
        self.limit = float(task.train_lengths[0] + 2 if task.grows else task.train_lengths[-1])

    def draw(self, step: int) -> int:
        """Of step `step`, counted from 0."""
        first, last = self.task.train_lengths[0], self.task.train_lengths[-1]
        if not self.task.grows:
            return int(self.random.choice(self.task.train_lengths))
        due = first + (last - first) * min(1.0, (step / self.steps - self.hold) / (self.done - self.hold))
        self.limit = max(self.limit, due)
        return int(self.limit) if self.random.random() < 0.5 else int(self.random.integers(first, int(self.limit) + 1))

    def learn(self, length: int, loss: float) -> None:
        """Take a step's loss (nats) into account."""
        if self.task.grows and length == int(self.limit) and loss < -0.25 * math.log(self.task.chance):
            self.limit = min(1.15 * self.limit, float(self.task.train_lengths[-1]))


def train(run: Run) -> Outcome:
    """Train and test."""
    started = time.process_time()
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    random = np.random.default_rng(run.seed)
    model = build(run.config, task.vocab_size)
    optimizing = OptimizerConfig(lr=run.lr, min_lr=run.lr / 10, weight_decay=0.01, warmup_steps=max(1, run.steps // 20))
    optimizer = make_optimizer(model, optimizing, undecayed_names(model))
    longest = task.train_lengths[-1]
    found, step = 0.0, 0
    lengths = Lengths(task, run.steps, random)
    for step in range(1, run.steps + 1):
        length = lengths.draw(step - 1)
        tokens, answers, shard = pack(task.sample(random, max(1, task.tokens // length), length))
        out: Any = model(tokens, shard, labels=answers.clamp_min(0), weights=(answers != NONE).float())
        loss = out.loss_sum / out.weight_sum
        lengths.learn(length, loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizing.clip)
        set_learning_rate(optimizer, learning_rate(optimizing, step - 1, run.steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == run.steps:
            found = accuracy(model, task, VALIDATION_SEED, longest)
            if found >= SOLVED:
                break
    tests = {length: accuracy(model, task, TEST_SEED, length) for length in task.test_lengths}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.process_time() - started
    return Outcome(tests, found, loss.item(), step, parameters, state_bytes(model, longest), seconds)
