"""Whoever replies, behind one door: ``protocol`` says how to ask, the other modules are those who answer and how many are asked at once."""

from llavakit.responder.protocol import Completer, Completion, Finish, Query, Responder, Usage
from llavakit.responder.scripted import ScriptedResponder

__all__ = ["Completer", "Completion", "Finish", "Query", "Responder", "ScriptedResponder", "Usage"]
