"""The simulated provider: a real HTTP server that speaks OpenAI's wire format at a provider's pace.

    async with Simulator(SimulatorConfig(latency_s=0.1, slots=8)) as simulator: ...  # requests to simulator.url
    python -m runner.simulator --port 8900 --latency-s 0.1 --faults.http-429 0.1

Choose it wherever a test, a benchmark or a first try needs a provider whose behaviour is known: answer, service time
and fault follow from the seed and the request alone, and a client's books can be checked against its ledger.

- A token is four characters, and no text has less than one. An image, a sound or a file in a prompt counts 85.
- A request is refused by key, form and limits, in this order, before a fault or an answer is drawn for it.
- The limits are a sliding minute. A request is charged its prompt and its ``max_tokens``, or what will be answered
  where it sets none. A request that is refused is not counted (OpenAI does count it); one that meets a fault is.
- ``max_in_flight`` refuses without a hint when to come back.
- Faults are exclusive: one draw a request, by seed, body and how often that body came, so that a retry may succeed.
  The HTTP errors and ``error_200`` come at once and cost nothing. ``hang`` delays an otherwise good answer.
  ``reset``, ``truncated`` and ``invalid_json`` spoil an answer that was computed and charged.
- A client that goes away frees its slot at once; what it had begun is charged.
- The ledger knows a body by the BLAKE2b-8 of its bytes, without the boundary where it is multipart.
"""

from __future__ import annotations

from runner.simulator.server import Simulator

__all__ = ["Simulator"]
