"""A run on more or fewer ranks than its configuration names, as after the loss of a node."""

from dataclasses import replace

from ringattn.errors import UserError
from ringattn.launch.config import Config


def fit_to_world(config: Config, world: int) -> Config:
    """The configuration for the number of ranks that a launcher started.

    With ``parallel.elastic``, dp follows it, then cp where dp alone cannot; ``train.accumulate``
    follows dp, so that a step reads the same packs and its loss stays what it was.

    Raises:
        UserError: the run is not elastic, or no dp and cp fit. On every rank alike.
    """
    dp, cp = config.parallel.dp, config.parallel.cp
    if dp * cp == world:
        return config
    if not config.parallel.elastic:
        raise _refusal(config, world)
    packs = config.packs_per_step
    fitting = [c for c in range(1, world + 1) if world % c == 0 and packs % (world // c) == 0]
    if not fitting:
        raise UserError(
            f"parallel.elastic=true on {world} ranks",
            f"no dp divides both {world} and the {packs} packs of a step (dp × train.accumulate)",
            "set train.accumulate so that dp × accumulate has more divisors, such as 12",
        )
    # The same cp keeps every plan; else the next smaller one, whose ranks hold more.
    chosen = min(fitting, key=lambda c: (c != cp, c > cp, abs(c - cp)))
    parallel = replace(config.parallel, cp=chosen, dp=world // chosen)
    least = parallel.min_cp
    if least is not None and chosen % least:
        parallel = replace(parallel, min_cp=None)
    train = replace(config.train, accumulate=packs // parallel.dp)
    return replace(config, parallel=parallel, train=train)


def describe_fit(config: Config, fitted: Config) -> str:
    """What `fit_to_world` changed, in one line; "" for nothing."""
    before = {"dp": config.parallel.dp, "cp": config.parallel.cp}
    after = {"dp": fitted.parallel.dp, "cp": fitted.parallel.cp}
    before["accumulate"], after["accumulate"] = config.train.accumulate, fitted.train.accumulate
    changed = [
        f"{key} {before[key]} -> {after[key]}" for key in before if before[key] != after[key]
    ]
    if not changed:
        return ""
    return f"{fitted.world} ranks in place of {config.world}: {', '.join(changed)}"


def _refusal(config: Config, world: int) -> UserError:
    dp, cp = config.parallel.dp, config.parallel.cp
    if world % cp:
        return UserError(
            f"parallel.cp={cp}",
            f"must divide the launcher's world size {world}",
            f"set parallel.cp to a divisor of {world}, start {dp * cp} ranks, or set "
            "parallel.elastic=true",
        )
    return UserError(
        f"parallel.dp={dp}",
        f"dp × cp = {dp * cp} must equal the launcher's world size {world}",
        f"set parallel.dp={world // cp}, start {dp * cp} ranks, or set parallel.elastic=true",
    )
