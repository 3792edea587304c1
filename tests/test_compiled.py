"""A process that compiles before the one that is timed: what passes between them, and what does not."""

import pytest
from test_timed import HONEST, job_of

from nanogpt_env.backends.local import LocalBackend
from nanogpt_env.tables import WallclockLimits
from nanogpt_env.tiers import load_tier

HANDS_ON = """
import os, pathlib, tempfile, torch
cache = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
beside = pathlib.Path(tempfile.gettempdir()) / "beside"
print("found", sorted(p.name for p in cache.glob("*/*")), beside.exists(), torch.initial_seed())
(cache / "made").mkdir(parents=True, exist_ok=True)
(cache / "made" / f"{len(list(cache.glob('*/*')))}").write_text("compiled")
beside.write_text("more than was compiled")
"""


def run(backend, tier, source, compile_s=20.0, cache_bytes=1 << 20, **changes):
    job = job_of(tier, source, **changes)
    return backend.start(job.model_copy(update={"compile_s": compile_s, "cache_bytes": cache_bytes})).result(120)


@pytest.fixture(scope="module")
def tiny(request):
    return load_tier(request.path.parent / "tiny-wallclock")


@pytest.mark.parametrize("warm", [False, True])
def test_the_timed_process_has_the_cache_and_nothing_else(tiny, warm):
    backend = LocalBackend("bubblewrap", warm=warm)
    result = run(backend, tiny, HANDS_ON + HONEST)
    backend.close()
    assert result.completed, result.detail + result.log
    first, second = (line for line in result.log.splitlines() if line.startswith("found"))
    assert first.startswith("found [] False")
    assert second.startswith("found ['0'] False")
    assert first.split()[-1] != second.split()[-1]  # the seeds
    assert result.log.count("steps, loss") == 1
    assert result.tokens == job_of(tiny, "").tokens
    assert result.sandbox.trusted


@pytest.mark.parametrize(
    ("source", "changes", "reason", "told"),
    [
        ("while True: pass", {"compile_s": 3.0}, "candidate_stalled", "did not answer within 2.9"),
        (HONEST.replace("speedrun.start()", ""), {"compile_s": 3.0}, "candidate_stalled", " within "),
        ("import speedrun\nspeedrun.save({})", {}, "candidate_protocol", "unexpected request"),
        (HANDS_ON.replace('"compiled"', '"x" * (1 << 20)') + HONEST, {}, "candidate_error", "bytes to hand over"),
        ("1 / 0", {}, "candidate_error", "ZeroDivisionError"),
        # what it says of the size is not believed
        (
            "import host, speedrun\nhost.send(speedrun._control, host.START, 1 << 30)\nspeedrun._receive()",
            {}, "candidate_protocol", "bytes in room for",
        ),
        # an archive that would write elsewhere fails in the sandbox that unpacks it
        (
            "import io, tarfile, speedrun\nf = io.BytesIO(); t = tarfile.open(fileobj=f, mode='w')\n"
            "i = tarfile.TarInfo('../../trainer/x'); t.addfile(i); t.close(); speedrun._packed = f.getvalue\n" + HONEST,
            {}, "candidate_error", "OutsideDestinationError",
        ),
    ],
)  # fmt: skip
def test_faults_of_either_process_are_refused(backend, tiny, source, changes, reason, told):
    result = run(backend, tiny, source, **changes)
    assert result.exit_reason == reason, result.log
    assert told in result.detail + result.log


def test_torch_compile_finds_what_it_compiled(tiny):
    """In the plain sandbox, which alone lets a compiler be started on a CPU."""
    # no precompiled headers: they are larger than a file may be here
    made = "torch._inductor.config.cpp_cache_precompile_headers = False\ntrain = torch.compile(model)\n"
    source = (
        HONEST.replace("for (x, y), _ in", f"import torch._inductor.config\n{made}for (x, y), _ in").replace(
            "    model(x, y).backward()\noptimizer", "    train(x, y).backward()\noptimizer"
        )
        + "\n"
    )
    source = source.replace(
        "speedrun.start()",
        "import torch._dynamo.utils\ncounts = torch._dynamo.utils.counters['inductor']\n"
        "print('hits', counts['fxgraph_cache_hit'], 'misses', counts['fxgraph_cache_miss'])\nspeedrun.start()",
    )
    limits = dict.fromkeys(("setup_s", "setup_cpu_s", "deadline_s"), 300.0)
    backend = LocalBackend("plain")
    result = run(backend, tiny, source, compile_s=300.0, cache_bytes=64 << 20, **limits)
    backend.close()
    assert result.completed, result.detail + result.log
    first, second = (line for line in result.log.splitlines() if line.startswith("hits"))
    assert first.startswith("hits 0 ")
    assert second.endswith(" misses 0")
    assert second != "hits 0 misses 0"


def test_a_tier_says_both_or_none():
    fields = load_tier("nano-wallclock").table.limits.model_dump()
    with pytest.raises(ValueError, match="both positive"):
        WallclockLimits(**fields | {"compile_s": 10})
