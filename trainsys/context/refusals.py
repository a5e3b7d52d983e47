"""Every combination that flavours of context parallelism refuse: a section of `trainsys.layout.refused`.

Not here because all flavours serve them exactly: grouped queries, document masks, sliding windows, tensor and
sequence parallelism, compiled blocks, every recomputation policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trainsys.config.run import ContextConfig
from trainsys.context.balance import CONTIGUOUS_ONLY


@dataclass(frozen=True)
class Request:
    """What somebody wants; ``heads`` and ``kv_heads`` are those of one tensor-parallel rank."""

    cfg: ContextConfig
    cp: int
    heads: int
    kv_heads: int

    @property
    def degree(self) -> int:
        """Over how many ranks heads are spread."""
        return {"ulysses": self.cp, "two_d": self.cfg.head_degree or 1}.get(self.cfg.flavour, 1)

    @property
    def degree_name(self) -> str:
        name = "parallel.cp" if self.cfg.flavour == "ulysses" else "parallel.context.head_degree"
        return f"{name}={self.degree}"


@dataclass(frozen=True)
class Refusal:
    name: str
    applies: Callable[[Request], bool]
    says: Callable[[Request], str]
    example: Mapping[str, object]
    """settings of ``parallel`` that are refused for this reason alone"""


def _two_d_only(r: Request) -> list[str]:
    given = {
        "head_degree": r.cfg.head_degree,
        "inner_ring": r.cfg.inner_ring,
        "placement": r.cfg.placement,
    }
    return [name for name, value in given.items() if value is not None]


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _works_for_heads(r: Request) -> str:
    """Degrees that both kinds of heads allow."""
    return ", ".join(
        str(d)
        for d in range(1, r.heads + 1)
        if r.heads % d == 0 and (r.kv_heads % d == 0 or d % r.kv_heads == 0)
    )


TABLE: tuple[Refusal, ...] = (
    Refusal(
        "zigzag where rows must be in order",
        lambda r: r.cfg.flavour in CONTIGUOUS_ONLY and r.cfg.balance == "zigzag",
        lambda r: (
            f"parallel.context.balance=zigzag does not go with flavour={r.cfg.flavour}, which is balanced "
            "on contiguous shards; leave balance out, or use ring, pass_q, token_ring, all_gather or two_d"
        ),
        {"cp": 4, "context.flavour": "ulysses", "context.balance": "zigzag"},
    ),
    Refusal(
        "an option of two_d for another flavour",
        lambda r: r.cfg.flavour != "two_d" and bool(_two_d_only(r)),
        lambda r: (
            f"parallel.context.{', '.join(_two_d_only(r))}: only for flavour=two_d, but it is "
            f"{r.cfg.flavour}; leave out, or use flavour=two_d"
        ),
        {"cp": 4, "context.head_degree": 2},
    ),
    Refusal(
        "two_d without its head degree",
        lambda r: r.cfg.flavour == "two_d" and r.cfg.head_degree is None,
        lambda r: (
            "parallel.context.flavour=two_d needs parallel.context.head_degree, the ranks that share heads; "
            f"with parallel.cp={r.cp} it can be one of {_divisors(r.cp)}"
        ),
        {"cp": 4, "context.flavour": "two_d"},
    ),
    Refusal(
        "a head degree that does not divide cp",
        lambda r: r.cfg.flavour == "two_d" and r.cp % r.degree != 0,
        lambda r: (
            f"parallel.context.head_degree={r.degree} does not divide parallel.cp={r.cp}; "
            f"it can be one of {_divisors(r.cp)}"
        ),
        {"cp": 2, "context.flavour": "two_d", "context.head_degree": 4},
    ),
    Refusal(
        "query heads that do not divide",
        lambda r: r.heads % r.degree != 0,
        lambda r: (
            f"{r.degree_name} ranks cannot share the {r.heads} query heads of a tensor-parallel rank; "
            f"degrees that work: {_works_for_heads(r)}; the ring flavours have no such limit"
        ),
        {"cp": 8, "context.flavour": "ulysses"},
    ),
    Refusal(
        "key heads that neither divide nor replicate",
        lambda r: r.heads % r.degree == 0 and r.kv_heads % r.degree != 0 and r.degree % r.kv_heads != 0,
        lambda r: (
            f"{r.degree_name} neither divides nor is a multiple of the {r.kv_heads} key-value heads of a "
            f"tensor-parallel rank; degrees that work: {_works_for_heads(r)}; the ring flavours have no such limit"
        ),
        {"cp": 6, "context.flavour": "ulysses"},
    ),
    Refusal(
        "an inner ring that does not divide the ring",
        lambda r: (
            r.cfg.flavour == "two_d"
            and r.cp % r.degree == 0
            and r.cp // r.degree % (r.cfg.inner_ring or 1) != 0
        ),
        lambda r: (
            f"parallel.context.inner_ring={r.cfg.inner_ring} does not divide the ring of "
            f"cp / head_degree = {r.cp // r.degree} ranks; it can be one of {_divisors(r.cp // r.degree)}"
        ),
        {"cp": 8, "context.flavour": "two_d", "context.head_degree": 2, "context.inner_ring": 3},
    ),
)


def refusals(request: Request) -> Iterator[str]:
    """One line for each reason why ``request`` cannot be served; nothing where it can, or cp is 1."""
    if request.cp > 1:
        for refusal in TABLE:
            if refusal.applies(request):
                yield refusal.says(request)
