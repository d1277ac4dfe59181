"""Whoever replies, behind one door: ``protocol`` says how to ask, the other modules are those who answer and how many are asked at once.

one at a time          Responder    server.ServerCompleter   scripted.ScriptedResponder   assistant.Assistant
thousands at once      Completer    server.ServerCompleter   in_turn.InTurn over any Responder
asking them            pool.ask_all(queries, completer, ledger): pace, retries, budget; ledger.Ledger keeps what was paid for
"""

from llavakit.responder.budget import Budget, Price
from llavakit.responder.in_turn import InTurn
from llavakit.responder.ledger import Failure, Ledger, Spent
from llavakit.responder.pool import Limits, Outcome, Reject, Settled, ask_all, ask_all_async, settled, whole
from llavakit.responder.progress import Progress
from llavakit.responder.protocol import Completer, Completion, Finish, Query, Responder, Usage
from llavakit.responder.scripted import ScriptedResponder
from llavakit.responder.server import ServerCompleter

__all__ = [
    "Budget",
    "Completer",
    "Completion",
    "Failure",
    "Finish",
    "InTurn",
    "Ledger",
    "Limits",
    "Outcome",
    "Price",
    "Progress",
    "Query",
    "Reject",
    "Responder",
    "ScriptedResponder",
    "ServerCompleter",
    "Settled",
    "Spent",
    "Usage",
    "ask_all",
    "ask_all_async",
    "settled",
    "whole",
]
