"""Which branches of a pass each of several devices computes."""

from collections.abc import Sequence


def shared_out(branches: int, planned: Sequence[int], together: Sequence[range] = ()) -> list[set[int]]:
    """Of each device, where `planned` says how many of a whole pass's are its own: neighbours, in the devices' order.

    A pass of fewer gives to each as its share is; one of more goes on in the same way. Those that belong `together` are
    on one device, that of the first of them.
    """
    counts = [0] * len(planned)
    for _ in range(branches):
        free = [i for i, most in enumerate(planned) if counts[i] < most] or range(len(planned))
        counts[min(free, key=lambda i: ((counts[i] + 1) / planned[i], i))] += 1
    shares: list[set[int]] = []
    first = 0
    for count in counts:
        shares.append(set(range(first, first + count)))
        first += count
    for group in together:
        chosen = next(share for share in shares if group.start in share)
        for share in shares:
            share.difference_update(group)
        chosen.update(group)
    return shares
