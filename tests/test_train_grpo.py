"""examples/train_grpo.py: a tiny model, taught here to do one of three things, through TRL's own loop."""

import importlib.util
import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import TINY
from episodes import FAST, TIER, share
from fakes import LOST, FakeBackend
from processes import left_after, of_this_process
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import chat_template_utils

from nanogpt_env import Speedrun
from nanogpt_env.ledger import read_ledger

# TRL says that the hook is experimental, and calls what transformers has renamed; there may be no GPU to pin memory for
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'environment_factory':UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_grpo.py"
SPEC = importlib.util.spec_from_file_location("train_grpo", EXAMPLE)
train_grpo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train_grpo)

# what `main` makes of its defaults
BUDGET = {"runs": 4, "submissions": 2, "wall_seconds": 8 * TIER.table.budget.wall_seconds}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


GOOD = [
    call("edit_file", path="optimizer.py", old="lr=0.004", new="lr=0.008"),
    call("run", horizon=60),
    call("submit", claim=60, horizon=60),
]
CLUMSY = [call("run", horizon="many"), call("jump", height=2)]
IDLE = []
MALFORMED = [("malformed", "ActionError")]
SHARES = torch.tensor([0.5, 0.25, 0.25])


# --- the model ---


def conversation(tools, calls):
    """What is said when a model makes these calls and then is done."""
    said = [{"role": "user", "content": tools.reset()}]
    for made in calls:
        name, arguments = made["function"].values()
        unknown = str({"error": f"Tool {name} not found."})
        answer = getattr(tools, name)(**arguments) if hasattr(tools, name) else unknown
        said.append({"role": "assistant", "content": "", "tool_calls": [made]})
        said.append({"role": "tool", "name": name, "content": answer})
    return [*said, {"role": "assistant", "content": "done"}]


def new_tokenizer(texts=()):
    """One that has learned whole lines of these texts, so that a rollout is some dozens of tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    line = pre_tokenizers.Split("\n", "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [line, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, show_progress=False, initial_alphabet=alphabet, special_tokens=SPECIAL
    )
    inner.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_tokens(MARKS)
    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    made.chat_template = (folder / "qwen3_instruct_2507.jinja").read_text()
    return made


class Taught:
    """A model that does one of three things, with probabilities of `SHARES`, in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        tools = train_grpo.SpeedrunTools(make_env(folder / "episodes")(), 4000)
        schemas = [tools.edit_file, tools.read_file, tools.run, tools.submit, tools.write_file]
        said = [conversation(tools, calls) for calls in (GOOD, CLUMSY, IDLE)]
        tools.env.close()
        texts = [new_tokenizer().apply_chat_template(s, tools=schemas, tokenize=False) for s in said]
        parts = [part for text in texts for part in re.split("|".join(map(re.escape, SPECIAL + MARKS)), text)]
        self.tokenizer = new_tokenizer(parts)
        template = chat_template_utils.get_training_chat_template(self.tokenizer)
        encoded = self.tokenizer.apply_chat_template(
            said, tools=schemas, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, own = (encoded[key] for key in ("input_ids", "assistant_masks"))
        longest = max(map(len, ids))
        self.tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
        self.own = torch.tensor([[*row, *[0] * (longest - len(row))] for row in own])
        self.teach()

    def teach(self):
        torch.manual_seed(0)
        ids = {f"{name}_token_id": getattr(self.tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
        config = Qwen3Config(vocab_size=len(self.tokenizer), initializer_range=0.1, **sizes, **heads, **ids)
        model = Qwen3ForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
        least = -(SHARES * SHARES.log()).sum()
        for _ in range(500):
            loss = -(SHARES * self.log_probabilities(model)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < least + 0.02:
                break
        else:
            raise AssertionError(f"not taught: {loss} instead of {least}")
        model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)

    def log_probabilities(self, model):
        """Of all that the model says in each of the conversations."""
        found = model(self.tokens).logits[:, :-1].log_softmax(-1).gather(2, self.tokens[:, 1:, None])[:, :, 0]
        return (found * self.own[:, 1:]).sum(1)

    @torch.no_grad()
    def probabilities(self, folder):
        return self.log_probabilities(Qwen3ForCausalLM.from_pretrained(folder)).exp().tolist()


def make_env(folder, script=lambda job, number: 4.5, made=None):
    """Makes environments on tiny-steps, whose backends go to `made`."""

    def make():
        backend = FakeBackend(script)
        if made is not None:
            made.append(backend)
        return Speedrun(TINY, backend=backend, budget=BUDGET, state_dir=folder)

    return make


def options(taught, output, *more):
    fixed = ["--generations", "8", "--tokens", "256", "--learning-rate", "3e-4", "--output", str(output)]
    return ["--model", str(taught.folder), *fixed, *more]


def train(taught, output, *more, script=lambda job, number: 4.5):
    """Train as the example does, with scripted backends: what they were, and the curve."""
    made = []
    args = train_grpo.options(options(taught, output, *more))
    try:
        train_grpo.train(args, make_env(output / "episodes", script, made))
    finally:
        assert [backend.closed for backend in made] == [1] * 8
    return made, curve(output)


def curve(output):
    return [json.loads(line) for line in (output / "curve.jsonl").read_text().splitlines()]


def ledger(rollout):
    return read_ledger(Path(rollout["ledger"]))[0]


def of_kind(rollout, kind):
    return [line for line in ledger(rollout) if line["kind"] == kind]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return Taught(tmp_path_factory.mktemp("taught"))


# --- training ---


def test_the_model_learns_to_do_what_is_rewarded(taught, tmp_path):
    before = taught.probabilities(taught.folder)
    assert before == pytest.approx(SHARES.tolist(), abs=0.1)
    made, steps = train(taught, tmp_path, "--steps", "4")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    rollouts = [rollout for step in steps for rollout in step["rollouts"]]
    assert len({rollout["ledger"] for rollout in rollouts}) == len(rollouts) == 32

    for step in steps:
        rewards = [rollout["reward"] for rollout in step["rollouts"]]
        assert step["reward"] == pytest.approx(sum(rewards) / 8)
    for rollout in rollouts:
        assert rollout["reward"] == pytest.approx(sum(line["reward"] for line in of_kind(rollout, "reward")))
    best = [r for r in rollouts if r["reward"] == pytest.approx(share(60))]
    for rollout in best:
        assert [line["type"] for line in of_kind(rollout, "action")] == ["edit_file", "run", "submit"]
        assert len(of_kind(rollout, "run")) == len(of_kind(rollout, "submit")) == 1
        assert of_kind(rollout, "verdict")[0]["accepted"] is True
    # what is no action is answered by the environment; what is no tool, by TRL
    refused = [r for r in rollouts if [(a["type"], a["error"]) for a in of_kind(r, "action")] == MALFORMED]
    idle = [r for r in rollouts if not of_kind(r, "action")]
    assert len(best) + len(refused) + len(idle) >= 24  # the model may stray
    assert best and refused and idle
    assert {r["reward"] for r in refused + idle} == {0}
    runs = [job for backend in made for job in backend.jobs if job.final_shards == ("val_public",)]
    assert len(runs) == sum(len(of_kind(r, "run")) for r in rollouts)

    after = taught.probabilities(tmp_path)
    assert after[0] > before[0] + 0.1
    assert sum(after[1:]) < sum(before[1:])


def test_a_training_goes_on_from_its_checkpoint(taught, tmp_path):
    _, first = train(taught, tmp_path, "--steps", "2", "--save-every", "1")
    with pytest.raises(SystemExit):  # it would be overwritten
        train_grpo.options(options(taught, tmp_path))
    shutil.rmtree(tmp_path / "checkpoint-2")
    _, steps = train(taught, tmp_path, "--steps", "3", "--resume")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert steps[0] == first[0] and steps[1] != first[1]


def test_a_failure_of_ours_teaches_nothing(taught, tmp_path):
    _, (step,) = train(taught, tmp_path, "--steps", "1", script=lambda job, number: LOST)
    rewards = [rollout["reward"] for rollout in step["rollouts"]]
    assert None in rewards and set(rewards) <= {None, 0.0}
    for rollout in step["rollouts"]:
        failed = "BackendError" in {line["error"] for line in of_kind(rollout, "action")}
        assert failed == (rollout["reward"] is None)
        assert not of_kind(rollout, "submit")  # it ended there
    old, new = (Qwen3ForCausalLM.from_pretrained(folder).state_dict() for folder in (taught.folder, tmp_path))
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_closes_the_environments(taught, tmp_path, monkeypatch, number):
    made = []

    def speedrun(tier, **given):
        made.append(FakeBackend(lambda job, start: signal.raise_signal(number)))
        return Speedrun(tier, backend=made[-1], **given)

    monkeypatch.setattr(train_grpo, "Speedrun", speedrun)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *options(taught, tmp_path, "--tier", str(TINY), "--steps", "2")])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="interrupted; nothing is left running"):
            train_grpo.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert [backend.closed for backend in made] == [1] * 8
    ledgers = [read_ledger(path)[0] for path in (tmp_path / "episodes").glob("*/ledger.jsonl")]
    assert [lines[-1]["kind"] for lines in ledgers] == ["end"] * 8


# --- tools ---


def far(job, number):
    """The script of a program that never reaches the target."""
    return 9.0


@pytest.fixture
def tools(tmp_path):
    """Makes the tools of an environment with this script, an episode begun."""
    made = []

    def make(script=lambda job, number: 4.5, characters=4000):
        made.append(train_grpo.SpeedrunTools(make_env(tmp_path, script)(), characters))
        made[-1].reset()
        return made[-1]

    yield make
    for each in made:
        each.env.close()


def test_what_the_model_is_told_is_the_same_in_all_of_a_group(tools):
    one = tools()
    told = one.reset(prompt=[])
    assert told.startswith(one.env.tier.task) and "runs: 0 of 4" in told
    assert {one.reset() for _ in range(3)} == {told}


def test_a_long_result_is_cut_and_says_so(tools):
    one = tools(characters=50)
    assert one.read_file("optimizer.py").endswith("\n[cut after 50 of 181 characters]")
    assert one.read_file() == "notes.md\noptimizer.py\ntask.md"


def test_after_its_end_an_episode_only_says_so(tools):
    one = tools(far)
    for claim in (60, 61):
        assert one.get_reward() == 0
        one.submit(claim=claim, horizon=200)
    assert one.env.episode.over
    assert {one.run(60), one.read_file(), one.write_file("a", "b"), one.submit()} == {train_grpo.OVER}
    one.reset()
    assert "60 of 60 steps" in one.run(60)


@pytest.mark.parametrize(
    "value", [None, "", "\ud800", "a\0b", 7, -1, 10**30, 1.5, math.nan, True, [], {"a": [None]}, "x" * 10**6]
)
def test_whatever_a_model_sends_is_answered(tools, value):
    one = tools(far)
    calls = [(one.read_file, 1), (one.write_file, 2), (one.edit_file, 3), (one.run, 1), (one.submit, 2)]
    for call, arguments in calls:
        text = call(*[value] * arguments)
        assert text and len(text.encode()) < 5000
    assert one.get_reward() == 0


def test_only_failures_of_ours_leave_a_rollout_without_a_reward(tools):
    one = tools(lambda job, number: LOST if job.final_shards == ("val_hidden",) else 4.5)
    one.edit_file("optimizer.py", "lr=0.004", "lr=0.008")
    one.submit(claim=60, horizon=60)
    assert one.get_reward() is None
    assert one.run(60) == train_grpo.OVER
    one.reset()
    assert one.get_reward() == 0
    one.write_file("optimizer.py", "import os\n")
    assert "refuses" in one.run(60)
    assert one.get_reward() == 0


def test_what_the_environment_raises_is_a_failure_of_ours(tools, monkeypatch):
    one = tools()
    monkeypatch.setattr(one.env.episode.ledger, "append", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # of which TRL makes an observation
        one.read_file()
    assert one.get_reward() is None
    assert one.read_file() == train_grpo.OVER
    monkeypatch.undo()


def test_a_rollout_that_trains_for_real(tmp_path):
    before = of_this_process()
    one = train_grpo.SpeedrunTools(Speedrun(TINY, budget=BUDGET, state_dir=tmp_path), 4000)
    one.reset()
    one.write_file("optimizer.py", FAST)
    assert "completed" in one.run(70)
    assert one.get_reward() == 0
    assert "accepted" in one.submit(claim=70, horizon=70)  # so far beyond the record's 52 that few reruns tell
    assert one.get_reward() == pytest.approx(share(70))
    started = of_this_process() - before
    one.env.close()
    assert left_after(started, 10) == []
