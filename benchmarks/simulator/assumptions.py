"""What a prediction takes for granted where a row names what no table knows."""

from ringattn.benchmarks.simulator import mask_names
from ringattn.benchmarks.simulator.records import Published
from ringattn.benchmarks.simulator.tables import entry_for, is_known


def assumptions(row: Published) -> tuple[str, ...]:
    """What stands for the row's unknown names and impossible counts, such as "hardware 'z900' as
    h100_sxm"; empty where all is known or left empty.

    A model counts where its name had to give a size, a way to checkpoint where there is a step.
    """
    found = []
    for column, table, name, key in (
        ("hardware", "hardware", row.hardware, "like"),
        ("model", "models", "" if row.sized else row.model, "like"),
        ("method", "methods", row.method, "family"),
        ("checkpointing", "checkpointing", row.checkpointing if row.shape else "", "mode"),
    ):
        if name and not is_known(table, name):
            found.append(f"{column} {name!r} as {entry_for(table, name)[key]}")
    if not mask_names.is_known(row.mask):
        found.append(f"mask {row.mask!r} as causal")
    if "gpus" in row.impossible:
        found.append(f"gpus taken as {row.gpus} (stated {row.impossible['gpus']!r})")
    return tuple(found)
