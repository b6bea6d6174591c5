"""A chain of operations played forward and backward on a ledger, as autograd would run it.

Sizes are all that it knows: which tensors an operation reads and makes, what its backward needs,
and its scratch. Lifetimes follow from that. A tensor goes when its last reader is done and no
backward needs it; a gradient goes when the operation that made its tensor has been differentiated;
what a backward needs goes once that backward has run.
"""

from collections import Counter
from dataclasses import dataclass, field

from ringattn.cost.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Op:
    """One differentiable operation; sizes in bytes.

    Attributes:
        takes: tensors that it reads and that get gradients.
        makes: the tensor that it makes, and its size.
        keeps: tensors among `takes` and `makes` that its backward reads.
        saves: what its backward needs beside those.
        holds: tensors that the caller still refers to while it runs.
        work, back_work: scratch of forward and backward, beyond operands and results.
        shares: its backward hands the gradient that it gets to every operand, and allocates none
            (a sum); operands in `casts` get a copy of their own.
        casts: see `shares`.
    """

    takes: tuple[str, ...]
    makes: tuple[str, float]
    keeps: tuple[str, ...] = ()
    saves: float = 0.0
    holds: tuple[str, ...] = ()
    work: float = 0.0
    back_work: float = 0.0
    shares: bool = False
    casts: tuple[str, ...] = ()


@dataclass
class Played:
    """A tape between its forward and its backward: what waits, and as which kind.

    Attributes:
        kind: of the ledger, under which the tensors are booked.
        waiting: sizes of tensors that backwards need. readers: how many need each.
    """

    kind: str
    waiting: dict[str, float] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Tape:
    """Operations in order; the first operands are the input, what the last makes is the output.

    Attributes:
        ops: the operations.
        given: name and size of the tensor that the tape is given.
    """

    ops: tuple[Op, ...]
    given: tuple[str, float]

    @property
    def output(self) -> tuple[str, float]:
        """Name and size of what the tape makes."""
        return self.ops[-1].makes

    @property
    def sizes(self) -> dict[str, float]:
        """Bytes of every tensor."""
        return dict((self.given, *(op.makes for op in self.ops)))

    def forward(self, ledger: Ledger, kind: str, *, grad: bool, own_input: bool = True) -> Played:
        """Plays the forward. The input is booked already under `kind`, and so is the output then.

        Args:
            grad: keep what the backward needs.
            own_input: the input goes when nothing needs it; else somebody else holds it.
        """
        played, sizes, uses = Played(kind), self.sizes, Counter[str]()
        for op in self.ops:
            uses.update(op.takes + op.holds)
            if grad:
                played.readers.update(set(op.keeps))
        stays = {self.output[0]} | (set() if own_input else {self.given[0]})
        for op in self.ops:
            ledger.add(kind, op.makes[1])
            ledger.touch(kind, op.work)
            if grad:
                ledger.add(kind, op.saves)
            uses.subtract(op.takes + op.holds)
            for name in set(op.takes + op.holds):
                if not uses[name] and name not in stays and not played.readers[name]:
                    ledger.free(kind, sizes[name])
        owned = {name for name, count in played.readers.items() if count} - stays
        played.waiting = {name: sizes[name] for name in owned}
        return played

    def backward(self, ledger: Ledger, played: Played, kind: str) -> None:
        """Plays the backward. The output's gradient is booked under `kind`; then the input's is."""
        sizes, storage, owners = self.sizes, dict[str, str](), Counter[str]()
        storage[self.output[0]] = self.output[0]
        owners[self.output[0]] = 1
        for op in reversed(self.ops):
            made = op.makes[0]
            for name in op.takes:
                if op.shares and name not in op.casts and name not in storage:
                    storage[name] = storage[made]
                    owners[storage[made]] += 1
                elif name in storage:  # the second gradient of a tensor is added to the first
                    ledger.touch(kind, 0.0 if op.shares else sizes[name])
                else:
                    storage[name] = name
                    owners[name] = 1
                    ledger.add(kind, sizes[name])
            ledger.touch(kind, op.back_work)
            place = storage.pop(made)
            owners[place] -= 1
            if not owners[place]:
                ledger.free(kind, sizes[place])
            self._release(ledger, played, op)

    @staticmethod
    def _release(ledger: Ledger, played: Played, op: Op) -> None:
        ledger.free(played.kind, op.saves)
        for name in set(op.keeps):
            played.readers[name] -= 1
            if not played.readers[name] and name in played.waiting:
                ledger.free(played.kind, played.waiting.pop(name))
