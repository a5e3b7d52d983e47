"""In which order ranks communicate, as NCCL needs it: one for all ranks of a group; and what is launched ahead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from support.virtual.trace import MAIN, Channel, Comm, Kernel, Message, Record, Trace, Wait


def collectives_in_one_order(traces: Sequence[Trace]) -> list[str]:
    """Where two ranks of a group differ in what they call next; a line for each pair of ranks and group."""
    calls: dict[Channel, list[tuple[int, list[tuple[object, ...]]]]] = defaultdict(list)
    for trace in traces:
        mine: dict[Channel, list[tuple[object, ...]]] = defaultdict(list)
        for node in trace.nodes:
            if isinstance(node, Comm) and not node.messages:
                mine[node.channel].append((node.op, node.shape))
        for channel in {c for other in traces for c in channels(other) if trace.rank in c[1]}:
            calls[channel].append((trace.rank, mine[channel]))
    found = []
    for channel, each in calls.items():
        first, wanted = each[0]
        for rank, got in each[1:]:
            pairs = enumerate(zip_longest(wanted, got))
            if differs := next(((i, a, b) for i, (a, b) in pairs if a != b), None):
                i, a, b = differs
                found.append(f"call {i} of group {channel[1]}: {a} on rank {first}, {b} on rank {rank}")
    return found


def channels(trace: Trace) -> set[Channel]:
    return {node.channel for node in trace.nodes if isinstance(node, Comm)}


def messages_in_pairs(traces: Sequence[Trace]) -> list[str]:
    """Where the next message from one rank to another is not what the other receives next from it. Between recorded
    ranks; NCCL pairs messages by their order alone."""
    sent: dict[tuple[Channel, int, int], list[Message]] = defaultdict(list)
    received: dict[tuple[Channel, int, int], list[Message]] = defaultdict(list)
    recorded = {trace.rank for trace in traces}
    for trace in traces:
        for node in trace.nodes:
            for m in node.messages if isinstance(node, Comm) else ():
                if m.peer in recorded:
                    ends = (trace.rank, m.peer) if m.sends else (m.peer, trace.rank)
                    (sent if m.sends else received)[node.channel, *ends].append(m)
    found = []
    for way in {*sent, *received}:
        for i, (out, into) in enumerate(zip_longest(sent[way], received[way])):
            if out is None or into is None or (out.key, out.nbytes) != (into.key, into.nbytes):
                found.append(f"message {i} from rank {way[1]} to {way[2]}: sent {out}, received {into}")
                break
    return found


def gathers_ahead(trace: Trace) -> tuple[int, int]:
    """(gathers launched before the first product that uses the gather before them, gathers that could be), of FSDP
    in the second step. They hide behind that product even if the host is no further ahead of its device."""
    ahead = could = 0
    last: int | None = None  # the gather before: its event
    used = False  # a product since the compute stream has waited for it
    waited = False
    nodes = trace.nodes
    for i in range(trace.second, len(nodes)):
        node = nodes[i]
        if isinstance(node, Comm) and node.op == "all_gather" and node.stream != MAIN:
            if last is not None:
                could += 1
                ahead += not used
            event = next(n for n in nodes[i + 1 :] if isinstance(n, Record) and n.stream == node.stream)
            last, used, waited = event.event, False, False
        elif isinstance(node, Wait) and node.stream == MAIN and node.event == last:
            waited = True
        elif isinstance(node, Kernel) and node.stream == MAIN and node.flops and waited:
            used = True
    return ahead, could
