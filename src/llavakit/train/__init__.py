"""The two stages of LLaVA: ``stages`` says what learns, ``loop`` runs it, ``state`` keeps it safe.

Before it: ``plan`` is what a run takes as closed formulas, over ``cards`` and ``published`` runs or at a ``pace`` measured here;
``preflight`` looks at the real one, by a ``rehearsal``.
"""
