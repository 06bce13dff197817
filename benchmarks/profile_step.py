"""What one decode step consists of: kernels on a GPU, operators on a CPU, and their time.

Runs in the engine's process, since it drives the engine step by step.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_steer.verify.engine_calls import ExtraArgs, greedy

WARM_UP_STEPS = 3
LISTED = 40


def profile_decode(
    llm: Any, prompts: list[list[int]], extra: list[ExtraArgs], steps: int
) -> dict[str, Any]:
    """Profiles decode steps of a batch that decodes together.

    Args:
        llm: The engine, idle.
        prompts: Token ids of each prompt.
        extra: ``SamplingParams.extra_args`` of each.
        steps: Steps to profile.

    Returns:
        ``kernels``: how many ran on the device a step; ``device_us``: their time; ``operators``
        and ``host_us``: the same for operators on the host, compiled kernels among them;
        ``by_name``: count and time of each a step, most time first.
    """
    import torch

    engine = llm.llm_engine
    # One token comes of the prefill, and a step may be in flight when the profile ends.
    count = steps + WARM_UP_STEPS + 4
    for number, (prompt, arguments) in enumerate(zip(prompts, extra, strict=True)):
        params = greedy(count, arguments)
        engine.add_request(f"profile-{number}", {"prompt_token_ids": prompt}, params)
    started: set[str] = set()
    while len(started) < len(prompts):
        started |= {output.request_id for output in engine.step()}
    for _ in range(WARM_UP_STEPS):
        engine.step()
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            engine.step()
        if cuda:
            torch.cuda.synchronize()
    engine.abort_request([f"profile-{number}" for number in range(len(prompts))])
    while engine.has_unfinished_requests():
        engine.step()
    return _summary(profile, steps)


def _summary(profile: Any, steps: int) -> dict[str, Any]:
    from torch.autograd import DeviceType

    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    times: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for event in profile.events():
        on_device = event.device_type == DeviceType.CUDA
        counts[on_device][event.name] += 1
        times[on_device][event.name] += (
            event.self_device_time_total if on_device else event.self_cpu_time_total
        )
    listed = counts[True] or counts[False]
    spent = times[bool(counts[True])]
    return {
        "steps": steps,
        "kernels": counts[True].total() / steps,
        "device_us": times[True].total() / steps,
        "operators": counts[False].total() / steps,
        "host_us": times[False].total() / steps,
        "by_name": {
            name: {"count": listed[name] / steps, "us": round(time / steps, 2)}
            for name, time in spent.most_common(LISTED)
        },
    }
