"""What the simulated world is written with: a tokenizer, draws that can be repeated, and filler text."""

from __future__ import annotations

import math
import re
from hashlib import blake2b

CHARS_PER_TOKEN = 4


def tokens_in(text: str) -> int:
    """The simulated tokenizer's count: one for each four characters begun, and at least one."""
    return max(1, math.ceil(len(text) / CHARS_PER_TOKEN))


def uniform(*parts: object) -> float:
    """A number between 0 and 1, both excluded, that follows from the parts alone."""
    digest = blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52


def filler(tokens: int, drawn: float) -> str:
    """About so many tokens of text (no more), a different one for each draw from 0 to 1."""
    size, count = tokens * CHARS_PER_TOKEN, len(_SENTENCES)
    first, stride = divmod(int(drawn * count * (count - 1)), count - 1)
    places = ((first + turn * (stride + 1)) % count for turn in range(size // 40 + 1))  # none is as short as 40
    text = " ".join([_SENTENCES[place] for place in places])[:size]
    return (text.rpartition(" ")[0] or text).rstrip(" ,")


_SENTENCES = re.split(
    r"(?<=\.)\s",
    """\
The morning train was almost empty when it left the harbour. Most of the work had been done the evening before. A light
wind carried the smell of bread across the square. Nobody could say exactly when the bridge had been built. She wrote
the numbers down and compared them with the list. The second attempt went better than anyone had expected. Rain is
likely in the north, while the coast stays dry. There are several ways to answer that, and none is perfect. The garden
behind the library is open until sunset. His grandfather repaired clocks in a small shop by the river. In short, the
results agree with what was known already. The committee will meet again in the first week of spring. Two of the
samples were kept for a later comparison. It helps to begin with the simplest case and go on from there. The old map
showed a path that no longer exists. After lunch the children went down to the beach. A good example is worth more than
a long explanation. The lamp in the hallway had been left on all night. Prices rose a little in autumn and fell again
by winter. He packed two books, a coat and a bag of apples. The measurement was repeated at three different sites.
Every village along the road has its own market day. The answer depends on what is meant by the question. Snow covered
the roofs and muffled every sound. They agreed to share the cost and split the work. Water boils at a lower temperature
in the mountains. The letter arrived a week later, without a stamp. A careful reader will notice the difference at
once. The orchestra tuned their instruments in silence. Further details can be found in the second part. The boat
turned slowly and headed for the open sea.""".replace("\n", " "),
)
"""Their number is prime: any stride visits each of them before one comes again."""
