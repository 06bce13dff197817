"""Steerings that the engine tests share: every position choice, one and several directions."""

from __future__ import annotations

from typing import Any

SPIDERS, HEIGHTS, CHEERFUL, GLOOMY = (
    "fears/spiders",
    "fears/heights",
    "moods/cheerful",
    "moods/gloomy",
)

# Token ids of the demo model.
NEWLINE, FULL_STOP, COLON = 201, 16, 28

CASES: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "one direction": {"directions": [{"name": SPIDERS, "scale": 10.0}]},
    "prompt only": {"directions": [{"name": SPIDERS, "scale": 8.0, "positions": "prompt"}]},
    "generated only": {"directions": [{"name": CHEERFUL, "scale": 8.0}], "positions": "generated"},
    "two packs, two scales": {
        "directions": [{"name": HEIGHTS, "scale": 5.0}, {"name": GLOOMY, "scale": -3.0}]
    },
    "different positions": {
        "directions": [
            {"name": SPIDERS, "scale": 4.0, "positions": "prompt"},
            {"name": CHEERFUL, "scale": 6.0, "positions": "generated"},
            {"name": GLOOMY, "scale": 2.0},
        ]
    },
    "some layers": {"directions": [{"name": GLOOMY, "scale": 9.0, "layers": [1, 3]}]},
    "default scale": {"directions": [{"name": HEIGHTS}]},
    "last prompt token": {
        "directions": [{"name": SPIDERS, "scale": 12.0}],
        "positions": "last_prompt",
    },
    "from the prompt's end": {
        "directions": [{"name": GLOOMY, "scale": 7.0, "positions": [[-5, None]]}]
    },
    "ranges": {
        "directions": [
            {"name": SPIDERS, "scale": 9.0, "positions": [[2, 5], [-3, -1], [40, 44]]},
            {"name": HEIGHTS, "scale": 0.0},
        ]
    },
    "ranges that meet": {
        "directions": [
            {"name": CHEERFUL, "scale": 5.0, "positions": [[3, None]]},
            {"name": GLOOMY, "scale": 5.0, "positions": [[-30, 9]]},
        ]
    },
    "at delimiters": {
        "directions": [{"name": SPIDERS, "scale": 12.0}],
        "positions": {"tokens": [NEWLINE, FULL_STOP]},
    },
    "at delimiters of the prompt, beside others": {
        "directions": [
            {"name": GLOOMY, "scale": 12.0, "positions": {"tokens": [NEWLINE], "within": "prompt"}},
            {"name": CHEERFUL, "scale": 6.0, "positions": {"from_tokens": [COLON, 1603]}},
        ]
    },
    "from the first full stop of the answer on, beside all": {
        "directions": [
            {"name": HEIGHTS, "scale": 3.0},
            {
                "name": SPIDERS,
                "scale": 9.0,
                "positions": {"from_tokens": [FULL_STOP], "within": "generated"},
            },
        ]
    },
}

# Every form; those with a scale of their own are strong enough to change the text.
FORM_CASES: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "addition": {"directions": [{"name": SPIDERS, "scale": 10.0}]},
    "ablation": {"directions": [{"name": SPIDERS, "op": "ablate"}]},
    "reflection of the answer": {
        "directions": [{"name": CHEERFUL, "op": "ablate", "scale": 2.0}],
        "positions": "generated",
    },
    "two ablations": {
        "directions": [{"name": GLOOMY, "op": "ablate"}, {"name": HEIGHTS, "op": "ablate"}]
    },
    "clamp": {"directions": [{"name": HEIGHTS, "op": "clamp", "scale": 6.0}]},
    "clamp to zero of one layer": {
        "directions": [{"name": HEIGHTS, "op": "clamp", "scale": 0.0, "layers": [1]}]
    },
    "rotation": {
        "directions": [{"name": SPIDERS, "op": "rotate", "plane": CHEERFUL, "scale": 60.0}]
    },
    "rotation of the prompt": {
        "directions": [{"name": GLOOMY, "op": "rotate", "plane": HEIGHTS, "scale": -120.0}],
        "positions": "prompt",
    },
    "angle": {
        "directions": [{"name": GLOOMY, "op": "angle", "plane": SPIDERS, "scale": 30.0}],
        "positions": [[-4, None]],
    },
    "feedback": {
        "directions": [
            {"name": CHEERFUL, "op": "affine", "read": GLOOMY, "bias": -4.0, "scale": -0.8}
        ]
    },
    "addition where a probe fires": {
        "directions": [
            {"name": SPIDERS, "scale": 9.0, "gate": {"direction": HEIGHTS, "above": 0.0}}
        ]
    },
    "ablation where a probe fires": {
        "directions": [
            {"name": GLOOMY, "op": "ablate", "gate": {"direction": GLOOMY, "above": 0.2}}
        ]
    },
    "addition by a soft gate": {
        "directions": [
            {
                "name": SPIDERS,
                "scale": 9.0,
                "gate": {"direction": HEIGHTS, "above": 0.1, "slope": 3.0},
            }
        ]
    },
    "ablation by a soft gate beside a hard one": {
        "directions": [
            {
                "name": GLOOMY,
                "op": "ablate",
                "scale": 2.0,
                "gate": {"direction": CHEERFUL, "above": -0.2, "slope": 0.7},
            },
            {"name": SPIDERS, "scale": 6.0, "gate": {"direction": GLOOMY, "above": 0.0}},
        ]
    },
    "rotation by a soft gate": {
        "directions": [
            {
                "name": SPIDERS,
                "op": "rotate",
                "plane": CHEERFUL,
                "scale": 90.0,
                "gate": {"direction": SPIDERS, "above": 0.0, "slope": 2.0},
            }
        ]
    },
    "multiplication": {"directions": [{"name": SPIDERS, "op": "multiply", "scale": 2.0}]},
    "multiplication of the answer beside addition and ablation": {
        "directions": [
            {"name": CHEERFUL, "op": "multiply", "scale": -2.0, "positions": "generated"},
            {"name": HEIGHTS, "scale": 5.0},
            {"name": GLOOMY, "op": "ablate"},
        ]
    },
    "two multiplications of some layers": {
        "directions": [
            {"name": GLOOMY, "op": "multiply", "scale": 2.0, "layers": [1, 2]},
            {"name": HEIGHTS, "op": "multiply", "scale": 1.5, "layers": [2, 3]},
        ]
    },
    "multiplication by a soft gate and a ramp": {
        "directions": [
            {
                "name": SPIDERS,
                "op": "multiply",
                "scale": 2.5,
                "gate": {"direction": CHEERFUL, "above": 0.0, "slope": 1.5},
                "schedule": {"start": 0.2, "end": 1.0, "tokens": 8},
            },
            {"name": CHEERFUL, "scale": 4.0},
        ]
    },
    "multiplication where a probe fires that keeps the length": {
        "directions": [
            {
                "name": GLOOMY,
                "op": "multiply",
                "scale": 3.0,
                "gate": {"direction": SPIDERS, "above": 0.0},
                "restore_norm": True,
            }
        ]
    },
    "multiplication at delimiters beside addition from one on": {
        "directions": [
            {"name": SPIDERS, "op": "multiply", "scale": 3.0, "positions": {"tokens": [NEWLINE]}},
            {
                "name": GLOOMY,
                "scale": 7.0,
                "positions": {"from_tokens": [FULL_STOP], "within": "generated"},
                "schedule": {"start": 1.0, "end": 0.5, "tokens": 6},
            },
        ]
    },
    "addition that keeps the length": {
        "directions": [{"name": HEIGHTS, "scale": 14.0, "restore_norm": True}]
    },
    "ablation beside additions": {
        "directions": [
            {"name": SPIDERS, "op": "ablate", "positions": "prompt"},
            {"name": CHEERFUL, "scale": 5.0},
            {"name": GLOOMY, "scale": -2.0, "positions": "generated"},
        ]
    },
    "ramp": {
        "directions": [{"name": SPIDERS, "scale": 12.0}],
        "schedule": {"start": 0.0, "end": 1.0, "tokens": 10},
    },
    "decay of two": {
        "directions": [{"name": CHEERFUL, "scale": 9.0}, {"name": GLOOMY, "op": "ablate"}],
        "schedule": {"start": 1.0, "end": 0.2, "tokens": 6, "shape": "exponential"},
    },
    "schedules that meet": {
        "directions": [
            {"name": SPIDERS, "scale": 8.0, "schedule": {"start": 1.0, "end": 0.0, "tokens": 9}},
            {"name": CHEERFUL, "scale": 5.0},
            {
                "name": GLOOMY,
                "op": "ablate",
                "schedule": {"start": 0.0, "end": 1.0, "tokens": 4, "shape": "exponential"},
            },
        ]
    },
    "first tokens of the answer": {
        "directions": [{"name": GLOOMY, "scale": 9.0}],
        "positions": {"generated": [0, 7]},
    },
    "ramp after a constant prompt": {
        "directions": [
            {"name": HEIGHTS, "scale": 5.0, "positions": "prompt"},
            {
                "name": HEIGHTS,
                "scale": 9.0,
                "positions": "generated",
                "schedule": {"start": 1.0, "end": -1.0, "tokens": 12},
            },
        ]
    },
}
