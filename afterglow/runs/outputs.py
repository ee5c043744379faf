"""Outputs that callers give to calls: which are new, which were given before, and which come too late. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from afterglow.errors import BadToolOutputs, InvalidRequest
from afterglow.objects import RunStep, SubmitToolOutputs

_TIMED_OUT = "ERROR: The tool timed out: "


def timed_out(timeout_s: float) -> str:
    """The output of a call that was not answered in time."""
    return f"{_TIMED_OUT}no output was given within {timeout_s:g} s."


def give(step: RunStep, given: Mapping[str, str]) -> None:
    """Put outputs into a step that waits for them."""
    for call in step.step_details["tool_calls"]:
        if call["type"] == "function" and call["function"]["output"] is None and call["id"] in given:
            call["function"]["output"] = given[call["id"]]


class Submission:
    """What a caller gives, held against what the run's calls are waiting for or have.

    new: outputs by call id, without those that the round in hand has already. repeats: the step that has them all,
    when there is nothing new.
    """

    def __init__(self, body: SubmitToolOutputs, expected: list[str], rounds: Sequence[RunStep]) -> None:
        """expected: ids of the calls that wait. rounds: the run's tool-call steps, newest first; they are not needed
        when the ids are those expected."""
        self._partial = bool(body.partial)
        self._expected = expected
        self._got = [output.tool_call_id for output in body.tool_outputs]
        self._rounds = [(step, _outputs(step)) for step in rounds]
        given = {output.tool_call_id: output.output for output in body.tool_outputs}
        kept = self._rounds[0][1] if expected and self._rounds else {}
        self.new = {call_id: output for call_id, output in given.items() if kept.get(call_id) != output}
        self.repeats = self._find(given)

    def _find(self, given: dict[str, str]) -> RunStep | None:
        # Some model servers give the calls of every round the same ids: what is waited for is no repetition.
        if not given or len(given) != len(self._got) or not given.keys().isdisjoint(self._expected):
            return None
        return next((step for step, outputs in self._rounds if given.items() <= outputs.items()), None)

    def check(self) -> None:
        """Raise BadToolOutputs unless the ids are those expected, each once; InvalidRequest for one that is late."""
        if late := self.too_late():
            raise late
        whole = len(self._got) == len(set(self._got))
        fits = set(self.new) <= set(self._expected) if self._partial else set(self.new) == set(self._expected)
        if not (whole and fits):
            raise BadToolOutputs(self._expected, self._got)

    def too_late(self) -> InvalidRequest | None:
        """The error for an output whose call has timed out."""
        for index, call_id in enumerate(self._got):
            if call_id in self._expected:
                continue
            had = next((outputs[call_id] for _, outputs in self._rounds if call_id in outputs), "")
            if had.startswith(_TIMED_OUT):
                message = f"The call {call_id} has timed out, and the model was told so: its output came too late."
                return InvalidRequest(message, param=f"tool_outputs[{index}]")
        return None


def _outputs(step: RunStep) -> dict[str, str]:
    """The outputs that a step's functions have, by call id."""
    functions = {call["id"]: call["function"] for call in step.step_details["tool_calls"] if call["type"] == "function"}
    return {call_id: one["output"] for call_id, one in functions.items() if one["output"] is not None}
