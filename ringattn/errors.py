"""Errors that a person reads: one line with the value, the rule it breaks and the fix."""


class UserError(ValueError):
    """A mistake in what the user asked for. The command line prints its one line and exits 2.

    Args:
        what: the offending thing with its value, e.g. ``"parallel.cp=3"``.
        rule: the rule it breaks, e.g. ``"must divide the world size 4"``.
        fix: what to do, e.g. ``"set parallel.cp to 1, 2 or 4"``.
    """

    def __init__(self, what: str, rule: str, fix: str) -> None:
        super().__init__(f"{what}: {rule}; {fix}")
        self.what, self.rule, self.fix = what, rule, fix


class CommunicationError(RuntimeError):
    """A send or receive failed or timed out. The message names rank, step and move."""


class PlanError(RuntimeError):
    """A plan breaks its own rules, or ranks hold different plans."""


def brief(value: object) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
