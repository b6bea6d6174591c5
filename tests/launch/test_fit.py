"""``ringattn plan --fit``: its prediction, the longest sequence, its refusals; shipped recipes."""

import json
from dataclasses import replace
from typing import Any

import pytest

import ringattn as ra
from ringattn.benchmarks.recipe_comments import RECIPES, comment_of, path_of, stated
from ringattn.launch.config_load import config_from_values
from ringattn.launch.fit import FitModel
from ringattn.launch.job import build_context
from ringattn.launch.main import main
from ringattn.launch.model_config import model_config

PARTS = {"peak_bytes", "peak_at", "parts", "moments", "host_bytes", "usable_bytes", "longest"}
SMALL = {
    "parallel.cp": 4,
    "parallel.engine": "fsdp",
    "data.seq_len": 65_536,
    "train.dtype": "bf16",
    "attention.method": "ring",
    "attention.layout": "zigzag",
    "attention.cluster": "h100_sxm",
}


def fitted(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """JSON of ``ringattn plan ARGUMENTS --fit --json``."""
    assert main(["plan", *arguments, "--fit", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fit_model(**values: Any) -> FitModel:
    """For the 1B model on SMALL, with ``__`` for the dot in overrides."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    config = config_from_values({**SMALL, "model.size": "1b", **given})
    shape = model_config("1b")
    context = build_context(config, shape, config.parallel.cp)
    masks = [ra.masks.causal(config.data.seq_len)] * shape.layers
    return FitModel(config, shape, context.plans(masks))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"{key}={value}" for key, value in SMALL.items()]
    found = fitted(capsys, "debug", "data.path=/nowhere", "model.size=8b", *overrides)
    assert set(found) >= PARTS
    assert sum(found["parts"].values()) == pytest.approx(
        found["peak_bytes"], abs=len(found["parts"])
    )
    assert found["peak_bytes"] == max(found["moments"].values())
    assert found["moments"][found["peak_at"]] == found["peak_bytes"]
    seconds = dict(found["seconds"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert 0 < found["mfu"] < 1
    assert found["longest"] % found["unit"] == 0
    assert found["fits"] == (found["longest"] >= 65_536)
    modes = {(row["checkpointing"], row["token_tile"], row["offload"]) for row in found["others"]}
    assert len(modes) == len(found["others"]) == 13


@pytest.mark.parametrize(
    "values",
    [
        {"memory__checkpointing": "full", "memory__token_tile": 4096},
        {"memory__checkpointing": "attention", "memory__offload": True},
        {"parallel__engine": "ddp"},
    ],
    ids=["tiles", "offload", "ddp"],
)
def test_the_longest_fits_and_the_next_does_not(values: dict[str, Any]) -> None:
    model = fit_model(**values)
    settings = model.settings()
    longest = model.longest(settings)
    assert longest > 0
    assert longest % model.unit == 0
    assert model.fits(model.settings(longest))
    assert not model.fits(model.settings(longest + model.unit))


def test_other_settings_that_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"{key}={value}" for key, value in {**SMALL, "data.seq_len": 1 << 18}.items()]
    arguments = ["debug", "data.path=/nowhere", "model.size=8b", *overrides]
    assert main(["plan", *arguments, "--fit"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    (named,) = [line for line in out.splitlines() if line.startswith("fastest settings that fit")]
    settings = named.partition(": ")[2].split()
    assert fitted(capsys, *arguments, *settings)["fits"]


def test_time_follows_what_is_computed_again() -> None:
    model = fit_model(memory__checkpointing="full")
    settings = model.settings()
    seconds = {
        mode: model.seconds(replace(settings, checkpointing=mode))
        for mode in ("none", "attention", "sequence", "full")
    }
    totals = [part.total for part in seconds.values()]
    assert totals == sorted(totals)
    assert seconds["attention"].attention_again == 0
    assert seconds["full"].attention_again == seconds["full"].attention_forward
    assert 0 < seconds["sequence"].attention_again < seconds["full"].attention_again


def test_no_length_fits() -> None:
    model = fit_model()
    model.usable = 1e9
    assert model.longest(model.settings()) == 0
    assert not model.fit().fits


BAD = {
    "unknown cluster": (["--fit", "--cluster", "h1000"], "cluster=h1000"),
    "impossible memory": (["--fit", "memory.token_tile=0"], "memory.token_tile=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_end_with_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra, words = BAD[case]
    assert main(["plan", "debug", "data.path=/nowhere", *extra]) == 2
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("ringattn: ")]
    assert len(lines) == 1
    assert words in lines[0]


# The largest plan takes ten seconds.
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[pytest.mark.full] if r == "8b_4m_64gpu" else []) for r in RECIPES],
)
def test_recipes_state_what_the_command_prints(recipe: str) -> None:
    found = stated(path_of(recipe).read_text(encoding="utf-8"))
    assert found
    assert found == comment_of(recipe)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "8b_4m_64gpu"])
def test_recipes_fit(recipe: str) -> None:
    """Checked on the statement, which another test holds against the command."""
    text = path_of(recipe).read_text(encoding="utf-8")
    words = next(line for line in stated(text) if "usable per GPU" in line).split()
    assert float(words[1]) < float(words[4])
    longest = int(
        next(line for line in stated(text) if "longest" in line).split()[-2].replace(",", "")
    )
    seq_len = next(line for line in text.splitlines() if "seq_len" in line)
    assert longest >= int(seq_len.split(":")[1])
